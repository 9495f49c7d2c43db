# SPDX-License-Identifier: Apache-2.0
"""What each further worker costs on real etcd and NATS: ``python -m benchmarks.fleet --json fleet.json``.

Workers without engines, a process each, serve a real worker's state and control endpoint in Dynamo's discovery; their
requests get tokens all the time. For each number of them: how long discovery takes, keys and memory of the servers,
processor time of servers, workers and a watching client at rest, and what it takes to ask all of them once and a second
later. Slopes go through the measured numbers; ``at`` extrapolates.
"""

from __future__ import annotations

import asyncio
import base64
import json as jsonlib
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.graph import end_on_sigterm, machine
from components import env, process
from components.client import Workers
from components.errors import MigrateError
from components.serve.servers import Servers

_REST_S = 10.0
_START_S = 240.0
_TOKENS = 50
"""Of each request in a second."""
_AGAIN = 5
"""Times that all workers are asked for a second's changes."""


class Point(msgspec.Struct):
    """One number of workers. Processor time in milliseconds for each second, memory in MiB."""

    workers: int
    found_s: float
    """From the start of the last of the new processes until a new client has found all workers."""
    etcd_keys: int
    etcd_mib: float
    etcd_ms: float
    nats_mib: float
    nats_ms: float
    worker_mib: float
    """Of each, on average."""
    worker_ms: float
    client_ms: float
    """A client that watches and asks nothing."""
    whole_ms: float
    """Wall clock until all workers have told everything."""
    whole_cpu_ms: float
    """Of the client."""
    changes_ms: float
    changes_cpu_ms: float
    missing: int


class Fleet(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    requests: int
    points: list[Point] = []
    at: dict[str, float] = {}
    """Each figure extrapolated to ``workers``, but for the share of each worker."""


async def _work(requests: int) -> None:
    """One worker without an engine."""
    from tests import fake_workers

    peers = fake_workers.Workers(1)
    engine = peers.engines[1]
    engine.table = [fake_workers.info_of(f"0b1a52ac-{os.getpid():012x}{i:06x}", i) for i in range(requests)]
    runtime = process.connect()
    component = env.COMPONENTS.read()[0]
    endpoint = runtime.endpoint(f"{process.namespace()}.{component}.migrate")
    serving = asyncio.ensure_future(endpoint.serve_endpoint(peers._controls[1].serve))
    stop = process.on_stop()
    while not stop.is_set() and not serving.done():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
        peers.go_on(_TOKENS)
    runtime.shutdown()


def _keys(endpoint: str) -> int:
    everything = base64.b64encode(b"\0").decode()
    body = {"key": everything, "range_end": everything, "count_only": True}
    return int(httpx.post(f"{endpoint}/v3/kv/range", json=body, trust_env=False).json().get("count", 0))


def _used(processes: list[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


async def _ask(client: Workers) -> tuple[float, float]:
    """Milliseconds of wall clock and of this process."""
    wall, cpu = time.monotonic(), time.process_time()
    await client.refresh(30.0)
    return 1e3 * (time.monotonic() - wall), 1e3 * (time.process_time() - cpu)


async def _measure(count: int, began: float, servers: Servers, members: list[psutil.Process], etcd: str) -> Point:
    runtime = process.connect()
    client = await Workers.connect(runtime, process.namespace(), _START_S)
    while len(client._peers.instances()) < count:
        if time.monotonic() > began + _START_S:
            raise MigrateError(f"{len(client._peers.instances())} of {count} workers in discovery")
        await asyncio.sleep(0.1)
    found_s = time.monotonic() - began
    await asyncio.sleep(2.0)
    groups = [[psutil.Process(one.pid)] for one in servers.processes[:2]] + [members]
    before, own = [_used(group) for group in groups], time.process_time()
    await asyncio.sleep(_REST_S)
    rest = [1e3 * (_used(group) - used) / _REST_S for group, used in zip(groups, before, strict=True)]
    client_ms = 1e3 * (time.process_time() - own) / _REST_S
    whole = await _ask(client)
    changes = []
    for _ in range(_AGAIN):
        await asyncio.sleep(1.0)
        changes.append(await _ask(client))
    mib = [sum(one.memory_info().rss for one in group) / (1 << 20) for group in groups]
    return Point(
        count,
        found_s,
        _keys(etcd),
        mib[0],
        rest[0],
        mib[1],
        rest[1],
        mib[2] / count,
        rest[2] / count,
        client_ms,
        *whole,
        *(float(value) for value in np.median(changes, axis=0)),
        missing=sum(bool(worker.missing) for worker in client.status(ages=False).workers),
    )


def extrapolated(points: list[Point], workers: int) -> dict[str, float]:
    """Straight lines through the points, none of which falls; each worker's own share is the mean."""
    numbers, found = [point.workers for point in points], {}
    for name in Point.__struct_fields__[1:-1]:
        values = [float(getattr(point, name)) for point in points]
        if name.startswith("worker_") or len(points) < 2:
            found[name] = float(np.mean(values))
        else:
            slope = max(0.0, float(np.polyfit(numbers, values, 1)[0]))
            found[name] = float(np.mean(values) + slope * (workers - np.mean(numbers)))
    return found


def _spawn(requests: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.fleet", "--work", "--requests", str(requests)]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _child(count: int, began: float, servers: Servers, members: list[int], variables: dict[str, str]) -> Point:
    """A new client each time, in a process of its own: a process has one runtime."""
    pids = ",".join(str(pid) for pid in [*(one.pid for one in servers.processes[:2]), *members])
    command = [sys.executable, "-m", "benchmarks.fleet", "--ask", pids, "--since", str(time.monotonic() - began)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise MigrateError(f"{count} workers: {done.stderr[-1500:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Point)


def show(fleet: Fleet, at: int, console: Console) -> None:
    """One column for each number of workers."""
    table = Table(title=f"{fleet.requests} requests on each worker")
    for column in ("", *(str(point.workers) for point in fleet.points), f"{at}, extrapolated"):
        table.add_column(column, justify="right" if column else "left")
    for name in Point.__struct_fields__[1:-1]:
        values = [*(getattr(point, name) for point in fleet.points), fleet.at[name]]
        table.add_row(name.replace("_", " "), *(f"{value:,.1f}" for value in values))
    console.print(table)


def main(
    sizes: Annotated[str, typer.Option(help="numbers of workers")] = "10,20,40",
    at: Annotated[int, typer.Option(help="number of workers to extrapolate to")] = 1000,
    requests: Annotated[int, typer.Option(help="running on each worker")] = 100,
    json: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
    work: Annotated[bool, typer.Option("--work", hidden=True)] = False,
    ask: Annotated[str, typer.Option("--ask", hidden=True)] = "",
    since: Annotated[float, typer.Option("--since", hidden=True)] = 0.0,
) -> None:
    """Start more and more workers without engines, and measure what they cost."""
    if work:
        asyncio.run(_work(requests))
        os._exit(0)
    if ask:
        print(jsonlib.dumps(asyncio.run(_asked(ask, time.monotonic() - since))))
        sys.stdout.flush()
        os._exit(0)
    end_on_sigterm()
    fleet, servers, console = Fleet(machine(), requests), Servers(), Console(width=140)
    running: list[subprocess.Popen[bytes]] = []
    try:
        variables = servers.start({}) | {"DYN_LOG": "error"}
        for count in (int(size) for size in sizes.split(",")):
            running += [_spawn(requests, variables) for _ in range(count - len(running))]
            fleet.points.append(_child(count, time.monotonic(), servers, [one.pid for one in running], variables))
            fleet.at = extrapolated(fleet.points, at)
            if json is not None:
                json.write_bytes(msgspec.json.format(msgspec.json.encode(fleet)))
            console.print(f"{count} workers are measured")
    finally:
        for one in running:
            one.terminate()
        for one in running:
            with suppress(subprocess.TimeoutExpired):
                one.wait(5)
            one.kill()
        servers.stop()
    show(fleet, at, console)


async def _asked(pids: str, began: float) -> dict[str, Any]:
    numbers = [int(pid) for pid in pids.split(",")]
    known = type("Known", (), {"processes": [psutil.Process(pid) for pid in numbers[:2]]})
    members = [psutil.Process(pid) for pid in numbers[2:]]
    point = await _measure(len(members), began, known, members, env.ETCD_ENDPOINTS.read()[0])  # type: ignore[arg-type]
    return msgspec.structs.asdict(point)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()

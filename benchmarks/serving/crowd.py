# SPDX-License-Identifier: Apache-2.0
"""Workload ``crowd``: the cost of this package without moves, beside stock Dynamo and ``vllm serve``.

Each system has one worker, on the same device; all run at the same time and get the same load in turn (closed loop,
``streams``), in another order with each repeat. On CPUs the engines of the others are stopped meanwhile.
A system that does not start in time is left out. Every run is written to the file at its end. Raises ``MigrateError``
when no two systems start.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.serving.load import Child
from benchmarks.serving.parts import Kind, Size
from benchmarks.serving.shapes import SHAPES
from benchmarks.serving.streams import Order, Seen
from benchmarks.serving.systems import System, resting, running
from components.errors import MigrateError
from components.transfer import Transport

KINDS = (Kind.OURS_AGG, Kind.STOCK_AGG, Kind.VLLM)
_PER_CLIENT = 32
"""Streams that one client process reads: 256 streams of one H200 keep it busy for a tenth of the time."""
_KV_BYTES = 12 << 30
"""On a GPU, for each engine: 256 requests of 384 tokens of Llama-3.1-8B."""
_RAMP_S = 2.0
_TAIL_S = 30.0
"""For answers that are under way when the window ends."""
_CHOSEN = re.compile(
    r"Using \w+ (?:attention )?backend|Using \w+ Model Runner|Using FlashAttention version \d+"
    r"|(?<=cudagraph_mode': <)[\w.]+|enforce_eager=\w+|dtype=torch\.\w+"
)


class Load(msgspec.Struct, frozen=True):
    """What is sent."""

    prompt: int = 16
    output: int = 200
    """On average."""
    seconds: float = 8.0
    """Length of the window that counts."""


class CrowdRun(msgspec.Struct):
    """One window on one system."""

    system: str
    streams: int
    repeat: int
    seconds: float
    seen: Seen
    cpu_s: dict[str, float]
    """Time on processors in the window by kind of process."""


class Crowd(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    date: str
    load: Load
    engine: dict[str, Any]
    chosen: dict[str, list[str]] = {}
    """vLLM's choices, from each engine's log."""
    runs: list[CrowdRun] = []
    errors: list[str] = []


def measure(
    found: Crowd,
    streams: list[int],
    repeats: int,
    transport: Transport,
    devices: tuple[int, ...],
    logs: Path,
    start_s: float,
    until: float,
    say: Callable[[str], None],
    keep: Callable[[], None],
) -> None:
    """Add ``repeats`` of them to ``found``; none begins that would not be over at ``until``, by ``time.monotonic``."""
    found.engine = _engine(found, max(streams), bool(devices))
    engine = found.engine
    with ExitStack() as stack:
        where = {"logs": logs, "engine": engine, "devices": devices, "size": Size(0, 1), "wait": False}
        begun = [stack.enter_context(running(kind, found.model, transport, **where)) for kind in KINDS]
        systems = _started(begun, time.monotonic() + start_s, found, say)
        keep()
        count = max(1, min(8, (os.cpu_count() or 2) // 2, -(-max(streams) // _PER_CLIENT)))
        clients = [stack.enter_context(Clients(logs / f"client{n}.log")) for n in range(count)]
        pool = stack.enter_context(ThreadPoolExecutor(count))
        for client in clients:
            client.read()
        for system in systems:
            _run(system, clients, pool, msgspec.structs.replace(found.load, seconds=2.0), max(streams), "warm")
        first = 1 + max((run.repeat for run in found.runs), default=-1)
        took = 0.0
        for repeat in range(first, first + repeats):
            began = time.monotonic()
            if began + took > until:
                say(f"no time left for repeat {repeat}")
                return
            for number in streams:
                turn = (repeat + streams.index(number)) % len(systems)
                for system in systems[turn:] + systems[:turn]:
                    with resting(() if devices else [other for other in systems if other is not system]):
                        run = _run(system, clients, pool, found.load, number, str(repeat))
                    run.repeat = repeat
                    found.runs.append(run)
                    keep()
                    errors = f", {len(run.seen.errors)} errors: {run.seen.errors[0]}" if run.seen.errors else ""
                    say(f"{system.kind}, {number} streams: {run.seen.tokens / run.seconds:,.0f} tokens/s{errors}")
            took = time.monotonic() - began


def _engine(found: Crowd, seats: int, on_gpu: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"max-num-seqs": seats}
    if found.model in SHAPES:
        given["load-format"] = "dummy"
    if on_gpu:  # All are on the same one: each states what it takes.
        given |= {"gpu-memory-utilization": 0.9 / len(KINDS), "kv-cache-memory-bytes": _KV_BYTES}
    return given | found.engine


class Clients(Child):
    """One of the processes that share the load."""

    def __init__(self, log: Path) -> None:
        super().__init__("benchmarks.serving.streams", {}, log)

    def send(self, order: Order) -> Seen:
        """Blocks until it is over."""
        return msgspec.json.decode(self.ask(msgspec.to_builtins(order)), type=Seen)


def _started(begun: list[System], end: float, found: Crowd, say: Callable[[str], None]) -> list[System]:
    systems = []
    for system in begun:
        try:
            _wait(system, end)
        except MigrateError as error:
            say(str(error))
            found.errors.append(str(error).splitlines()[0])  # The rest has paths of this machine.
            continue
        systems.append(system)
        found.chosen[system.kind.value] = _chosen(system)
        say(f"{system.kind}: up; {'; '.join(found.chosen[system.kind.value])}")
    if len(systems) < 2:
        raise MigrateError(f"only {', '.join(s.kind for s in systems) or 'no system'} started; see the errors above")
    return systems


def _wait(system: System, end: float) -> None:
    try:
        system.wait(max(1.0, end - time.monotonic()))
    except MigrateError:
        # Three starts at once: one may run into a time-out of etcd's. What has ended gets a second chance.
        system.start_missing()
        system.wait(max(1.0, end - time.monotonic()))


def _chosen(system: System) -> list[str]:
    text = "\n".join(system.log(part).read_text(errors="replace") for part in system.workers)
    return list(dict.fromkeys(_CHOSEN.findall(text)))


def _run(
    system: System, clients: list[Clients], pool: ThreadPoolExecutor, load: Load, streams: int, seed: str
) -> CrowdRun:
    begin = time.monotonic() + _RAMP_S
    end = begin + load.seconds
    orders = [
        Order(
            *(system.url, system.model, tuple(range(number, streams, len(clients))), streams, load.prompt, load.output),
            *(begin, end, end + _TAIL_S, f"{seed}-{streams}"),
        )
        for number in range(len(clients))
    ]
    answers = [pool.submit(client.send, order) for client, order in zip(clients, orders, strict=True) if order.streams]
    time.sleep(max(0.0, begin - time.monotonic()))
    before, at = system.processor_seconds(), time.monotonic()
    time.sleep(max(0.0, end - time.monotonic()))
    after, seconds = system.processor_seconds(), time.monotonic() - at
    seen = _together([answer.result() for answer in answers])
    cpu = {name: (used - before.get(name, 0.0)) * load.seconds / seconds for name, used in after.items()}
    return CrowdRun(system.kind.value, streams, 0, load.seconds, seen, cpu)


def _together(parts: list[Seen]) -> Seen:
    whole = Seen()
    for part in parts:
        whole.tokens += part.tokens
        whole.chunks += part.chunks
        whole.requests += part.requests
        whole.ttft_ms += part.ttft_ms
        whole.cpu_s += part.cpu_s
        whole.errors += part.errors
        for gap, count in part.gaps.items():
            whole.gaps[gap] = whole.gaps.get(gap, 0) + count
    whole.errors = whole.errors[:20]
    whole.tokens = round(whole.tokens, 1)
    return whole


def figures(runs: list[CrowdRun]) -> Mapping[str, float]:
    """Of all repeats together: tokens/s, percentiles in milliseconds, microseconds of processors for a token."""
    import numpy as np

    gaps: dict[float, int] = {}
    for run in runs:
        for gap, count in run.seen.gaps.items():
            gaps[float(gap)] = gaps.get(float(gap), 0) + count
    values = np.array(sorted(gaps))
    rank = np.cumsum([gaps[value] for value in values])
    ttft = np.array([value for run in runs for value in run.seen.ttft_ms])
    tokens = sum(run.seen.tokens for run in runs)
    found = {"tokens_s": tokens / sum(run.seconds for run in runs)}
    for share in (50, 99):
        found[f"itl_p{share}"] = float(values[np.searchsorted(rank, share / 100 * rank[-1])]) if len(values) else np.nan
        found[f"ttft_p{share}"] = float(np.percentile(ttft, share)) if len(ttft) else np.nan
    for name in sorted({name for run in runs for name in run.cpu_s}):
        found[f"cpu_{name}"] = 1e6 * sum(run.cpu_s.get(name, 0.0) for run in runs) / max(1.0, tokens)
    found["cpu_client"] = 1e6 * sum(run.seen.cpu_s for run in runs) / max(1.0, tokens)
    return found

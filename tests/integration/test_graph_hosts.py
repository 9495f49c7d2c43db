# SPDX-License-Identifier: Apache-2.0
"""One graph over two "hosts": namespaces with a cable between them, ``dynamo serve --only`` on each.

Also with the clock of the second one an hour off: ``clock.c``, built here, is preloaded into its processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import etcd_server, nats_server
from tests.integration.graphs import PAGED, PROMPT, Graph
from tests.integration.networks import ADDRESSES, Cable, on_host, run, slow_cable, veth

pytestmark = pytest.mark.integration
ENGINES = {"paged": ((*PAGED, "--DecodeWorker.engine-args={step_s: 0.01}"), 1000), "vllm": ((), 600)}


def clock_off(hours: int, folder: Path) -> dict[str, str]:
    """Variables for a host whose clock is off."""
    if not hours:
        return {}
    library = folder / "clock.so"
    run("cc", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("clock.c")), "-ldl")
    return {"LD_PRELOAD": str(library), "CLOCK_OFF_S": str(hours * 3600)}


def served(folder: Path, host: int, only: str, overrides: tuple[str, ...], hours: int = 0) -> Graph:
    """The part of the graph that runs on this host, joined through the servers of the first one."""
    return Graph(
        folder,
        overrides=("--nixl-transport=tcp", f"--only={only}", f"--Common.advertise-host={ADDRESSES[host]}", *overrides),
        ETCD_ENDPOINTS=f"http://{ADDRESSES[0]}:2379",
        NATS_SERVER=f"nats://{ADDRESSES[0]}:4222",
        ETCD_LEASE_TTL="20",
        **clock_off(hours, folder),
    )


def keys(host: str) -> list[str]:
    """All that is in etcd."""
    code = (
        "import sys, etcd3\n"
        "for _, entry in etcd3.client(host=sys.argv[1], port=2379).get_all(keys_only=True):\n"
        "    print(entry.key.decode())"
    )
    environment = dict(os.environ) | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    command = [sys.executable, "-c", code, host]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert listed.returncode == 0, listed.stderr
    return listed.stdout.split()


@contextmanager
def joined(folder: Path, second: str, overrides: tuple[str, ...], hours: int = 0) -> Iterator[tuple[Graph, Graph, str]]:
    """Both parts, and the worker on the second host. To be called on the first one."""
    folders = [folder / "first", folder / "second"]
    with ExitStack() as stack:
        for part in folders:
            part.mkdir()
        stack.enter_context(etcd_server(folder / "etcd", 2379, ADDRESSES[0]))
        stack.enter_context(nats_server(folder / "nats", 4222, ADDRESSES[0]))
        # One decode worker on each host; a cached prefix would hide what the cable carries.
        mine = (*overrides, "--DecodeWorker.replicas=1", "--Common.enable-prefix-caching=false")
        graph = served(folders[0], 0, "Frontend,PrefillWorker,DecodeWorker", mine)
        stack.callback(graph.stop)
        other = on_host(second, lambda: served(folders[1], 1, "DecodeWorker", mine, hours))
        stack.callback(other.stop)
        graph.wait()
        graph.wait_until_idle(workers=3)
        workers = {
            w["info"]["agents"][0]["name"].split("-DecodeWorker-")[0]: w["worker"] for w in graph.status()["workers"]
        }
        yield graph, other, workers[second]


def to_and_fro(graph: Graph, away: str, where: dict[str, str]) -> list[dict[str, Any]]:
    """Move all requests to the other host, then all of them back, live; what became of that."""
    home = graph.another(away)
    other = {home: away, away: home}
    there = [(request, source, other[source], "live") for request, source in where.items()]
    back = [(request, target, source, mode) for request, source, target, mode in there]
    return [move for moves in (there, back) for move in graph.ask("migrate all", *map(json.dumps, moves))]


@pytest.mark.parametrize(
    ("engine", "hours"),
    [
        ("paged", 0),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in (("paged", 1), ("paged", -1), ("vllm", 0))],
    ],
)
def test_requests_move_between_hosts_and_survive_the_stop_of_one(engine: str, hours: int, tmp_path: Path) -> None:
    overrides, length = ENGINES[engine]

    def first_host(second: str) -> None:
        with joined(tmp_path, second, overrides, hours) as (graph, other, away):
            prompts = [f"host {i} {PROMPT}" for i in range(4)]
            sampling = {"temperature": 0.8, "seed": 3}

            def move(where: dict[str, str]) -> None:
                moves = to_and_fro(graph, away, where)
                assert all(m.get("ok") and m["mode"] == "live" for m in moves), moves
                assert all(m["lane"] == "nixl/ucx/tcp" and m["bytes"] > 0 for m in moves), moves

            moved = graph.under_way(prompts, length, move, **sampling)
            graph.wait_until_idle()

            def stop_the_second(where: dict[str, str]) -> None:
                assert away in where.values()
                other.process.send_signal(signal.SIGTERM)

            left = graph.under_way(prompts, length, stop_the_second, **sampling)
            assert other.process.wait(60) == 0
            graph.wait_until_idle(workers=2)
            assert moved == left == graph.complete_all(prompts, length, **sampling)
            assert keys(ADDRESSES[0])
            assert graph.stop() == []
            # What a process did not take back itself goes with its lease of 20 s.
            end = time.monotonic() + 40
            while keys(ADDRESSES[0]):
                assert time.monotonic() < end, keys(ADDRESSES[0])
                time.sleep(0.5)

    with veth() as cable:
        on_host(cable.names[0], lambda: first_host(cable.names[1]))


@pytest.mark.slow
def test_a_slow_and_lossy_cable_costs_no_token(tmp_path: Path) -> None:
    """200 ms each way and 5% of the packets lost, once the graph stands. A move may fail; no text may differ."""
    overrides, length = ENGINES["paged"]
    # A minute of answers: moves over this cable take seconds.
    overrides = (*overrides, "--DecodeWorker.engine-args={step_s: 0.03}")

    def first_host(cable: Cable) -> None:
        with joined(tmp_path, cable.names[1], overrides) as (graph, _, away):
            cable.delay_s, cable.loss = 0.2, 0.05
            moves: list[dict[str, Any]] = []
            prompts = [f"cable {i} {PROMPT}" for i in range(4)]
            graph.disturbed(
                prompts, length, lambda where: moves.extend(to_and_fro(graph, away, where)), temperature=0.8, seed=3
            )
            print(*moves, sep="\n")
            assert any(move.get("ok") for move in moves) and cable.lost
            graph.wait_until_idle()

    with slow_cable(0.0, 0.0) as cable:
        on_host(cable.names[0], lambda: first_host(cable))

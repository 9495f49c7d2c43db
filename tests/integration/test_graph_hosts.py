# SPDX-License-Identifier: Apache-2.0
"""One graph over two "hosts": namespaces with a cable between them, ``dynamo serve --only`` on each.

Also with the clock of the second one an hour off: ``clock.c``, built here, is preloaded into its processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import etcd_server, nats_server
from tests.integration.graphs import PAGED, PROMPT, Graph
from tests.integration.networks import ADDRESSES, on_host, run, veth

pytestmark = pytest.mark.integration
ENGINES = {"paged": (PAGED, 2000), "vllm": ((), 600)}


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
        ETCD_LEASE_TTL="10",
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


@pytest.mark.parametrize(
    ("engine", "hours"),
    [
        ("paged", 0),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in (("paged", 1), ("paged", -1), ("vllm", 0))],
    ],
)
def test_requests_move_between_hosts_and_survive_the_stop_of_one(engine: str, hours: int, tmp_path: Path) -> None:
    overrides, length = ENGINES[engine]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()

    def first_host(second: str) -> None:
        with ExitStack() as stack:
            stack.enter_context(etcd_server(tmp_path / "etcd", 2379, ADDRESSES[0]))
            stack.enter_context(nats_server(tmp_path / "nats", 4222, ADDRESSES[0]))
            # One decode worker on each host; a cached prefix would hide what the cable carries.
            mine = (*overrides, "--DecodeWorker.replicas=1", "--Common.enable-prefix-caching=false")
            graph = served(folders[0], 0, "Frontend,Router,PrefillWorker,DecodeWorker", mine)
            stack.callback(graph.stop)
            other = on_host(second, lambda: served(folders[1], 1, "DecodeWorker", mine, hours))
            stack.callback(other.stop)
            graph.wait()
            graph.wait_until_idle(workers=3)
            prompts = [f"host {i} {PROMPT}" for i in range(4)]
            graph.wait_until_idle()
            workers = {w["agents"][0].split("-backend-")[0]: w["worker"] for w in graph.status()["workers"]}
            away = workers[second]

            def to_and_fro(where: dict[str, str]) -> None:
                home = next(
                    w["worker"] for w in graph.status()["workers"] if w["role"] == "decode" and w["worker"] != away
                )
                moves = []
                for request, source in where.items():
                    for target in (away, home) if source == home else (home, away):
                        moves.append(graph.ask("migrate", request, target, "live"))
                assert all(m["ok"] and m["mode"] == "live" for m in moves), moves
                assert all(m["lane"] == "nixl/ucx/tcp" and m["bytes"] > 0 for m in moves), moves

            graph.disturbed(prompts, length, to_and_fro, temperature=0.8, seed=3)
            graph.wait_until_idle()

            def stop_the_second(where: dict[str, str]) -> None:
                assert away in where.values()
                other.process.send_signal(signal.SIGTERM)

            graph.disturbed(prompts, length, stop_the_second, temperature=0.8, seed=3)
            assert other.process.wait(60) == 0
            graph.wait_until_idle(workers=2)
            assert keys(ADDRESSES[0])
            assert graph.stop() == []
            # What a process did not take back itself goes with its lease of 10 s.
            end = time.monotonic() + 25
            while keys(ADDRESSES[0]):
                assert time.monotonic() < end, keys(ADDRESSES[0])
                time.sleep(0.5)

    with veth() as cable:
        on_host(cable.names[0], lambda: first_host(cable.names[1]))

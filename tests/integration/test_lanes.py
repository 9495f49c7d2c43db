# SPDX-License-Identifier: Apache-2.0
"""The served graph over each lane that a host without GPUs has, and without NIXL: the same text, the lane named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.graphs import PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LANES = {
    "tcp": (("--nixl-transport=tcp",), "nixl/ucx/tcp"),
    "shm": (("--nixl-transport=shm",), "shm/mapped"),
    "by key": (("--Common.transfer={backends: [tcp]}",), "tcp/sockets"),
    "without nixl": ((), "shm/mapped"),
    "tcp without nixl": (("--nixl-transport=tcp",), "tcp/sockets"),
}


@pytest.mark.parametrize("lane", LANES)
def test_a_moved_stream_is_the_same_over_every_lane(lane: str, tmp_path: Path) -> None:
    overrides, reported = LANES[lane]
    environment = {}
    if "without nixl" in lane:
        broken = tmp_path / "path" / "nixl"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("raise ImportError('not installed here')\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    graph = Graph(tmp_path, overrides=overrides, **environment)
    try:
        graph.wait()
        moves = []

        def move(where: dict[str, str]) -> None:
            [(request, source)] = where.items()
            workers = [w["worker"] for w in graph.status()["workers"] if w["role"] == "decode"]
            for target in (*[w for w in workers if w != source], source):
                moves.append(graph.ask("migrate", request, target, "live"))

        graph.disturbed([PROMPT], 1500, move, temperature=0)
        assert [(m["ok"], m["mode"], m["lane"]) for m in moves] == [(True, "live", reported)] * 2, moves
        graph.wait_until_idle()
    finally:
        assert graph.stop() == []

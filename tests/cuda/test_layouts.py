# SPDX-License-Identifier: Apache-2.0
"""Every layout of KV pools between two processes on one GPU: the chosen lane, and all bytes.

Also a peer that appears while this process captures a CUDA graph, as vLLM does at its start.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from components.transfer import AgentConfig, KVPool, Strategy, TransferAgent
from components.transfer.control.record import AgentRecord, decode, encode
from components.transfer.data.nixl import nixl_is_available
from tests.layouts import LAYOUTS

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LANES: dict[str, tuple[dict[str, Any], str]] = {
    "auto": ({}, "cuda_ipc/kernel"),
    "write": ({"backends": ("nixl",), "strategy": Strategy.WRITE}, "nixl/ucx"),
    "staged": ({"backends": ("nixl",), "strategy": Strategy.STAGED, "staging_bytes": 1 << 20}, "nixl/ucx"),
    "tcp": ({"backends": ("tcp",)}, "tcp/sockets"),
}
SRC, DST = [7, 0, 11, 3, 4], [2, 9, 0, 5, 6]


def made(layout: str, seed: int) -> list[KVPool]:
    """The same bytes in every process."""
    torch.manual_seed(seed)
    return LAYOUTS[layout](torch.device("cuda:0"))


def source(pipe: Connection) -> None:
    """Main of the source's process: an agent of the layout that is asked for, one after the other."""
    agent: TransferAgent | None = None
    while command := pipe.recv():
        if isinstance(command, bytes):
            assert agent is not None
            agent.directory.put(decode(command))
            continue
        if agent is not None:
            agent.close()
        layout, more = command
        agent = TransferAgent(AgentConfig(name="source", block_size=8, **more))
        agent.start(made(layout, 1))
        torch.cuda.synchronize()
        pipe.send(encode(agent.record))
    if agent is not None:
        agent.close()


class Source:
    """The other process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=source, args=(theirs,), daemon=True)
        self._process.start()

    def start(self, layout: str, **more: Any) -> AgentRecord:
        """A new agent, which replaces the one before."""
        self._pipe.send((layout, more))
        if not self._pipe.poll(120):
            raise TimeoutError("the source did not start")
        return decode(self._pipe.recv())

    def meet(self, agent: TransferAgent) -> None:
        """Tell it of ours."""
        self._pipe.send(encode(agent.record))

    def end(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(20)
        self._process.kill()


@pytest.fixture(scope="module")
def other() -> Iterator[Source]:
    process = Source()
    yield process
    process.end()


def by_block(pool: KVPool) -> torch.Tensor:
    """The pool as bytes, blocks first."""
    return pool.tensor.movedim(pool.block_dim, 0).view(torch.int8)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_the_named_blocks_arrive(other: Source, layout: str, lane: str) -> None:
    more, reported = LANES[lane]
    if reported == "nixl/ucx" and not nixl_is_available()[0]:
        pytest.skip(nixl_is_available()[1])
    peer = other.start(layout, **more)
    ours, expected, theirs = made(layout, 2), made(layout, 2), made(layout, 1)
    for to, origin in zip(expected, theirs, strict=True):
        by_block(to)[DST] = by_block(origin)[SRC]
    torch.cuda.synchronize()
    agent = TransferAgent(AgentConfig(name="destination", block_size=8, **more))
    try:
        agent.start(ours)
        other.meet(agent)
        agent.directory.put(peer)
        result = agent.fetch(peer.ref, SRC, DST, request_id="r", deadline_s=30).wait(40)
        assert result.lane.startswith(reported)
        for pool, wanted in zip(ours, expected, strict=True):
            whole, other_whole = (torch.empty(0, dtype=torch.uint8, device="cuda:0") for _ in range(2))
            whole.set_(pool.tensor.untyped_storage())
            other_whole.set_(wanted.tensor.untyped_storage())
            assert torch.equal(whole, other_whole), pool.name
    finally:
        agent.close()


def test_a_peer_that_appears_while_a_graph_is_captured_is_mapped_and_the_graph_is_whole(other: Source) -> None:
    peer = other.start("LBNHC")
    ours, theirs = made("LBNHC", 2), made("LBNHC", 1)
    numbers = torch.arange(1024, device="cuda:0", dtype=torch.float32)
    agent = TransferAgent(AgentConfig(name="destination", block_size=8))
    agent.start(ours)
    other.meet(agent)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            doubled = numbers * 2
            agent.directory.put(peer)  # As the watch of the directory does, from a thread of its own.
            met = agent.warm_up(peer.ref)
            end = time.monotonic() + 60
            while not met.done() and time.monotonic() < end:
                time.sleep(0.01)
            result = doubled + 1
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, numbers * 2 + 1)
        moved = agent.fetch(peer.ref, SRC, DST, request_id="r", deadline_s=30).wait(40)
        assert moved.lane == "cuda_ipc/kernel"
        assert torch.equal(by_block(ours[1])[DST], by_block(theirs[1])[SRC])
    finally:
        agent.close()

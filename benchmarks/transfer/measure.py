# SPDX-License-Identifier: Apache-2.0
"""One case: blocks of one order by one method between two processes, timed and compared."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.transfer.peer import Shape, pools, settings, source
from components.errors import MigrateError, TransferError
from components.transfer import KVPool, Strategy, TransferAgent, TransferHandle, TransferResult
from components.transfer.control.record import AgentRecord, decode, encode
from components.transfer.data.base import Steps
from components.transfer.data.nixl import Moved
from components.transfer.layout import Segment
from components.transfer.session.exchange import Exchange
from components.transfer.session.worker import Job

_DEADLINE_S = 20.0


class Row(msgspec.Struct):
    """All repetitions of one case. Seconds and bytes."""

    shape: str
    order: str
    method: str
    block_bytes: int
    """Bytes of a block in one layer."""
    blocks: int
    total_bytes: int
    descriptors: int
    lane: str
    seconds: list[float]
    prep_s: list[float]
    post_s: list[float]
    wire_s: list[float]
    error: str = ""


def order_of(name: str, count: int, total: int, seed: int = 7) -> list[int]:
    """Block numbers: contiguous, fragmented (runs of eight), or random."""
    rng = np.random.default_rng(seed)
    if name == "contiguous":
        return list(range(count))
    if name == "fragmented":
        starts = rng.permutation(total // 8)[: -(-count // 8)] * 8
        return [int(s + i) for s in starts for i in range(8)][:count]
    return [int(block) for block in rng.permutation(total)[:count]]


@dataclass
class Pair:
    """The destination in this process, the source in another."""

    agent: TransferAgent
    parts: list[KVPool]
    peer: AgentRecord
    call: Callable[[str, Any], Any]


@contextmanager
def pair(shape: Shape, blocks: int, device: str, **more: Any) -> Iterator[Pair]:
    """Both agents, connected."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=source, args=(theirs, shape, blocks, device, more), daemon=True)
    process.start()
    agent = TransferAgent(settings(shape, "destination", **more))
    parts = pools(shape, blocks, device, seed=2)
    try:
        agent.start(parts)
        if not ours.poll(300):
            raise TransferError("the source process did not start")
        peer = decode(ours.recv_bytes())
        ours.send_bytes(encode(agent.record))
        agent.directory.put(peer)
        agent.warm_up(peer.ref).wait(60)

        def call(command: str, argument: Any) -> Any:
            ours.send((command, argument))
            return ours.recv()

        yield Pair(agent, parts, peer, call)
        call("end", None)
    finally:
        agent.close()
        process.join(10)
        process.kill()


def fetch(case: Pair, src: list[int], dst: list[int]) -> TransferResult:
    """As the engine does it."""
    return case.agent.fetch(case.peer.ref, src, dst, request_id="bench", deadline_s=_DEADLINE_S).wait(_DEADLINE_S + 5)


def stock(case: Pair, src: list[int], dst: list[int]) -> TransferResult:
    """One READ descriptor for every block of every layer, posted at once: what vLLM's NIXL connector does."""
    exchange = next(b for b in case.agent._assembly.backends if isinstance(b, Exchange))
    theirs = [Segment(*s) for region in case.peer.regions for s in region.segments]
    near, far = np.array(dst, np.int64), np.array(src, np.int64)
    memory = np.concatenate(
        [
            np.stack([m.address + near * m.stride, o.address + far * o.stride, np.full(len(near), m.length)], axis=1)
            for m, o in zip(exchange.segments, theirs, strict=True)
        ]
    )

    def steps() -> Steps:
        moved = Moved()
        yield from exchange.link.move("READ", case.peer, memory, moved, lambda _: None, lambda: lambda: None)
        return exchange.result(moved, Strategy.READ, exchange.lane_of("READ", case.peer))

    handle = TransferHandle()
    case.agent._worker.submit(Job(steps(), handle, time.monotonic() + _DEADLINE_S))
    return handle.wait(_DEADLINE_S + 5)


def measure(
    case: Pair, shape: Shape, order: str, method: str, count: int, repeats: int, total: int, compare: bool = True
) -> Row:
    """Time a method and compare every byte that it moved, by checksum at both sides."""
    src, dst = order_of(order, count, total, 7), order_of(order, count, total, 8)
    row = Row(shape.name, order, method, shape.segment_bytes, count, count * shape.block_bytes, 0, "", [], [], [], [])
    move = stock if method == "stock" else fetch
    try:
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            result = move(case, src, dst)
            took = time.perf_counter() - began
            if repeat == 0:
                continue  # The first one pays for page faults and lazy connections.
            row.seconds.append(took)
            row.prep_s.append(result.prep_s)
            row.post_s.append(result.post_s)
            row.wire_s.append(result.wire_s)
            row.descriptors, row.lane = result.descriptors, f"{result.lane} {result.strategy}"
    except (MigrateError, TimeoutError) as error:
        row.error = str(error)
        return row
    if compare and case.agent.checksums(dst) != case.call("checksums", src):
        row.error = "the bytes differ"
    for pool in case.parts:
        pool.tensor.view(torch.int16)[dst] = 0
    return row


def plain_copy(shape: Shape, count: int, device: str, repeats: int) -> Row:
    """The same bytes from one tensor to another: the ceiling."""
    size = count * shape.block_bytes
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    row = Row(
        shape.name, "contiguous", "plain copy", shape.segment_bytes, count, size, 1, f"memcpy/{device}", [], [], [], []
    )
    for repeat in range(repeats + 1):
        _wait_for(device)
        began = time.perf_counter()
        b.copy_(a)
        _wait_for(device)
        if repeat:
            row.seconds.append(time.perf_counter() - began)
    return row


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gloo(case: Pair, shape: Shape, count: int, repeats: int) -> Row:
    """Gloo send and receive of the same bytes, contiguous, between the two processes."""
    from torch import distributed

    size = count * shape.block_bytes
    row = Row(shape.name, "contiguous", "gloo", shape.segment_bytes, count, size, 1, "gloo", [], [], [], [])
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    import threading

    other = threading.Thread(target=case.call, args=("gloo", (url, size, repeats + 1)))
    other.start()
    distributed.init_process_group("gloo", init_method=url, rank=0, world_size=2)
    data = torch.empty(size, dtype=torch.uint8)
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        distributed.recv(data, 1)
        if repeat:
            row.seconds.append(time.perf_counter() - began)
    distributed.destroy_process_group()
    other.join()
    return row

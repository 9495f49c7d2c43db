# SPDX-License-Identifier: Apache-2.0
"""One case: blocks of one order by one method between two processes, timed and compared.

The destination is this process and the source another one.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.transfer.collective import task, times
from benchmarks.transfer.nvlink import nvlink_bytes
from benchmarks.transfer.peer import Shape, pools, settings, source
from components.errors import MigrateError, TransferError
from components.transfer import KVPool, Strategy, TransferAgent, TransferHandle, TransferResult
from components.transfer.control.record import AgentRecord, decode, encode
from components.transfer.data.base import Steps
from components.transfer.data.nixl import Moved
from components.transfer.layout import Segment
from components.transfer.session.backend import NixlBackend
from components.transfer.session.thread import Job

_DEADLINE_S = 20.0
PLAIN = "plain copy"


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
    plain_s: list[float] = []
    """On a CPU: a plain copy of the same bytes within one process, timed in turn with the transfers."""
    nvlink_bytes: int | None = None
    """Bytes of a transfer that passed the destination GPU's NVLinks; None where nobody counts them."""
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
    device: str
    """Of the destination."""


@contextmanager
def pair(shape: Shape, blocks: int, devices: tuple[str, str], **more: Any) -> Iterator[Pair]:
    """Both agents, connected; ``devices`` are those of the source and of the destination."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=source, args=(theirs, shape, blocks, devices[0], more), daemon=True)
    process.start()
    agent = TransferAgent(settings(shape, "destination", **more))
    parts = pools(shape, blocks, devices[1], seed=2)
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

        yield Pair(agent, parts, peer, call, devices[1])
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
    backend = next(b for b in case.agent.assembly.backends if isinstance(b, NixlBackend))
    theirs = [Segment(*s) for region in case.peer.regions for s in region.segments]
    local, remote = np.array(dst, np.int64), np.array(src, np.int64)
    memory = np.concatenate(
        [
            np.stack(
                [m.address + local * m.stride, o.address + remote * o.stride, np.full(len(local), m.length)], axis=1
            )
            for m, o in zip(backend.side.segments, theirs, strict=True)
        ]
    )

    def steps() -> Steps:
        moved = Moved()
        yield from backend.side.link.move("READ", case.peer, memory, moved, lambda _: None, lambda: lambda: None)
        return backend.result(moved, Strategy.READ, backend.side.lane_of("READ", case.peer))

    handle = TransferHandle()
    case.agent._worker.submit(Job(steps(), handle, time.monotonic() + _DEADLINE_S))
    return handle.wait(_DEADLINE_S + 5)


def measure(
    case: Pair, shape: Shape, order: str, method: str, count: int, repeats: int, total: int, compare: bool = True
) -> Row:
    """Time a method and compare every byte that it moved, by checksum at both sides."""
    src, dst = order_of(order, count, total, 7), order_of(order, count, total, 8)
    row = Row(shape.name, order, method, shape.segment_bytes, count, count * shape.block_bytes, 0, "", [], [], [], [])
    plain = HostCopy(count * shape.block_bytes) if case.device == "cpu" else None
    move = stock if method == "stock" else fetch
    try:
        for repeat in range(repeats + 1):
            if repeat == 1:
                linked = nvlink_bytes(case.device)
            began = time.perf_counter()
            result = move(case, src, dst)
            took = time.perf_counter() - began
            alone = [plain.seconds()] if plain else []
            if repeat == 0:
                continue  # The first one pays for page faults and lazy connections.
            row.seconds.append(took)
            row.plain_s += alone
            row.prep_s.append(result.prep_s)
            row.post_s.append(result.post_s)
            row.wire_s.append(result.wire_s)
            row.descriptors, row.lane = result.descriptors, f"{result.lane} {result.strategy}"
    except (MigrateError, TimeoutError) as error:
        row.error = str(error)
        return row
    after = nvlink_bytes(case.device)
    if linked is not None and after is not None:
        row.nvlink_bytes = (after - linked) // repeats
    if compare and case.agent.checksums(dst) != case.call("checksums", src):
        row.error = "the bytes differ"
    for pool in case.parts:
        words = pool.tensor.view(torch.int16)
        words[dst] = torch.randint_like(words[:1], 1, 1000)
    return row


class HostCopy:
    """A plain copy within this process, timed beside transfers: what else the machine does slows both."""

    def __init__(self, size: int) -> None:
        self._from, self._to = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))

    def seconds(self) -> float:
        """One copy."""
        began = time.perf_counter()
        self._to.copy_(self._from)
        return time.perf_counter() - began


def plain_copy(shape: Shape, count: int, devices: tuple[str, str], repeats: int) -> Row:
    """The same bytes from one tensor to another, by one process: the ceiling. Between GPUs, cudaMemcpyPeer."""
    size = count * shape.block_bytes
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for device in devices)
    lane = f"memcpy/{devices[0]}" if devices[0] == devices[1] else f"memcpy/{devices[0]}-{devices[1]}"
    row = Row(shape.name, "contiguous", PLAIN, shape.segment_bytes, count, size, 1, lane, [], [], [], [])
    for repeat in range(repeats + 1):
        _wait_for(devices)
        if repeat == 1:
            linked = nvlink_bytes(devices[1])
        began = time.perf_counter()
        b.copy_(a)
        _wait_for(devices)
        if repeat:
            row.seconds.append(time.perf_counter() - began)
    after = nvlink_bytes(devices[1])
    if linked is not None and after is not None:
        row.nvlink_bytes = (after - linked) // repeats
    return row


def _wait_for(devices: tuple[str, str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def collective(case: Pair, shape: Shape, count: int, repeats: int, library: str, operation: str) -> Row:
    """The same bytes, contiguous, by torch.distributed between the two processes."""
    size = count * shape.block_bytes
    name = f"{library} {operation}"
    row = Row(shape.name, "contiguous", name, shape.segment_bytes, count, size, 1, library, [], [], [], [])
    what = task(library, operation, size, repeats + 1)
    other = threading.Thread(target=case.call, args=("collective", what))
    other.start()
    linked = nvlink_bytes(case.device)
    try:
        row.seconds = times(what, case.device)[1:]
    except RuntimeError as error:
        row.error = str(error)
    after = nvlink_bytes(case.device)
    if linked is not None and after is not None:
        row.nvlink_bytes = (after - linked) // (repeats + 1)
    other.join(60)
    return row

# SPDX-License-Identifier: Apache-2.0
"""Measures direct descriptors against staging between two processes of this host.

For each block size both processes make pools, large enough to pick runs of neighbouring blocks from, and a NIXL agent
over them. The same blocks move in turn with direct descriptors (READ of host memory, WRITE of GPU memory) and staged;
checksums compare every byte. The other process always ends with this one.
Errors: ``TransferUnavailable`` without NIXL or the transport, ``IntegrityError``, ``TransferError``.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection

import numpy as np
import torch

from components.errors import IntegrityError, TransferError, TransferUnavailable
from components.transfer import lanes
from components.transfer.agent import TransferAgent
from components.transfer.calibration import LaneCalibration, Point, threshold
from components.transfer.config import AgentConfig, KVPool, Strategy, Transport
from components.transfer.control.record import decode, encode
from components.transfer.data.nixl import nixl_is_available
from components.transfer.ids import AgentRef

_LAYERS = 8
_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Grid:
    """The block and run sizes to measure."""

    block_bytes: tuple[int, ...] = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
    """Bytes of a block in one layer (16 tokens: 12 KiB for SmolLM2, 64 KiB for Llama-3-70B)."""
    run_blocks: tuple[int, ...] = (1, 4, 16)
    total_bytes: int = 64 << 20
    repeats: int = 5

    @property
    def points(self) -> int:
        """Number of measurements."""
        return len(self.block_bytes) * len(self.run_blocks)


def calibrate(
    transport: Transport, device: str, grid: Grid | None = None, told: Callable[[Point], None] = lambda _: None
) -> LaneCalibration:
    """Measure this host. ``told`` is called with every point."""
    lanes.check(transport)
    if not nixl_is_available()[0]:
        raise TransferUnavailable(f"there is nothing to calibrate without NIXL: {nixl_is_available()[1]}")
    grid = grid or Grid()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_source, args=(there, transport, device, grid), daemon=True)
    process.start()
    points: list[Point] = []
    lane = ""
    try:
        for size in grid.block_bytes:
            agent = _agent("here", size, transport, device, grid, seed=2)
            try:
                peer = _meet(here, agent)
                for run in grid.run_blocks:
                    point, lane = _measure(here, agent, peer, size, run, device, grid)
                    points.append(point)
                    told(point)
                _send(here, b"next")
            finally:
                agent.close()
        return LaneCalibration(torch.device(device).type, lane, threshold(points), tuple(points))
    finally:
        process.join(10)
        process.kill()


def machine(device: str) -> dict[str, str]:
    """Processor or GPU, and versions."""
    found = {"nixl": metadata.version("nixl"), "torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d")}
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _direct(device: str) -> Strategy:
    return Strategy.WRITE if device.startswith("cuda") else Strategy.READ


def _counts(size: int, grid: Grid) -> tuple[int, int]:
    """Blocks of a transfer, and of a pool (three times as many: runs need gaps)."""
    count = max(max(grid.run_blocks), grid.total_bytes // (size * _LAYERS))
    return count, 3 * count


def _agent(name: str, size: int, transport: Transport, device: str, grid: Grid, seed: int) -> TransferAgent:
    _, total = _counts(size, grid)
    generator = torch.Generator(device=device).manual_seed(seed)
    tensors = [torch.empty((total, size), dtype=torch.uint8, device=device) for _ in range(_LAYERS)]
    parts = [KVPool(f"layer.{n}", tensor.random_(generator=generator), total, 0) for n, tensor in enumerate(tensors)]
    # A limit of one byte makes staging memory available without choosing it.
    agent = TransferAgent(AgentConfig(name=name, backends=("nixl",), transport=transport, direct_bytes=1))
    agent.start(parts)
    return agent


def _source(pipe: Connection, transport: Transport, device: str, grid: Grid) -> None:
    """The other process: offers pools of each block size until the first one sends ``next``."""
    for size in grid.block_bytes:
        agent = _agent("there", size, transport, device, grid, seed=1)
        pipe.send_bytes(encode(agent.record))
        agent.directory.put(decode(pipe.recv_bytes()))
        while (message := pipe.recv_bytes()) != b"next":
            sums = agent.checksums(np.frombuffer(message, np.int64).tolist())
            pipe.send_bytes(np.array(sums, np.int64).tobytes())
        agent.close()


def _measure(
    pipe: Connection, agent: TransferAgent, peer: AgentRef, size: int, run: int, device: str, grid: Grid
) -> tuple[Point, str]:
    count, total = _counts(size, grid)
    src, dst = (runs_of(count, total, run, seed) for seed in (1, 2))
    _send(pipe, np.array(src, np.int64).tobytes())
    sums = tuple(np.frombuffer(_receive(pipe), np.int64).tolist())
    direct = _direct(device)
    seconds: dict[Strategy, list[float]] = {direct: [], Strategy.STAGED: []}
    lane = ""
    for repeat in range(grid.repeats + 1):
        for strategy, times in seconds.items():
            began = time.perf_counter()
            moving = agent.fetch(peer, src, dst, request_id="calibrate", deadline_s=_DEADLINE_S, strategy=strategy)
            done = moving.wait(2 * _DEADLINE_S)
            if repeat:
                times.append(time.perf_counter() - began)
            elif agent.checksums(dst) != sums:
                raise IntegrityError(f"{strategy} over {done.lane}: other bytes arrived")
            lane = done.lane if strategy is direct else lane
    middle = {strategy: statistics.median(each) for strategy, each in seconds.items()}
    point = Point(size, run, count * size * _LAYERS, middle[direct], middle[Strategy.STAGED])
    return point, lane.removeprefix("nixl/ucx").removeprefix("/")


def _meet(pipe: Connection, agent: TransferAgent) -> AgentRef:
    record = decode(_receive(pipe))
    _send(pipe, encode(agent.record))
    agent.directory.put(record)
    agent.warm_up(record.ref).wait(60)
    return record.ref


def _send(pipe: Connection, data: bytes) -> None:
    try:
        pipe.send_bytes(data)
    except OSError as error:
        raise TransferError("the other process has ended; its log is above") from error


def _receive(pipe: Connection) -> bytes:
    try:
        if not pipe.poll(120):
            raise TransferError("the other process does not answer")
        return pipe.recv_bytes()
    except (EOFError, OSError) as error:
        raise TransferError("the other process has ended; its log is above") from error


def runs_of(count: int, total: int, run: int, seed: int) -> list[int]:
    """``count`` blocks in scattered runs of ``run`` neighbours, no two runs touching."""
    slots = total // (run + 1)
    starts = np.random.default_rng(seed).permutation(slots)[: -(-count // run)] * (run + 1)
    return [int(start) + at for start in starts for at in range(run)][:count]

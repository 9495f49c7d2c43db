# SPDX-License-Identifier: Apache-2.0
"""Whole endpoints with arbitrary input: they answer, lose no block and touch only their pools' memory.

The worker runs in virtual time; the transfer session has a link that only records requested moves.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Generator
from random import Random
from typing import Any

import msgspec
import torch

from components.engine.paged import PagedEngine, PagedOptions
from components.errors import MigrateError, WorkerLost
from components.migration.faces import PROTOCOL_FACE
from components.migration.legs import Leg
from components.migration.options import Options
from components.migration.repeats import Repeat
from components.migration.requests import Requests
from components.transfer.config import AgentConfig, KVPool
from components.transfer.control.directory import Directory
from components.transfer.regions import regions_of
from components.transfer.session.backend import NixlBackend
from components.transfer.session.side import Side
from components.transfer.shares import Shares
from components.worker.control import Control
from components.worker.state import WorkerStatus
from tests.faults import clock
from tests.faults.agent import VirtualAgent, Wire
from tests.faults.model import quiet, request
from tests.fuzz.inputs import Target
from tests.fuzz.samples import R, agent_record
from tests.fuzz.wire import BLOCKS, sealed


def _envelope(data: bytes) -> dict[str, str]:
    return {"m": base64.b64encode(data).decode()}


def worker(data: bytes) -> None:
    """A worker with a request ``r`` of its own and a peer gets a call, twice."""
    with quiet():
        clock.run(_worker(data), _unhandled)


def _unhandled(text: str) -> None:
    raise AssertionError(text)


async def _worker(data: bytes) -> None:
    wire = Wire()
    wire.chance = Random(1)
    sizes: dict[str, Any] = {"num_blocks": 24, "block_size": 4, "max_model_len": 60, "vocab_size": 100, "step_s": 0.01}
    made = [
        PagedEngine(PagedOptions({"name": name}, lease_s=5.0, copy_deadline_s=2.0, **sizes), agents)
        for name in ("peer", "mine")
        for agents in [lambda config: VirtualAgent(wire, config)]  # type: ignore[list-item]
    ]
    infos = [await engine.start() for engine in made]
    peer, engine = made
    # Messages of the corpus name the peer's life as "live".
    data = data.replace(b"\xa4live", msgspec.msgpack.encode(str(peer.parts.agent.ref.epoch)))
    # And the fingerprint of both as "f".
    data = data.replace(b"\xa1f", msgspec.msgpack.encode(infos[1].fingerprint))
    requests = Requests(engine, _Nobody(), 1, infos[1].fingerprint, Options(orphan_s=5.0))
    control = Control(requests, WorkerStatus(requests, "mine", "decode", infos[1], _Endpoint()))
    sweep = asyncio.ensure_future(requests.sweep())
    body = request(R, (1, 2, 3), 30)
    leg = Leg(R, R, body.prompt_token_ids, bytes, max_tokens=30)
    own = asyncio.ensure_future(_all(requests.serve(leg, engine.generate(body), PROTOCOL_FACE)))
    await asyncio.sleep(0.05)
    for _ in range(2):
        await asyncio.wait((asyncio.ensure_future(_all(control.serve(_envelope(data)))),), timeout=10.0)
        await asyncio.sleep(0.05)
    # Everything that was begun ends by itself: by its length, its lease or because nobody reads it.
    await asyncio.sleep(90.0)
    await asyncio.wait((own,), timeout=20.0)
    await engine.check_integrity()
    stats, rows = await engine.report()
    if stats.free_blocks != stats.total_blocks:
        raise AssertionError(f"blocks are left: {stats} {rows}")
    sweep.cancel()
    for engine in made:
        await engine.stop()


async def _all(stream: Any) -> list[Any]:
    try:
        return [item async for item in stream]
    except (MigrateError, Repeat):
        return []


class _Nobody:
    """``Peers`` of a worker that is alone."""

    def instances(self) -> list[int]:
        """Nobody."""
        return []

    siblings = prefill_workers = instances

    async def call(self, instance: int, call: Any, timeout_s: float = 20.0) -> Any:
        """Nobody answers."""
        raise WorkerLost(f"worker {instance} is not here")

    async def attach(self, *_: Any) -> AsyncGenerator[Any, None]:
        """Nobody answers."""
        raise WorkerLost("nobody is here")
        yield


class _Endpoint:
    """Dynamo's registration of a worker."""

    async def unregister_endpoint_instance(self) -> None:
        """It takes nothing new."""

    async def register_endpoint_instance(self) -> None:
        """It does again."""


class _Link:
    """Stands in for ``NixlLink``: the peer sends ``inbox``; moves are checked, not made."""

    memory = "DRAM"

    def __init__(self, sender: str, inbox: bytes, pools: list[KVPool]) -> None:
        self._inbox = {sender: [inbox]}
        self._pools = [(pool.tensor.data_ptr(), pool.tensor.nbytes) for pool in pools]

    def poll(self) -> dict[str, list[bytes]]:
        """All messages, once."""
        found, self._inbox = self._inbox, {}
        return found

    def notify(self, peer: Any, data: bytes) -> None:
        """Nobody listens."""

    def move(self, operation: str, peer: Any, memory: Any, *_: Any) -> Generator[bool, None, None]:
        """Raise for memory of ours outside of the pools."""
        for near, _far, size in memory.tolist():
            if not any(start <= near and near + size <= start + length for start, length in self._pools):
                raise AssertionError(f"{operation} of {size} bytes at {near}, outside of the pools")
        yield True


def exchange(data: bytes) -> None:
    """A transfer session of an agent with eight blocks gets a peer's message."""
    peer = agent_record()
    pools = [KVPool(f"layer.{n}", torch.zeros((BLOCKS, 4, 2)), BLOCKS, 0) for n in range(2)]
    regions = regions_of(pools)
    link, directory = _Link(peer.key, sealed(data, peer.key, "mine/mine"), pools), Directory()
    directory.put(peer)
    config = AgentConfig(name="mine", block_size=4)
    served = NixlBackend(config, Side("mine", "mine", link, Shares(regions), None, "host"), directory)  # type: ignore[arg-type]
    for service in served.progress():
        for _ in range(5):
            if next(service, None) is None:
                break
        service.close()
    if served.inboxes:
        raise AssertionError(f"inboxes are left: {served.inboxes}")


TARGETS = [Target("worker", worker), Target("exchange", exchange)]

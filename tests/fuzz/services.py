# SPDX-License-Identifier: Apache-2.0
"""Whole endpoints that get anything: they answer, lose no block and touch no memory but their pools.

The worker and the router run on the virtual network of ``tests.faults``; the transfer session has a link that only
notes what it is asked to move.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Generator
from random import Random
from typing import Any

import msgspec
import torch

from components.engine.paged import PagedEngine, PagedOptions
from components.transfer.calibration import Calibration
from components.transfer.config import AgentConfig, KVPool
from components.transfer.control.directory import Directory
from components.transfer.regions import regions_of
from components.transfer.session.exchange import Exchange
from components.worker.service import WorkerService
from tests.faults import clock
from tests.faults.agent import VirtualAgent, Wire
from tests.faults.cluster import Cluster, payload, quiet
from tests.faults.network import Context, Weather
from tests.fuzz.inputs import Target
from tests.fuzz.samples import R, agent_record
from tests.fuzz.wire import BLOCKS, sealed


def _envelope(data: bytes) -> dict[str, str]:
    return {"m": base64.b64encode(data).decode()}


def worker(data: bytes) -> None:
    """A worker with a request ``r`` of its own and a peer gets a message at both endpoints."""
    with quiet():
        clock.run(_worker(data), _unhandled)


def _unhandled(text: str) -> None:
    raise AssertionError(text)


async def _worker(data: bytes) -> None:
    from components.engine.protocol import GenerateRequest, Sampling

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
    data = data.replace(b"\xa4live", msgspec.msgpack.encode(str(peer._live.agent.ref.epoch)))
    service = WorkerService(engine, infos[1])
    own = asyncio.ensure_future(_all(engine.generate(GenerateRequest(R, (1, 2, 3), Sampling(max_tokens=30)))))
    await asyncio.sleep(0.05)
    context = Context()
    streaming = asyncio.ensure_future(_all(service.generate(_envelope(data), context)))
    for _ in range(2):
        async for answer in service.control(_envelope(data)):
            answer["m"]
        await asyncio.sleep(0.05)
    # Everything that was begun ends by itself: by its length, its lease or its caller's leaving.
    await asyncio.sleep(20.0)
    context.stop()
    await asyncio.wait_for(streaming, 20.0)
    await asyncio.wait_for(own, 20.0)
    await engine.check_integrity()
    stats = await engine.stats()
    if stats.free_blocks != stats.total_blocks:
        raise AssertionError(f"blocks are left: {stats} {await engine.requests()}")
    await engine.check_health()
    for engine in made:
        await engine.stop()


async def _all(stream: Any) -> list[Any]:
    return [item async for item in stream]


def router(data: bytes) -> None:
    """A router with two workers and a running request ``r`` gets a call."""
    with quiet():
        clock.run(_router(data), _unhandled)


async def _router(data: bytes) -> None:
    cluster = Cluster(Random(1), Weather(), prefill=0, decode=2, num_blocks=60)
    await cluster.start()
    asking = cluster.job(cluster.ask("r", payload([1, 2, 3], 20, None)))
    await asyncio.sleep(0.1)
    async for answer in cluster.router.control(_envelope(data)):
        answer["m"]
    done = await asyncio.wait_for(asking, 60.0)
    if done.error or len(done.tokens) != 20:
        raise AssertionError(f"the request that was running ended after {len(done.tokens)} tokens: {done.error}")
    await cluster.stop()


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
    pools = [KVPool(f"layer.{n}", torch.zeros((BLOCKS, 4, 2)), BLOCKS, 0, token_dim=1) for n in range(2)]
    regions = regions_of(pools)
    link, directory = _Link(peer.key, sealed(data, peer.key, "mine/mine"), pools), Directory()
    directory.put(peer)
    config = AgentConfig(name="mine", block_size=4)
    served = Exchange(config, "mine", link, regions, None, directory, "host", Calibration())  # type: ignore[arg-type]
    for service in served.progress():
        for _ in range(5):
            if next(service, None) is None:
                break
        service.close()
    if served.inboxes:
        raise AssertionError(f"inboxes are left: {served.inboxes}")


TARGETS = [Target("worker", worker), Target("router", router), Target("exchange", exchange)]

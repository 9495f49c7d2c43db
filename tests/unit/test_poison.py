# SPDX-License-Identifier: Apache-2.0
"""Poisoned KV data are refused, counted and computed again. Without the check the tokens would be wrong.

Each case runs twice: with and without the check.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from components.engine.kv import Frozen
from components.engine.paged import PagedEngine
from components.engine.paged.landing import LandingZone
from components.engine.protocol import GenerateRequest
from components.errors import MigrateError
from components.transfer import AgentConfig, KVPool, TransferAgent
from components.transfer.agent import TransferAgent as Agent
from components.transfer.control import record
from components.transfer.control.directory import Directory
from components.transfer.control.record import AgentRecord
from components.transfer.data import local, tcp
from components.transfer.data.base import Copy, Steps
from tests.paged import collect, engines, new_engine, request
from tests.unit.test_paged_move import R, landing, take, unmoved

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Moved:
    """What became of a request that was moved."""

    tokens: list[int]
    at_source: int
    """How many of them came from there."""
    error: str
    """Why its blocks were not used; empty when they were."""
    refused: dict[str, int]


async def move(
    src: PagedEngine,
    dst: PagedEngine,
    origin: GenerateRequest,
    between: Callable[[Frozen], Awaitable[None]] | None = None,
) -> Moved:
    """Freeze at the source, let ``between`` do its worst, then take the request over at the destination."""
    stream = src.generate(origin)
    before = await take(stream, 5)
    frozen = await src.freeze(R)
    if between is not None:
        await between(frozen)
    there = dst.generate(landing(origin, frozen.output_token_ids, frozen.offer))
    first = asyncio.ensure_future(anext(there))
    await asyncio.sleep(0)
    while (await dst.landing_status(R)).in_flight:
        await asyncio.sleep(0.001)
    await dst.commit(R, frozen)
    tokens = list((await first).token_ids)
    status = await dst.landing_status(R)
    tokens += (await collect(there))[0]
    await stream.aclose()  # type: ignore[attr-defined]
    refused = (await dst.report())[0].kv_refused
    assert before == list(frozen.output_token_ids[: len(before)])
    return Moved(
        [*frozen.output_token_ids, *tokens],
        len(frozen.output_token_ids),
        status.error[0] if status.error else "",
        refused,
    )


def unchecked_bytes(patch: Patch) -> None:
    patch.setattr(LandingZone, "_first_wrong_block", lambda *_: None)


def assert_refused(moved: Moved, code: str, expected: list[int]) -> None:
    assert moved.tokens == expected
    assert moved.error == code
    assert moved.refused[code] >= 1


@pytest.mark.parametrize(("integrity", "place"), [("tail", -1), ("full", 0)])
async def test_a_bit_that_flips_in_flight(monkeypatch: Patch, integrity: str, place: int) -> None:
    expected = await unmoved(length=30)
    copied = local._copy_rows

    def flip(copy: Copy, remote: list[torch.Tensor], lane: str) -> Steps:
        result = yield from copied(copy, remote, lane)
        for row in copy.share.rows:
            row[int(copy.local[place]), 0] ^= 1
        return result

    monkeypatch.setattr(local, "_copy_rows", flip)
    async with engines(2, integrity=integrity) as [src, dst]:
        assert_refused(await move(src, dst, request(length=30, count=40)), "integrity", expected)
    unchecked_bytes(monkeypatch)
    async with engines(2, integrity=integrity) as [src, dst]:
        assert (await move(src, dst, request(length=30, count=40))).tokens != expected


async def test_a_source_block_that_was_freed_and_used_by_another_request(monkeypatch: Patch) -> None:
    expected = await unmoved(length=30)

    async def play() -> Moved:
        async with engines(2, num_blocks=30) as [src, dst]:

            async def reuse(_: Frozen) -> None:
                # As when the source's lease is over, its owner having been silent for too long.
                await src.abort(R)
                await collect(src.generate(request("somebody else", 90, 20)))

            return await move(src, dst, request(length=30, count=40), reuse)

    assert_refused(await play(), "integrity", expected)
    unchecked_bytes(monkeypatch)
    assert (await play()).tokens != expected


@pytest.mark.parametrize("length", [1, 5, 9, 17, 30, 60])
async def test_a_source_whose_blocks_were_given_away_in_part(monkeypatch: Patch, length: int) -> None:
    expected = await unmoved(length=30)

    async def play() -> Moved:
        async with engines(2, num_blocks=30) as [src, dst]:

            async def reuse(_: Frozen) -> None:
                await src.abort(R)
                # However few blocks somebody else takes, the last ones are among them: ``tail`` sees it.
                await collect(src.generate(request("somebody else", length, 1)))

            return await move(src, dst, request(length=30, count=40), reuse)

    assert (await play()).tokens == expected
    unchecked_bytes(monkeypatch)
    assert (await play()).tokens != expected


async def test_a_source_that_has_restarted(monkeypatch: Patch) -> None:
    expected = await unmoved(length=30)

    async def play() -> Moved:
        namespace = uuid.uuid4().hex
        # No checksums: the epoch alone has to refuse.
        made = [new_engine(namespace, name, integrity="off") for name in ("source", "destination", "source")]
        src, dst, reborn = made
        await src.start()
        await dst.start()

        async def restart(_: Frozen) -> None:
            await src.stop()
            await reborn.start()
            await collect(reborn.generate(request("somebody else", 60, 20)))

        try:
            return await move(src, dst, request(length=30, count=40), restart)
        finally:
            for engine in made:
                await engine.stop()

    assert_refused(await play(), "stale_epoch", expected)

    def any_life(self: Agent, ref: Any, end: float) -> Any:
        yield True
        return self.directory.get(ref.name)

    monkeypatch.setattr(Agent, "_peer", any_life)
    assert (await play()).tokens != expected


def test_late_news_of_an_older_life_are_ignored_and_a_clock_that_was_set_back_is_not_believed() -> None:
    origin = example()

    def life(epoch: str, started: float) -> AgentRecord:
        return msgspec.structs.replace(origin, epoch=epoch, started=started)

    directory = Directory()
    directory.put(life("second", 2.0))
    directory.put(life("first", 1.0), from_notice=True)
    assert directory.get("agent") == life("second", 2.0)
    # The store has the order: this life began on a machine whose clock is behind.
    directory.put(life("third", 0.5))
    assert directory.get("agent") == life("third", 0.5)


async def test_blocks_of_another_model(monkeypatch: Patch) -> None:
    async def play() -> tuple[Moved, list[int]]:
        async with engines(1, integrity="off") as [src]:
            dst = new_engine(src.options.agent["namespace"], "other", integrity="off", model="another model")
            await dst.start()
            scheduler = dst.parts.scheduler
            # The other model's KV of the same tokens has other bytes.
            scheduler.kv.spread = scheduler.kv.spread * np.uint64(3)
            try:
                moved = await move(src, dst, request(length=30, count=40))
                before = moved.tokens[: moved.at_source]
                own = request(length=30, count=40, output_token_ids=tuple(before))
                return moved, before + (await collect(dst.generate(own)))[0]
            finally:
                await dst.stop()

    moved, expected = await play()
    assert_refused(moved, "incompatible_layout", expected)
    monkeypatch.setattr(AgentRecord, "require_pairable", lambda self, peer: None)
    moved, expected = await play()
    assert moved.tokens != expected


async def test_rows_that_are_cut_off(monkeypatch: Patch) -> None:
    expected = await unmoved(length=30)
    send_rows = tcp.TcpBackend._send_rows

    def cut_off(self: Any, sock: socket.socket, *rest: Any) -> int:
        class Half:
            settimeout = sock.settimeout

            def sendall(self, data: memoryview) -> None:
                sock.sendall(data[: len(data) // 2])
                raise ConnectionError("cut off")

        return send_rows(self, Half(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tcp.TcpBackend, "_send_rows", cut_off)

    async def play() -> Moved:
        namespace = uuid.uuid4().hex
        made = [new_engine(namespace, name, integrity="off") for name in ("source", "destination")]
        for engine in made:
            engine.options.agent["backends"] = ("tcp",)
            await engine.start()
        try:
            return await move(*made, request(length=30, count=40))
        finally:
            for engine in made:
                await engine.stop()

    moved = await play()
    assert (moved.tokens, moved.error) == (expected, "transfer")

    def all_is_well(sock: socket.socket, view: memoryview, end: float) -> None:
        done = 0
        while done < len(view) and (got := sock.recv_into(view[done:])):
            done += got

    monkeypatch.setattr(tcp, "read_into", all_is_well)
    assert (await play()).tokens != expected


def example() -> AgentRecord:
    """A real agent's record."""
    agent = TransferAgent(AgentConfig(name="agent", namespace=uuid.uuid4().hex, backends=("local",)))
    agent.start([KVPool(f"layer.{n}", torch.zeros((8, 4, 2)), 8, 0) for n in range(2)])
    try:
        return agent.record
    finally:
        agent.close()


def test_a_record_that_is_cut_off_is_refused_wherever_the_cut_is() -> None:
    data = record.encode(example())
    for length in range(len(data)):
        with pytest.raises(MigrateError, match="not an agent record"):
            record.decode(data[:length])


def test_a_record_without_one_of_its_pools_is_refused() -> None:
    whole = example()
    with pytest.raises(MigrateError, match="lay their KV blocks out differently"):
        whole.require_pairable(msgspec.structs.replace(whole, regions=whole.regions[:1]))

# SPDX-License-Identifier: Apache-2.0
"""Blocks between engines of unequal tensor-parallel sizes: which ranks exchange which heads, every layout, every lane.

The KV cache of a whole model is cut into the ranks of two engines. After the move each rank of the target has exactly
its cut of the source's blocks, and all other bytes are as they were.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from components.errors import ConfigError, IncompatibleLayout
from components.transfer import AgentConfig, KVPool, TransferAgent
from components.transfer.assemble import Assembly
from components.transfer.heads import Rank, Unit, held, places, server, taken, units_of
from tests.unit.test_layouts import LANES

BLOCKS, LAYERS, TOKENS, CONTENT = 9, 2, 4, 8
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
SIZES = [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1)]
SRC, DST = [7, 0, 8, 3], [2, 5, 0, 6]


@pytest.mark.parametrize("sizes", [*SIZES, (2, 2), (2, 8), (8, 2), (4, 4)])
@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
def test_a_rank_takes_each_of_its_heads_from_one_rank_that_has_it(heads: int, sizes: tuple[int, int]) -> None:
    sources, targets = sizes
    for number in range(targets):
        target = Rank(number, targets)
        found = [head for s in range(sources) for head in taken(heads, target, Rank(s, sources))]
        assert found == list(held(heads, target))
        for head in held(heads, target):
            assert head in held(heads, Rank(server(Unit(heads, head), target, sources), sources))
        if sources == targets:
            assert taken(heads, target, target) == held(heads, target)


def test_copies_of_a_head_are_read_from_different_ranks() -> None:
    assert [server(Unit(1, 0), Rank(number, 4), 2) for number in range(4)] == [0, 0, 1, 1]
    assert [server(Unit(2, n // 2), Rank(n, 4), 4) for n in range(4)] == [0, 1, 2, 3]
    assert server(Unit(1, 0), Rank(0, 1), 4) == 0


def test_units_of_pools_with_different_heads_are_found_at_the_source() -> None:
    assert units_of([4, 1, 4], Rank(1, 2)) == [Unit(1, 0), Unit(4, 2), Unit(4, 3)]
    assert places([4, 1], Rank(0, 1), 2) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]


class Engine:
    """A rank's agents hold cuts of one KV cache; ``heads`` of it in all."""

    def __init__(self, name: str, size: int, layout: str, heads: int, seed: int, namespace: str, **more: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.size = heads, size
        self.whole = torch.randint(-128, 128, (LAYERS, BLOCKS, heads, TOKENS, CONTENT), generator=generator).to(
            torch.int8
        )
        self.pools = [self._pools(layout, Rank(number, size)) for number in range(size)]
        for pool in (pool for pools in self.pools for pool in pools):
            pool.tensor.share_memory_()
        self.agents = []
        for number, pools in enumerate(self.pools):
            config = AgentConfig(
                name=f"{name}-{number}", namespace=namespace, block_size=TOKENS, tp_rank=number, tp_size=size, **more
            )
            self.agents.append(TransferAgent(config))
            self.agents[-1].start(pools)

    def cut(self, rank: Rank) -> torch.Tensor:
        mine = held(self.heads, rank)
        return self.whole[:, :, mine.start : mine.stop]

    def _pools(self, layout: str, rank: Rank) -> list[KVPool]:
        cut = self.cut(rank)
        made = torch.empty([cut.shape["LBHNC".index(axis)] for axis in layout], dtype=torch.int8)
        tensor = made.permute([layout.index(axis) for axis in "LBHNC"])
        tensor.copy_(cut)
        return [
            KVPool(f"layer.{n}", layer.view(torch.bfloat16), BLOCKS, 0, self.heads, 1) for n, layer in enumerate(tensor)
        ]

    def now(self, number: int) -> torch.Tensor:
        return torch.stack([pool.tensor.view(torch.int8) for pool in self.pools[number]])

    def close(self) -> None:
        for agent in self.agents:
            agent.close()


class Two:
    """Engines of two sizes."""

    def __init__(self, sizes: tuple[int, int], layout: str, heads: int, **more: Any) -> None:
        namespace = uuid.uuid4().hex
        more = {"direct_bytes": 1 << 40} | more
        self.src = Engine("src", sizes[0], layout, heads, 1, namespace, **more)
        self.dst = Engine("dst", sizes[1], layout, heads, 2, namespace, **more)

    def move(self, lane: str = "local", src: list[int] = SRC, dst: list[int] = DST) -> None:
        reported, strategy = LANES[lane]
        for agent in self.dst.agents:
            whole = agent.assembly
            chosen = [backend for backend in whole.backends if backend.lane == reported]
            for backend in chosen:
                backend.strategy = strategy
            agent.assembly = Assembly(chosen, whole.record, whole.shares)
            for source in agent.sources(self.src.size):
                ref = self.src.agents[source].ref
                handle = agent.fetch(ref, src, dst, request_id="r", deadline_s=20)
                assert handle.wait(30).lane.startswith(reported)
            agent.assembly = whole

    def wrong(self, number: int, src: list[int] = SRC, dst: list[int] = DST) -> list[int]:
        """Blocks of a rank of the target whose checksums are not those of the source."""
        agent = self.dst.agents[number]
        sums = [each.checksums(src) for each in self.src.agents]
        units = [each.checksum_units for each in self.src.agents]
        here, found = agent.checksums(dst), []
        for n, block in enumerate(dst):
            ranks = [each[n * count : (n + 1) * count] for each, count in zip(sums, units, strict=True)]
            mine = agent.checksum_units
            if agent.expected(ranks) != here[n * mine : (n + 1) * mine]:
                found.append(block)
        return found

    def close(self) -> None:
        for agents in (self.dst, self.src):
            agents.close()


@pytest.fixture(scope="module", params=[(s, h) for h in (8, 2, 1) for s in SIZES], ids=lambda p: f"{p[0]}-{p[1]} heads")
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    pair = Two(request.param[0], "LBNHC", request.param[1])
    yield pair
    pair.close()


def check(pair: Two, lane: str) -> None:
    for number in range(pair.dst.size):
        for pool, cut in zip(pair.dst.pools[number], pair.dst.cut(Rank(number, pair.dst.size)), strict=True):
            pool.tensor.view(torch.int8).copy_(cut)
    assert any(pair.wrong(number) for number in range(pair.dst.size))
    pair.move(lane)
    for number in range(pair.dst.size):
        rank = Rank(number, pair.dst.size)
        expected = pair.dst.cut(rank).clone()
        first = held(pair.src.heads, rank)
        expected[:, DST] = pair.src.whole[:, SRC][:, :, first.start : first.stop]
        assert torch.equal(pair.dst.now(number), expected)
        assert pair.wrong(number) == []


@pytest.mark.parametrize("lane", LANES)
def test_every_rank_gets_its_heads_and_nothing_else(two: Two, lane: str) -> None:
    check(two, lane)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(1, 2), (4, 2)])
def test_every_layout_is_cut_by_heads(layout: str, sizes: tuple[int, int]) -> None:
    pair = Two(sizes, layout, 4, backends=("local", "tcp"))
    for lane in ("local", "tcp"):
        check(pair, lane)
    pair.close()


def test_one_changed_byte_of_one_head_is_found_by_the_rank_that_has_it() -> None:
    pair = Two((1, 2), "LBNHC", 4, backends=("local",))
    pair.move()
    pair.dst.pools[1][1].tensor.view(torch.int8)[DST[2], 0, 3, 5] ^= 1
    assert pair.wrong(0) == [] and pair.wrong(1) == [DST[2]]
    pair.close()


@pytest.mark.parametrize("layout", ["LBHNC", "BHLNC"])
def test_heads_that_lie_together_move_as_one_piece(layout: str) -> None:
    pair = Two((1, 2), layout, 4, backends=("local",))
    share = pair.dst.agents[1].assembly.shares.taken(pair.src.agents[0].record)
    # All layers of two heads, or two heads of each layer.
    assert len(share.local) == {"LBHNC": LAYERS, "BHLNC": 1}[layout]
    assert share.block_bytes == LAYERS * 2 * TOKENS * CONTENT and not share.whole
    pair.close()


def test_moved_there_and_back_the_bytes_are_the_same() -> None:
    there, back = Two((1, 2), "LBNHC", 4, backends=("local",)), Two((2, 1), "LBNHC", 4, backends=("local",))
    there.move()
    for number in range(2):
        for pool, moved in zip(back.src.pools[number], there.dst.now(number), strict=True):
            pool.tensor.view(torch.int8).copy_(moved)
    back.move("local", DST, SRC)
    assert torch.equal(back.dst.now(0)[:, SRC], there.src.whole[:, SRC])
    for pair in (there, back):
        pair.close()


def agent_of(name: str, namespace: str, pools: list[KVPool], rank: Rank) -> TransferAgent:
    agent = TransferAgent(AgentConfig(name, namespace=namespace, backends=("local",), tp_rank=rank[0], tp_size=rank[1]))
    agent.start(pools)
    return agent


def test_pools_that_do_not_divide_move_between_equal_sizes_only() -> None:
    namespace = uuid.uuid4().hex
    src = agent_of("src", namespace, [KVPool("state", torch.zeros(4, 32), 4, 0)], Rank(0, 1))
    dst = agent_of("dst", namespace, [KVPool("state", torch.zeros(4, 16), 4, 0)], Rank(0, 2))
    assert dst.checksum_units == 1
    with pytest.raises(IncompatibleLayout, match="do not divide into as many ranks"):
        dst.sources(1)
    with pytest.raises(IncompatibleLayout, match="0 of 2 and 0 of 1: their KV caches do not divide into heads"):
        dst.fetch(src.ref, [1], [1], request_id="r", deadline_s=5).wait(9)
    for agent in (src, dst):
        agent.close()


@pytest.mark.parametrize("other", [(4, 4, 2, 16), (4, 2, 4, 8)], ids=["content", "tokens"])
def test_heads_of_another_shape_are_refused(other: tuple[int, ...]) -> None:
    namespace = uuid.uuid4().hex
    src = agent_of("src", namespace, [KVPool("layer", torch.zeros(4, 2, 2, 8), 4, 0, 2, 1)], Rank(0, 1))
    shape = (other[0], 1, *other[2:])
    dst = agent_of("dst", namespace, [KVPool("layer", torch.zeros(shape), 4, 0, 2, 1)], Rank(0, 2))
    with pytest.raises(IncompatibleLayout, match="different shapes"):
        dst.fetch(src.ref, [1], [1], request_id="r", deadline_s=5).wait(9)
    for agent in (src, dst):
        agent.close()


def test_a_pool_with_other_heads_than_its_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pool layer has 3 KV heads; rank 0 of 2 holds 2 of 4"):
        agent_of("a", "n", [KVPool("layer", torch.zeros(4, 3, 2, 8), 4, 0, 4, 1)], Rank(0, 2))


def test_overlaid_groups_divide_when_they_are_alike_and_not_otherwise() -> None:
    whole = torch.zeros(4, 4, 8, dtype=torch.int8)
    alike = [KVPool(name, whole, 4, 0, 4, 1) for name in ("full", "sliding")]
    other = [alike[0], KVPool("small", whole[:, :2], 4, 0, 2, 1)]
    for pools, divides in ((alike, True), (other, False)):
        agent = agent_of("a", uuid.uuid4().hex, pools, Rank(0, 1))
        assert bool(agent.record.pools) is divides
        agent.close()


_KERNEL = """
import torch
from components.transfer import KVPool
from components.transfer.checksum import _STEP, BlockChecksums
from components.transfer.data import kernels
from components.transfer.heads import Rank
from components.transfer.regions import regions_of
from components.transfer.shares import Shares, divided

raw = torch.randint(-128, 128, (2, 9, 4, 4, 16), dtype=torch.int8)
pools = [KVPool(f"layer.{n}", layer.transpose(1, 2).view(torch.bfloat16), 9, 0, 4, 1) for n, layer in enumerate(raw)]
regions = regions_of(pools)
sums = BlockChecksums(Shares(regions, Rank(), divided(pools, regions, Rank())))
parts = [part for each in sums._summed for part in each.parts]
found = kernels.summer(parts, sums.units, _STEP)(torch.tensor([3, 0, 8])) & 0x7FFF_FFFF_FFFF_FFFF
assert (len(parts), sums.units) == (32, 4) and tuple(found.flatten().tolist()) == sums.of([3, 0, 8])
"""


def test_the_kernel_of_gpus_gives_the_sums_of_the_host() -> None:
    pytest.importorskip("triton")
    # Triton decides at its import whether it compiles or interprets.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _KERNEL], env=environment, check=True, timeout=120)

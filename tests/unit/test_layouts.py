# SPDX-License-Identifier: Apache-2.0
"""Every layout of KV pools over every lane of a host without GPUs; all bytes of the storages are compared."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import torch

from components.errors import ConfigError, IncompatibleLayout
from components.transfer import AgentConfig, KVPool, Strategy, TransferAgent
from components.transfer.assemble import Assembly
from components.transfer.config import TransferResult
from components.transfer.data.kernels import copier
from components.transfer.layout import block_bytes, locate
from components.transfer.regions import regions_of, storages_of
from tests.layouts import BLOCKS, LAYERS, LAYOUTS, PIECES, storage

CPU = torch.device("cpu")
LANES = {
    "shm/mapped": ("shm/mapped", Strategy.AUTO),
    "nixl, direct": ("nixl/ucx", Strategy.READ),
    "nixl, staged": ("nixl/ucx", Strategy.STAGED),
    "local": ("local/memcpy", Strategy.AUTO),
    "tcp": ("tcp/sockets", Strategy.AUTO),
}


def whole(pools: list[KVPool]) -> list[torch.Tensor]:
    """All bytes of the pools' storages."""
    found = {pool.tensor.untyped_storage().data_ptr(): pool.tensor.untyped_storage() for pool in pools}
    return [torch.empty(0, dtype=torch.uint8).set_(each) for each in found.values()]


def by_block(pool: KVPool) -> torch.Tensor:
    """The pool as bytes, blocks first."""
    return pool.tensor.movedim(pool.block_dim, 0).view(torch.int8)


class Two:
    """Two agents of one layout, each with every lane."""

    def __init__(self, ours: list[KVPool], theirs: list[KVPool], **more: object) -> None:
        namespace = uuid.uuid4().hex
        self.pools = {"src": theirs, "dst": ours}
        self.agents = {}
        for name, parts in self.pools.items():
            agent = self.agents[name] = TransferAgent(
                AgentConfig(name=name, namespace=namespace, block_size=8, direct_bytes=1 << 40, **more)  # type: ignore[arg-type]
            )
            agent.start(parts)
        self.dst = self.agents["dst"]
        self.assembly = self.dst.assembly

    def fetch(self, src: list[int], dst: list[int], lane: str, strategy: Strategy = Strategy.AUTO) -> TransferResult:
        chosen = [each for each in self.assembly.backends if each.lane == lane]
        self.dst.assembly = Assembly(chosen, self.assembly.record, self.assembly.shares)
        for backend in chosen:
            backend.strategy = strategy  # type: ignore[attr-defined]
        return self.dst.fetch(self.agents["src"].ref, src, dst, request_id="r", deadline_s=20).wait(30)

    def close(self) -> None:
        self.dst.assembly = self.assembly
        for agent in self.agents.values():
            agent.close()


@pytest.fixture(scope="module", params=LAYOUTS)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    ours, theirs = LAYOUTS[request.param](CPU), LAYOUTS[request.param](CPU)
    for pool in (*ours, *theirs):
        pool.tensor.share_memory_()
    pair = Two(ours, theirs)
    yield pair
    pair.close()


@pytest.mark.parametrize("lane", LANES)
def test_exactly_the_named_blocks_arrive(two: Two, lane: str) -> None:
    src, dst = [7, 0, 11, 3, 4], [2, 9, 0, 5, 6]
    for bytes_ in whole(two.pools["dst"]):
        bytes_.random_(0, 256)
    before = [each.clone() for each in whole(two.pools["dst"])]
    taken = [by_block(pool)[src] for pool in two.pools["src"]]
    result = two.fetch(src, dst, *LANES[lane])
    assert result.lane.startswith(LANES[lane][0])
    after = [each.clone() for each in whole(two.pools["dst"])]
    for pool, data in zip(two.pools["dst"], taken, strict=True):
        assert torch.equal(by_block(pool)[dst], data)
    # The rest is as it was: with the old blocks put back, so is every byte.
    for now, old in zip(whole(two.pools["dst"]), before, strict=True):
        now.copy_(old)
    for pool, data in zip(two.pools["dst"], taken, strict=True):
        by_block(pool)[dst] = data
    for now, moved in zip(whole(two.pools["dst"]), after, strict=True):
        assert torch.equal(now, moved)
    assert two.dst.checksums(dst) == two.agents["src"].checksums(src)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_is_in_as_few_pieces_as_its_layout_allows(name: str) -> None:
    pools = LAYOUTS[name](CPU)
    regions = regions_of(pools)
    segments = [segment for region in regions for segment in region.segments]
    assert [s.length for s in segments] == [PIECES[name][1]] * PIECES[name][0]
    assert block_bytes(regions) == PIECES[name][0] * PIECES[name][1]
    assert len(storages_of(pools)) == (LAYERS if name == "planes" else 1)
    for span in storages_of(pools):
        assert any(locate(segment, BLOCKS, [span]) for segment in segments)


def test_a_permuted_layout_starts_with_nixl_alone_and_names_nothing_by_tensor() -> None:
    # As FlashAttention has it: NIXL takes no tensor that is not contiguous ("incompatible function arguments").
    ours, theirs = LAYOUTS["LBNHC"](CPU), LAYOUTS["LBNHC"](CPU)
    assert not ours[0].tensor.is_contiguous()
    pair = Two(ours, theirs, backends=("nixl",))
    assert pair.fetch([1, 2], [3, 4], "nixl/ucx").bytes == 2 * block_bytes(regions_of(ours))
    pair.close()
    assert torch.equal(by_block(ours[3])[[3, 4]], by_block(theirs[3])[[1, 2]])


@pytest.mark.parametrize("two_orders", ["LBNHC LBHNC", "BLHNC BHLNC", "BLHNC BLNHC", "LBHNC LHBNC"])
def test_layouts_whose_bytes_would_be_mixed_up_are_refused(two_orders: str) -> None:
    ours, theirs = two_orders.split()
    pair = Two(LAYOUTS[ours](CPU), LAYOUTS[theirs](CPU), backends=("local",))
    with pytest.raises(IncompatibleLayout, match="differently"):
        pair.fetch([1], [1], "local/memcpy")
    pair.close()


def test_pools_that_keep_different_blocks_in_the_same_bytes_are_refused() -> None:
    raw = storage(4096, CPU)
    rows = raw.view(8, 512)
    sliding = torch.as_strided(raw, (8, 512), (256, 1))
    stepping = torch.as_strided(raw, (8, 256), (256, 1))
    for tensors in ([rows, raw[512:].view(7, 512)], [sliding], [rows, stepping]):
        blocks = tensors[-1].shape[0]
        with pytest.raises(ConfigError, match=r"shape \(.*different blocks in the same bytes"):
            regions_of([KVPool(f"layer.{n}", tensor[:blocks], blocks, 0) for n, tensor in enumerate(tensors)])


@pytest.mark.parametrize("gather", [True, False])
def test_pieces_of_different_lengths_go_through_one_buffer(gather: bool) -> None:
    rows = [torch.randint(0, 255, (6, size), dtype=torch.uint8) for size in (16, 16, 40, 7)]
    index = torch.tensor([4, 1, 3])
    buffer = torch.randint(0, 255, (3 * sum(row.shape[1] for row in rows),), dtype=torch.uint8)
    sent = buffer.clone()
    copier(rows)(index, buffer, gather)
    assert torch.equal(torch.cat([row[index].flatten() for row in rows]), buffer if gather else sent)

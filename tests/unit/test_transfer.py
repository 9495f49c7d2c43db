# SPDX-License-Identifier: Apache-2.0
"""Two agents in one process move blocks and refuse what must not move; bytes are compared every time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import ConfigError, IncompatibleLayout, MigrateError, PeerUnknown, StaleEpoch, TransferError
from components.transfer import AgentConfig, KVPool, Strategy, TransferAgent, Transport
from components.transfer.assemble import Assembly, _order
from components.transfer.control.record import decode
from components.transfer.data.tcp import TcpBackend
from components.transfer.ids import AgentRef, Epoch
from components.transfer.layout import Ints, Segment, batches, extents, runs

BLOCKS = 16
LAYOUTS = {"block first": (BLOCKS, 2, 8, 4), "planes first": (2, BLOCKS, 8, 4), "latent": (BLOCKS, 8, 6)}


def pools(shape: tuple[int, ...], seed: int) -> list[KVPool]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3)]
    return [KVPool(f"layer.{i}", t, BLOCKS, shape.index(BLOCKS)) for i, t in enumerate(tensors)]


def agent(name: str, namespace: str, parts: list[KVPool], **more: object) -> TransferAgent:
    made = TransferAgent(AgentConfig(name=name, namespace=namespace, block_size=8, layers=3, **more))  # type: ignore[arg-type]
    made.start(parts)
    return made


class Two:
    """A source and a destination of the same layout."""

    def __init__(self, shape: tuple[int, ...], shared: bool = False, **more: object) -> None:
        namespace = uuid.uuid4().hex
        self.src_pools, self.dst_pools = pools(shape, 1), pools(shape, 2)
        if shared:
            for pool in (*self.src_pools, *self.dst_pools):
                pool.tensor.share_memory_()
        self.src = agent("src", namespace, self.src_pools)
        self.dst = agent("dst", namespace, self.dst_pools, **more)

    def fetch(self, src: list[int], dst: list[int], peer: AgentRef | None = None) -> int:
        handle = self.dst.fetch(peer or self.src.ref, src, dst, request_id="r", deadline_s=20)
        return handle.wait(30).bytes

    def close(self) -> None:
        self.src.close()
        self.dst.close()


@pytest.fixture(scope="module", params=[*LAYOUTS, "block first, tcp", "planes first, mapped", "latent, mapped"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    layout, _, lane = request.param.partition(", ")
    pair = Two(LAYOUTS[layout], shared=lane == "mapped")
    assert (pair.dst.lanes[0] == "shm/mapped") == (lane == "mapped")
    if lane == "tcp":
        whole = pair.dst.assembly
        pair.dst.assembly = Assembly(
            [b for b in whole.backends if isinstance(b, TcpBackend)], whole.record, whole.shares
        )
    yield pair
    pair.close()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_exactly_the_named_blocks_arrive(two: Two, data: st.DataObject) -> None:
    dst = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True, max_size=BLOCKS))
    src = data.draw(st.lists(st.integers(0, BLOCKS - 1), min_size=len(dst), max_size=len(dst)))
    before = [pool.tensor.clone() for pool in two.dst_pools]
    two.fetch(src, dst)
    for pool, source, old in zip(two.dst_pools, two.src_pools, before, strict=True):
        expected = old.movedim(pool.block_dim, 0).clone()
        if dst:
            expected[dst] = source.tensor.movedim(pool.block_dim, 0)[src]
        assert torch.equal(pool.tensor.movedim(pool.block_dim, 0), expected)
    assert two.dst.checksums(dst) == two.src.checksums(src)


def test_what_names_the_wrong_life_or_blocks_is_refused(two: Two) -> None:
    before = [pool.tensor.clone() for pool in two.dst_pools]
    with pytest.raises(StaleEpoch):
        two.fetch([1], [1], AgentRef(two.src.ref.name, Epoch("older")))
    for src, dst in (([1], [1, 2]), ([BLOCKS], [1]), ([1], [BLOCKS]), ([1, 2], [3, 3]), ([-1], [1])):
        with pytest.raises(TransferError):
            two.fetch(src, dst)
    assert all(torch.equal(p.tensor, b) for p, b in zip(two.dst_pools, before, strict=True))


def test_another_model_is_refused_before_a_byte_moves() -> None:
    pair = Two(LAYOUTS["block first"], fingerprint="another")
    try:
        with pytest.raises(IncompatibleLayout, match="fingerprint"):
            pair.fetch([1], [1])
    finally:
        pair.close()


def test_an_agent_that_closed_is_unknown() -> None:
    pair = Two(LAYOUTS["block first"])
    pair.src.close()
    try:
        with pytest.raises(PeerUnknown):
            pair.fetch([1], [1])
    finally:
        pair.dst.close()


@given(changed=st.integers(0, BLOCKS - 1), layer=st.integers(0, 2), place=st.integers(0, 63))
@settings(max_examples=50, deadline=None)
def test_a_checksum_notices_any_changed_word(changed: int, layer: int, place: int) -> None:
    parts = pools(LAYOUTS["block first"], 3)
    lone = agent("lone", uuid.uuid4().hex, parts)
    before = lone.checksums(range(BLOCKS))
    flat = parts[layer].tensor[changed].view(torch.int16).view(-1)
    flat[place] ^= 1
    after = lone.checksums(range(BLOCKS))
    lone.close()
    assert [a != b for a, b in zip(before, after, strict=True)] == [i == changed for i in range(BLOCKS)]


@given(
    st.binary(max_size=300)
    | st.recursive(st.integers(-(2**63), 2**64 - 1), lambda x: st.lists(x, max_size=3)).map(msgspec.msgpack.encode)
)
def test_any_bytes_as_a_record_give_an_error_and_no_more(data: bytes) -> None:
    with pytest.raises(MigrateError):
        decode(data)


def test_neighbouring_blocks_become_one_run() -> None:
    found = runs(np.array([4, 5, 6, 9, 1]), np.array([0, 1, 2, 3, 4]))
    assert [part.tolist() for part in found] == [[4, 9, 1], [0, 3, 4], [3, 1, 1]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    pairs=st.integers(0, 12).flatmap(lambda n: st.tuples(st.permutations(range(12)), st.permutations(range(n)))),
    gap=st.integers(0, 5),
    limit=st.integers(1, 200),
)
def test_batches_name_the_memory_that_extents_name(
    lengths: list[int], pairs: tuple[list[int], list[int]], gap: int, limit: int
) -> None:
    local = [Segment(10_000 * n, length, length) for n, length in enumerate(lengths)]
    remote = [Segment(10_000 * n + 1, length + gap, length) for n, length in enumerate(lengths)]
    blocks = np.array(pairs[1], np.int64), np.array(pairs[0][: len(pairs[1])], np.int64)

    def touched(memory: Ints) -> list[tuple[int, int]]:
        return [(a + i, b + i) for a, b, size in memory.tolist() for i in range(size)]

    groups = list(batches(local, remote, *blocks, limit))
    assert all(group[:, 2].sum() < 2 * limit for group in groups)
    assert [pair for group in groups for pair in touched(group)] == touched(extents(local, remote, *blocks))


def test_settings_in_plain_text_mean_what_their_enums_mean() -> None:
    """Processes pass settings on as JSON: lanes are in the same order as with the enum."""
    config = AgentConfig.of({"name": "a", "transport": "auto", "strategy": "read", "etcd_endpoints": ["http://x:1"]})
    assert (config.transport, config.strategy) == (Transport.AUTO, Strategy.READ)
    assert isinstance(config.transport, Transport) and config.etcd_endpoints == ("http://x:1",)
    assert _order(config) == list(config.backends)
    with pytest.raises(ConfigError, match="transport"):
        AgentConfig.of({"name": "a", "transport": "infiniband"})

# SPDX-License-Identifier: Apache-2.0
"""Blocks of a request by groups of layers: full attention keeps all blocks, a sliding window the last ones.

An offer has them in one flat list, which is all that the transfer needs: a block number belongs to one group at a
time and names the same bytes in every group. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from components.engine.kv import Frozen, KVGroup, KVOffer


class Table(NamedTuple):
    """One group's blocks, from position ``first`` on."""

    block_size: int
    first: int
    ids: tuple[int, ...]

    @property
    def past(self) -> int:
        """The position behind the last block."""
        return self.first + len(self.ids)

    def between(self, start: int, stop: int) -> tuple[int, ...]:
        """Blocks at positions from ``start`` (not before ``first``) up to ``stop``."""
        return self.ids[start - self.first : max(start, stop) - self.first]


def tables_of(offer: KVOffer) -> list[Table]:
    """The offer's blocks, group by group."""
    if not offer.groups:
        return [Table(offer.block_size, 0, offer.block_ids)]
    tables, begin = [], 0
    for group in offer.groups:
        tables.append(Table(group.block_size, group.first, offer.block_ids[begin : begin + group.count]))
        begin += group.count
    return tables


def fields_of(tables: Sequence[Table]) -> dict[str, Any]:
    """The reverse: fields of a ``KVOffer`` for these groups."""
    if len(tables) == 1 and not tables[0].first:
        return {"block_ids": tables[0].ids, "groups": ()}
    return {
        "block_ids": tuple(block for table in tables for block in table.ids),
        "groups": tuple(KVGroup(table.block_size, table.first, len(table.ids)) for table in tables),
    }


def whole_blocks(offer: KVOffer, num_tokens: int) -> KVOffer:
    """The offer's whole blocks of its first ``num_tokens`` tokens."""
    tokens = min(offer.num_tokens, num_tokens) // offer.block_size * offer.block_size
    tables = [
        Table(table.block_size, table.first, table.ids[: max(0, tokens // table.block_size - table.first)])
        for table in tables_of(offer)
    ]
    return msgspec.structs.replace(offer, num_tokens=tokens, **fields_of(tables))


def why_unproven(frozen: Frozen) -> str | None:
    """What is wrong with the checksums of a state, which are equally many for each block and worker; or None."""
    tables, ranks, sums = tables_of(frozen.offer), len(frozen.offer.agents), len(frozen.checksums)
    if not sums:
        return None
    counts, blocks = frozen.checked, [len(table.ids) for table in tables]
    if len(counts) != len(blocks) or not all(0 <= count <= has for count, has in zip(counts, blocks, strict=True)):
        return f"it has checksums for {list(counts)} of its {blocks} blocks"
    if not sum(counts) or sums % (ranks * sum(counts)):
        return f"it has {sums} checksums for {sum(counts)} blocks and {ranks} workers"
    return None

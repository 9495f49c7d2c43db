# SPDX-License-Identifier: Apache-2.0
"""The destination's blocks of a landing, group by group: requested, copied and needed ones.

A position counts a request's blocks from its front. Copies go from front to back, so one number is their progress. A
window may have left the first blocks: the source then no longer has them, and the destination does not allocate them
or frees them. In the end the blocks matter that the next token reads.

A block counts as copied if it was copied from the block that the newest offer names at its position. No later offer
names a source block that a window has left (and that another request may get): windows only go forward.

Pure bookkeeping; the caller calls vLLM and makes the jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from components.engine.groups import Table, tables_of
from components.engine.kv import Frozen, KVOffer
from components.engine.vllm.compat.groups import Group, leading_nulls


@dataclass
class Part:
    """One group's."""

    group: Group
    cached: int
    """Positions at the front that the local prefix cache has or that are not needed."""
    local: list[int] = field(default_factory=list)
    """Local blocks by position; 0: none."""
    requested: int = 0
    """Positions for which there is a job."""
    landed: int = 0
    """Positions copied without a gap from the front."""

    def adopt(self, old: Table, new: Table, unchanged: bool) -> None:
        """Take a newer offer; ``unchanged``: the source has not lost its blocks since the last one."""
        begin = max(self.cached, new.first)
        if (
            self.group.state
            or not unchanged
            or new.first < old.first
            or new.between(begin, self.landed) != old.between(begin, self.landed)
        ):
            self.landed = self.cached
        self.requested = self.landed

    def take(self, remote: Table, past: int, needed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Source blocks up to position ``past`` without a job, and the local blocks for them.

        None before ``needed``: vLLM may allocate such a block to another request while the job writes it.
        """
        begin = max(self.requested, remote.first, leading_nulls(self.local), needed)
        past = min(past, remote.past, len(self.local))
        self.requested = max(self.requested, past)
        return remote.between(begin, past), tuple(self.local[begin : max(begin, past)])

    def checked(self, remote: Table, count: int) -> list[int]:
        """Positions of the last ``count`` blocks of an offer."""
        return list(range(max(remote.first, remote.past - count), remote.past))

    def vouched(self, remote: Table, count: int) -> tuple[int, ...]:
        """Local copies of the blocks before those."""
        begin = max(self.cached, remote.first, leading_nulls(self.local))
        return tuple(self.local[begin : max(begin, remote.past - count)])

    def failed(self, bad: set[int]) -> None:
        """Count blocks with wrong bytes, and those behind them, as not copied."""
        good = next((position for position, block in enumerate(self.local) if block in bad), self.landed)
        self.landed = self.requested = min(good, self.landed)

    def reaches(self, remote: Table, num_tokens: int) -> bool:
        """True when everything is in place that the token behind ``num_tokens`` reads."""
        given = leading_nulls(self.local)
        begin = given if self.cached >= remote.first else max(given, remote.first)
        have = max(self.landed, self.cached)
        return self.group.blocks_of(num_tokens) <= have and self.group.first_needed(num_tokens) >= begin


class Parts:
    """All groups of one landing; false without blocks."""

    def __init__(self, groups: Sequence[Group], unit: int, tables: Sequence[list[int]] = (), cached_tokens: int = 0):
        self.unit = unit
        """A number of tokens that is whole blocks in each group."""
        self.cached_tokens = cached_tokens
        """Tokens at the front from the local prefix cache."""
        self._parts = [Part(group, cached_tokens // group.block_size) for group in groups]
        for part in self._parts:
            part.requested = part.landed = part.cached
        self._has_blocks = bool(tables)
        if tables:
            self.refresh(tables)

    def __bool__(self) -> bool:
        return self._has_blocks

    def refresh(self, tables: Sequence[list[int]]) -> None:
        """Take vLLM's present block tables."""
        for part, table in zip(self._parts, tables, strict=True):
            part.local = table

    @property
    def landed_tokens(self) -> int:
        """Tokens copied in all groups, in whole blocks."""
        parts = [part for part in self._parts if not part.group.state]
        reach = min((max(part.landed, part.cached) * part.group.block_size for part in parts), default=0)
        return reach - reach % self.unit

    def adopt(self, old: KVOffer, new: KVOffer) -> None:
        """Take a newer offer. Blocks copied from other source blocks than it names count as not copied."""
        unchanged = (old.generation, old.agents) == (new.generation, new.agents)
        for part, before, after in zip(self._parts, tables_of(old), tables_of(new), strict=True):
            part.adopt(before, after, unchanged)

    def wants(self, num_tokens: int) -> bool:
        """True when the first ``num_tokens`` tokens have whole blocks without a job."""
        parts = [part for part in self._parts if not part.group.state]
        return any(num_tokens // part.group.block_size > part.requested for part in parts)

    def take(self, offer: KVOffer, num_tokens: int, whole: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Source blocks of the tokens without a job, and the local blocks for them; ``whole``: full ones only."""
        remote_blocks: tuple[int, ...] = ()
        local_blocks: tuple[int, ...] = ()
        for part, remote in zip(self._parts, tables_of(offer), strict=True):
            if whole and part.group.state:
                continue
            past = num_tokens // part.group.block_size if whole else part.group.blocks_of(num_tokens)
            new = part.take(remote, past, part.group.first_needed(offer.num_tokens))
            remote_blocks, local_blocks = remote_blocks + new[0], local_blocks + new[1]
        return remote_blocks, local_blocks

    def checks(self, frozen: Frozen) -> tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]:
        """(local block, its checksums at each rank of the source) of all blocks that were not computed here."""
        sums, ranks = frozen.checksums, len(frozen.offer.agents)
        # A rank has equally many sums of each block, and each rank as many as the others.
        of_rank, units = len(sums) // ranks, len(sums) // (ranks * sum(frozen.checked))
        found, at = [], 0
        for part, remote, count in self._with_counts(frozen):
            for position in part.checked(remote, count):
                # Blocks of the local prefix cache were computed here, perhaps with other rounding.
                if position >= part.cached and part.local[position]:
                    begins = [rank * of_rank + at * units for rank in range(ranks)]
                    found.append((part.local[position], tuple(sums[begin : begin + units] for begin in begins)))
                at += 1
        return tuple(found)

    def vouched(self, frozen: Frozen) -> tuple[int, ...]:
        """The other copied local blocks."""
        parts = [part.vouched(remote, count) for part, remote, count in self._with_counts(frozen)]
        return sum(parts[1:], parts[0])

    def _with_counts(self, frozen: Frozen) -> list[tuple[Part, Table, int]]:
        return list(zip(self._parts, tables_of(frozen.offer), frozen.checked, strict=True))

    def landed(self) -> None:
        """Mark the requested blocks as copied."""
        for part in self._parts:
            part.landed = part.requested

    def failed(self, bad: set[int]) -> None:
        """Count blocks with wrong bytes, and those behind them, as not copied."""
        for part in self._parts:
            part.failed(bad)

    def reaches(self, offer: KVOffer, num_tokens: int) -> bool:
        """True when everything is in place that the token behind ``num_tokens`` reads, in each group."""
        return all(p.reaches(remote, num_tokens) for p, remote in zip(self._parts, tables_of(offer), strict=True))

    def good_tokens(self, offer: KVOffer) -> int:
        """Number of tokens after which this engine can compute the rest; whole blocks."""
        reach = self.landed_tokens
        stateless = not any(part.group.state for part in self._parts)
        return reach if stateless and self.reaches(offer, reach) else 0

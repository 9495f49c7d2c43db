# SPDX-License-Identifier: Apache-2.0
"""Which KV heads the ranks of a tensor-parallel engine hold, and which ranks of two engines exchange them.

As in vLLM: ranks hold equal runs of heads, in order; when there are fewer heads than ranks, neighbouring ranks hold
copies of one (of a compressed head, all ranks do). A rank takes each of its heads from one rank of the other engine:
of those with a copy, the one nearest to its own place. With equal sizes that is the rank of the same number.

A *unit* is one head of the pools that divide into as many: checksums are sums over units. Pure functions over numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Rank(NamedTuple):
    """One rank of an engine with ``size`` ranks."""

    number: int = 0
    size: int = 1


class Unit(NamedTuple):
    """One of ``heads`` heads."""

    heads: int
    number: int


def divides(heads: int, size: int) -> bool:
    """True when ``size`` ranks can hold these heads: equally many heads each, or equally many ranks for each head."""
    return not heads % size or not size % heads


def held(heads: int, rank: Rank) -> range:
    """The heads of a rank."""
    first = rank.number * heads // rank.size
    return range(first, max(first + 1, (rank.number + 1) * heads // rank.size))


def server(unit: Unit, target: Rank, sources: int) -> int:
    """The rank, of ``sources`` ranks, from which another engine's rank takes a unit."""
    lowest = unit.number * sources // unit.heads
    highest = max(lowest, (unit.number + 1) * sources // unit.heads - 1)
    return min(max(target.number * sources // target.size, lowest), highest)


def taken(heads: int, target: Rank, source: Rank) -> range:
    """The heads that a rank takes from one of another engine; perhaps none."""
    numbers = [n for n in held(heads, target) if server(Unit(heads, n), target, source.size) == source.number]
    return range(numbers[0], numbers[-1] + 1) if numbers else range(0)


def units_of(totals: Iterable[int], rank: Rank) -> list[Unit]:
    """The units of a rank whose pools have these numbers of heads."""
    return [Unit(heads, number) for heads in sorted(set(totals)) for number in held(heads, rank)]


def places(totals: Iterable[int], target: Rank, sources: int) -> list[tuple[int, int]]:
    """For each unit of a rank: the other engine's rank that serves it, and the unit's place among that rank's."""
    totals = set(totals)
    found = []
    for unit in units_of(totals, target):
        rank = server(unit, target, sources)
        found.append((rank, units_of(totals, Rank(rank, sources)).index(unit)))
    return found

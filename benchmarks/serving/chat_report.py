# SPDX-License-Identifier: Apache-2.0
"""What chats of several turns find of the turns before, as a table: ours against stock, with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.graph import place
from benchmarks.serving.chat import ANSWER, FIRST_WORDS, PAIRS, TURNS, WORDS, Chats, Turn, late, share_of
from benchmarks.serving.parts import Kind
from benchmarks.serving.tables import table


def lines(chats: Chats) -> list[str]:
    """A section of the report; none without turns."""
    rows = [row for pair in PAIRS for row in _rows(chats, pair)]
    if not rows:
        return []
    header = ["workers, users", "cached, ours - stock", "TTFT p50, ours / stock", "TTFT p90", "cached, ours / stock"]
    header += ["TTFT p50 ms, ours / stock", "p90 ms", "turns"]
    sizes = "; ".join(f"{pair}: {size.prefill} prefill and {size.decode} decode" for pair, (_, size) in PAIRS.items())
    return [
        f"## Chats of {TURNS} turns: {chats.model}",
        "",
        f"{chats.date}, {place(chats.machine)}. {FIRST_WORDS} words, then {WORDS} for each turn, answers of {ANSWER} "
        f"tokens; later turns alone. Workers: {sizes}. Ours: this package. Stock: Dynamo with NixlConnector (on CPUs "
        "not for agg: its threads take half of two cores). Both frontends choose by the KV that workers have (`kv`); "
        "one system is talked to at a time. Goal: share of cached prompt "
        "tokens equal within 0.02, TTFT within 5%. In brackets: 95% intervals (bootstrap over whole repeats).",
        "",
        *table(header, rows),
    ]


def _rows(chats: Chats, pair: str) -> Iterator[list[str]]:
    kinds, _ = PAIRS[pair]
    for users in sorted({turn.users for turn in chats.turns}):
        both: list[dict[int, list[Turn]]] = [{}, {}]
        for turn in chats.turns:
            if turn.users == users and turn.system in kinds:
                both[kinds.index(Kind(turn.system))].setdefault(turn.repeat, []).append(turn)
        repeats = sorted(both[0].keys() & both[1].keys())
        if repeats:
            yield [f"{pair}, {users}", *_compared(both, repeats)]


def _compared(both: list[dict[int, list[Turn]]], repeats: list[int]) -> Iterator[str]:
    def pooled(drawn: list[int]) -> list[list[Turn]]:
        return [[turn for repeat in drawn for turn in found[repeat]] for found in both]

    for of, form in ((_share_less, "+.3f"), (_ratio(50), ".2f"), (_ratio(90), ".2f")):
        random = np.random.default_rng(0)
        drawn = [of(*pooled([*random.choice(repeats, len(repeats))])) for _ in range(300)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        yield f"{of(*pooled(repeats)):{form}} ({low:{form}} to {high:{form}})"
    ours, stock = pooled(repeats)
    yield f"{share_of(ours):.3f} / {share_of(stock):.3f}"
    for share in (50, 90):
        yield " / ".join(f"{np.percentile(late(turns), share):.0f}" for turns in (ours, stock))
    yield str(len(late(ours)))


def _share_less(ours: list[Turn], stock: list[Turn]) -> float:
    return share_of(ours) - share_of(stock)


def _ratio(percentile: int) -> Callable[[list[Turn], list[Turn]], float]:
    return lambda ours, stock: float(np.percentile(late(ours), percentile) / np.percentile(late(stock), percentile))

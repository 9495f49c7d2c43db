# SPDX-License-Identifier: Apache-2.0
"""Result of a soak, in ``benchmarks/results`` and in ``benchmarks/report.md``."""

from __future__ import annotations

import msgspec

from benchmarks.soak.memory import Life


class Report(msgspec.Struct):
    """What came of a soak."""

    machine: dict[str, str]
    engine: str
    model: str
    transport: str
    minutes: float
    finished: int = 0
    dropped: int = 0
    tokens: int = 0
    moves: int = 0
    not_made: dict[str, int] = {}
    """Moves that were not made, by reason; the requests went on where they were."""
    restarts_s: list[float] = []
    errors: list[str] = []
    changed: list[str] = []
    leaks: list[str] = []
    grown: list[str] = []
    worst_gap_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """p50, p99 and maximum over requests of a request's largest gap between tokens."""
    lives: list[Life] = []

    @property
    def passed(self) -> bool:
        """Nothing was lost and nothing grew."""
        return not (self.errors or self.changed or self.leaks or self.grown) and self.finished > 0

    def lines(self) -> list[str]:
        """As Markdown."""
        moved = ", ".join(f"{count} {reason}" for reason, count in sorted(self.not_made.items())) or "none"
        grown = [growth for life in self.lives if (growth := life.growth_mib()) is not None]
        p50, p99, most = self.worst_gap_ms
        return [
            f"{self.minutes:g} minutes, engine {self.engine}, lane `{self.transport}`, {self.machine.get('cpu', '')}: "
            f"{'passed' if self.passed else '**failed**'}.",
            "",
            f"- {self.finished} requests ({self.tokens} tokens), {self.dropped} more dropped by their client in the "
            "middle; each answer compared with the one to the same request in peace",
            f"- {self.moves} migrations; not made, the request going on where it was: {moved}",
            f"- {len(self.restarts_s)} restarts of a worker by SIGTERM",
            f"- errors {len(self.errors)}, changed answers {len(self.changed)}, blocks or requests left behind "
            f"{len(self.leaks)}",
            f"- memory: largest growth of a process after its first two minutes {max(grown, default=0.0):.1f} MiB",
            f"- largest gap between tokens of a request: p50 {p50:.0f} ms, p99 {p99:.0f}, maximum {most:.0f}",
            "",
        ]

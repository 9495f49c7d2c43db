# SPDX-License-Identifier: Apache-2.0
"""Resident memory of every process of a system over time, and whether it is flat."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import psutil

from benchmarks.serving.systems import System

_SETTLE_S = 120.0
"""Of each life of a process: the first requests and the first contact of agents take memory for good."""
_GROWTH_MIB = 16.0
_GROWTH_SHARE = 0.03


class Life(msgspec.Struct):
    """One life of one process: seconds since the start of the soak, MiB of its whole family."""

    name: str
    pid: int
    times_s: list[float] = []
    rss_mib: list[float] = []

    def growth_mib(self) -> float | None:
        """Last minus first fifth of the time after settling; None for a life too short to tell."""
        settled = self.times_s[0] + min(_SETTLE_S, (self.times_s[-1] - self.times_s[0]) / 3)
        kept = [m for t, m in zip(self.times_s, self.rss_mib, strict=True) if t >= settled]
        if len(kept) < 10:
            return None
        fifth = max(1, len(kept) // 5)
        return float(np.median(kept[-fifth:]) - np.median(kept[:fifth]))

    def is_flat(self) -> bool:
        """Within what fragmentation explains."""
        growth = self.growth_mib()
        return growth is None or growth <= max(_GROWTH_MIB, _GROWTH_SHARE * float(np.median(self.rss_mib)))


class Memory:
    """Call ``sample`` now and then."""

    def __init__(self, system: System) -> None:
        self.lives: dict[int, Life] = {}
        self._system = system

    def sample(self, now_s: float) -> None:
        """One point for each process that runs."""
        for part in self._system.parts:
            if part.process is None or part.process.poll() is not None or not part.is_ready():
                continue
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(part.process.pid)
                total = 0
                for member in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        total += member.memory_info().rss
                life = self.lives.setdefault(root.pid, Life(part.name, root.pid))
                life.times_s.append(round(now_s, 1))
                life.rss_mib.append(round(total / 2**20, 1))


def plot(lives: list[Life], restarts_s: list[float], path: Path) -> None:
    """Memory of each life over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate(sorted({life.name for life in lives}))}
    seen: set[str] = set()
    for life in lives:
        label = None if life.name in seen else life.name
        seen.add(life.name)
        axis.plot(np.asarray(life.times_s) / 60, life.rss_mib, color=colours[life.name], label=label, linewidth=1)
    for restart in restarts_s:
        axis.axvline(restart / 60, color="grey", alpha=0.4, linestyle=":")
    axis.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

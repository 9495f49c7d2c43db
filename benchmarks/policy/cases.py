# SPDX-License-Identifier: Apache-2.0
"""Loads in which KV routing might need help, each made to have one trouble.

long answers    Pareto-distributed answers that nobody knows before: KV runs out, and requests are preempted
bursts          a chat, and every ten seconds many long documents at once, whose prompts delay the chat's tokens
sessions        conversations that grow: each stays where its prefix is cached, however full that worker gets
important       as long answers, with one request in fifty important; only those count
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from planner_hooks.simulate.model import saturation_rate
from planner_hooks.simulate.scenario import Scenario
from planner_hooks.simulate.traces import Arrival, reused

_BLOCK = 512
_EVERY_S = 10.0


def _long_answers(rate: float, seconds: float, seed: int) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / rate, int(rate * seconds))).tolist()
    prompts, _ = _lengths(rng, len(times))
    answers = np.minimum(200 * (1 + rng.pareto(1.3, len(times))), 16_000)
    return [Arrival(t, int(p), int(a)) for t, p, a in zip(times, prompts, answers, strict=True)]


def _important(rate: float, seconds: float, seed: int) -> list[Arrival]:
    found = _long_answers(rate, seconds, seed)
    return [msgspec.structs.replace(a, priority=int(number % 50 == 0)) for number, a in enumerate(found)]


def _bursts(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """A tenth of the requests are documents."""
    rng = np.random.default_rng(seed)
    chat = np.cumsum(rng.exponential(1.0 / (0.9 * rate), int(0.9 * rate * seconds))).tolist()
    found = [Arrival(t, int(p), int(a)) for t, p, a in zip(chat, *_lengths(rng, len(chat)), strict=True)]
    for begin in np.arange(0.5 * _EVERY_S, seconds, _EVERY_S):
        for after in rng.uniform(0.0, 0.5, max(1, round(0.1 * rate * _EVERY_S))):
            found.append(Arrival(float(begin + after), int(rng.integers(4000, 16_000)), int(rng.integers(20, 100))))
    return sorted(found, key=lambda a: a.time_s)


def _sessions(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Ten turns on average, with pauses of ten seconds; each adds a question to all that was said."""
    rng = np.random.default_rng(seed)
    found: list[Arrival] = []
    for number, begin in enumerate(np.arange(-100.0, seconds, 10.0 / rate)):
        at, prompt, prefix = float(begin), 0, list[int]()
        for _ in range(int(rng.geometric(0.1))):
            [question], [answer] = _lengths(rng, 1)
            prompt += int(question)
            prefix += [(number << 20) + n for n in range(len(prefix), prompt // _BLOCK)]
            if 0.0 <= at < seconds and prompt < 32_000:
                found.append(Arrival(at, prompt, int(answer), prefix=tuple(prefix)))
            prompt += int(answer)
            at += float(rng.exponential(10.0))
    return sorted(found, key=lambda a: a.time_s)


def _lengths(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.clip(rng.lognormal(5.5, 1.0, count), 16, 8000), np.clip(rng.lognormal(5.5, 0.8, count), 8, 4000)


CASES: dict[str, Callable[[float, float, int], list[Arrival]]] = {
    "long answers": _long_answers,
    "bursts": _bursts,
    "sessions": _sessions,
    "important": _important,
}
LOAD = {"long answers": 0.85, "bursts": 0.5, "sessions": 0.5, "important": 0.85}
"""As a share of the rate at which workers would be full."""


def arrivals(scenario: Scenario) -> list[Arrival]:
    """The requests of a case, whose name is the scenario's trace."""
    make = CASES[scenario.trace]
    sample = make(20.0, 200.0, 1)
    lengths = [a.prompt_tokens for a in sample], [a.output_tokens for a in sample]
    rate = saturation_rate(*lengths, reused(sample), scenario.model) * scenario.workers * scenario.load
    return make(rate, scenario.seconds, scenario.seed)

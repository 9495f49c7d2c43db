# SPDX-License-Identifier: Apache-2.0
"""The load of ``benchmarks.policy.live``: conversations whose answers have long tails, and the client that sends them.

Sessions begin at random times. Each turn's prompt is the last one with some more words, so that its beginning is cached
where the session was; answers are Pareto-distributed, and nobody knows their lengths before.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator

import aiohttp
import msgspec

_WORDS = ("river", "mountain", "cloud", "layer", "stone", "garden", "window", "silver", "copper", "yellow")
_TIMEOUT_S = 240.0


class Shape(msgspec.Struct, frozen=True):
    """The load. Lengths in words and tokens, which are about the same."""

    seconds: float
    """In which sessions begin."""
    sessions: int
    turns: int
    """Of each session at most; each number is as likely."""
    first: int
    """Words of a first prompt, from a half to one and a half times as many."""
    more: int
    """Words that each further turn adds."""
    answer: int
    """Tokens of the shortest answers; the mean is three times as many."""
    longest: int
    pause_s: float = 1.0


class Turn(msgspec.Struct, frozen=True):
    """One question."""

    prompt: str
    tokens: int
    """Of the answer."""
    pause_s: float


class Session(msgspec.Struct, frozen=True):
    """One user."""

    start_s: float
    turns: tuple[Turn, ...]


class Answer(msgspec.Struct, frozen=True):
    """One turn as its client saw it."""

    turn: int
    start_s: float
    """Since the load began."""
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    gaps_s: tuple[float, ...]
    tokens: int
    """That were asked for."""
    error: str = ""

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return sum(self.gaps_s) / max(1, self.tokens - 1)


def sessions(shape: Shape, repeat: int, salt: str) -> list[Session]:
    """The same in every run of a repeat but for ``salt``, with which all prompts begin: none is cached from before."""
    chooser = random.Random(repeat)
    found = []
    for number in range(shape.sessions):
        start_s = chooser.uniform(0, shape.seconds)
        text, turns = f"{salt}.{repeat}.{number}", []
        for turn in range(chooser.randint(1, shape.turns)):
            count = int(chooser.uniform(0.5, 1.5) * (shape.more if turn else shape.first))
            text += "".join(f" {chooser.choice(_WORDS)}" for _ in range(count))
            tokens = min(shape.longest, int(shape.answer * chooser.paretovariate(1.5)))
            turns.append(Turn(text, tokens, chooser.expovariate(1 / shape.pause_s)))
        found.append(Session(start_s, tuple(turns)))
    return found


async def send(url: str, model: str, load: list[Session]) -> list[Answer]:
    """All of them; returns what came of each turn, in the order of sessions."""
    began = time.monotonic()
    timeout, connector = aiohttp.ClientTimeout(total=_TIMEOUT_S), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as http:
        talks = await asyncio.gather(*(_talk(http, model, session, began) for session in load))
    return [answer for talk in talks for answer in talk]


async def _talk(http: aiohttp.ClientSession, model: str, session: Session, began: float) -> list[Answer]:
    await asyncio.sleep(session.start_s)
    answers = []
    for number, turn in enumerate(session.turns):
        answers.append(await _ask(http, model, turn, number, began))
        await asyncio.sleep(turn.pause_s)
    return answers


async def _ask(http: aiohttp.ClientSession, model: str, turn: Turn, number: int, began: float) -> Answer:
    sent, times, error, last = time.monotonic(), [], "", b""
    body = {"model": model, "prompt": turn.prompt, "max_tokens": turn.tokens, "ignore_eos": True, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.post("/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise aiohttp.ClientError(f"{reply.status}: {(await reply.text())[:300]}")
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
                    error = error or (line.decode()[:300] if b'"error"' in line[:20] else "")
                    last = line
    except (aiohttp.ClientError, TimeoutError) as failure:
        error = repr(failure)
    usage = (json.loads(last[6:]).get("usage") or {}) if last else {}
    times = times[: -1 if usage else None]  # The last event has no token.
    made = usage.get("completion_tokens", 0)
    if not error and made != turn.tokens:
        error = f"{made} of {turn.tokens} tokens"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    first = times[0] - sent if times else 0.0
    gaps = tuple(round(b - a, 6) for a, b in itertools.pairwise(times))
    return Answer(number, sent - began, usage.get("prompt_tokens", 0), cached, first, gaps, turn.tokens, error)


def gaps(answers: list[Answer]) -> Iterator[float]:
    """All of them, in seconds."""
    return itertools.chain.from_iterable(answer.gaps_s for answer in answers)

# SPDX-License-Identifier: Apache-2.0
"""Requests with known answers: each is answered once on an idle system, then repeatedly under load.

Greedy and seeded requests, short and long ones; the client drops some midway. An answer that differs from the first
one is a changed token; an HTTP error, a broken stream or a wrong length is an error.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

_DROPPED = 0.05
"""Share of requests whose client goes away early."""


@dataclass
class Tally:
    """What came of the requests so far."""

    finished: int = 0
    dropped: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """The largest gap between tokens of each finished request."""


def bodies(model: str, count: int, seed: int, longest: int) -> list[dict[str, Any]]:
    """Requests of mixed length; every third one is sampled with a seed."""
    chooser = random.Random(seed)
    found = []
    for number in range(count):
        prompt = chooser.choice([8, 31, 64, 150, longest // 2])
        output = chooser.choice([16, 100, 200, longest // 2])
        body: dict[str, Any] = {
            "model": model,
            "prompt": [chooser.randrange(1000, 20000) for _ in range(prompt)],
            "max_tokens": output,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        if number % 3 == 2:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": number}
        found.append(body)
    return found


class Traffic:
    """Keeps ``at_once`` requests running."""

    def __init__(self, url: str, requests: list[dict[str, Any]], seed: int) -> None:
        self.tally = Tally()
        self._http = httpx.AsyncClient(
            base_url=url, timeout=180, limits=httpx.Limits(max_connections=64), trust_env=False
        )
        self._requests = requests
        self._chooser = random.Random(seed)
        self._truth: list[str] = []

    async def learn(self) -> None:
        """Answer every request once, one at a time."""
        for body in self._requests:
            text, _, _ = await self._ask(body, None)
            self._truth.append(text)

    async def run(self, at_once: int, stop: asyncio.Event) -> None:
        """Until told to stop; requests under way then are answered to the end."""
        await asyncio.gather(*(self._one_after_another(stop) for _ in range(at_once)))

    async def _one_after_another(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            number = self._chooser.randrange(len(self._requests))
            body = self._requests[number]
            drop = self._chooser.randrange(1, 12) if self._chooser.random() < _DROPPED else None
            try:
                text, tokens, gap = await self._ask(body, drop)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.tally.errors.append(f"{time.time():.0f}: request {number}: {error!r}"[:500])
                await asyncio.sleep(0.2)
                continue
            if drop is not None:
                self.tally.dropped += 1
                continue
            self.tally.finished += 1
            self.tally.tokens += tokens
            self.tally.gaps_s.append(round(gap, 4))
            if text != self._truth[number]:
                shared = next(
                    (i for i, (a, b) in enumerate(zip(text, self._truth[number], strict=False)) if a != b), -1
                )
                self.tally.changed.append(f"{time.time():.0f}: request {number} differs from character {shared} on")

    async def _ask(self, body: dict[str, Any], drop_after: int | None) -> tuple[str, int, float]:
        """Text, tokens and the largest gap. Raises ``ValueError`` for a stream that is not whole."""
        text, tokens, chunks, last, gap = "", 0, 0, 0.0, 0.0
        async with self._http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                raise ValueError(f"HTTP {reply.status_code}: {(await reply.aread())[:200]!r}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line[6:])
                if data.get("error"):
                    raise ValueError(f"error in the stream: {data['error']}")
                if data.get("choices"):
                    text += data["choices"][0].get("text") or ""
                    chunks += 1
                    now = time.monotonic()
                    gap, last = max(gap, now - last if last else 0.0), now
                if data.get("usage"):
                    tokens = data["usage"]["completion_tokens"]
                if drop_after is not None and chunks >= drop_after:
                    return text, chunks, gap
        if tokens != body["max_tokens"]:
            raise ValueError(f"{tokens} tokens of {body['max_tokens']}")
        return text, tokens, gap

    async def close(self) -> None:
        """End the client."""
        await self._http.aclose()

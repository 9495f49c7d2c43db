# SPDX-License-Identifier: Apache-2.0
"""A load client that keeps streams running: one JSON ``Order`` per line in, one ``Seen`` out.

Closed loop: each stream sends its next request after the end of the last one. Answers have from half to one and a half
of the order's length, the same ones for each system: with one length, streams that a pause has put in step stay in
step, their prompts share steps of the engine, and the system that pauses has the higher throughput. The first answers
have evenly spread lengths. Only the order's window counts; requests that run at its end are read to their end.
Several of these processes share a load, so that no process limits it: a chunk is handled as bytes, and parsed at the
end of its answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter

import aiohttp
import msgspec
import uvloop

_EVENT = b"data: {"
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_TOKEN_IDS = (1000, 40000)
"""Prompts are random ones of these, so that no prefix cache helps."""


class Order(msgspec.Struct, frozen=True):
    """What to send, and when to look. Times are those of ``time.monotonic``, which processes of a machine share."""

    url: str
    model: str
    streams: tuple[int, ...]
    """Numbers of this process's streams among all."""
    of: int
    prompt: int
    output: int
    begin: float
    end: float
    limit: float
    """What has not ended by then is given up."""
    seed: str


class Seen(msgspec.Struct):
    """What came in the window."""

    tokens: float = 0.0
    chunks: int = 0
    requests: int = 0
    """Answers that began in the window."""
    ttft_ms: list[float] = []
    gaps: dict[str, int] = {}
    """Gaps between the chunks of an answer: how many of each tenth of a millisecond."""
    errors: list[str] = []
    cpu_s: float = 0.0
    """Of this client."""


class Client:
    """All streams of one order."""

    def __init__(self, order: Order, session: aiohttp.ClientSession) -> None:
        self._order = order
        self._session = session
        self._gaps: Counter[int] = Counter()
        self.seen = Seen()

    async def run(self) -> Seen:
        """Send until the window is over."""
        try:
            async with asyncio.timeout(self._order.limit - time.monotonic()):
                await asyncio.gather(self._used(), *(self._stream(number) for number in self._order.streams))
        except TimeoutError:
            self.seen.errors.append("not all streams ended in time")
        self.seen.gaps = {f"{gap / 10:.1f}": count for gap, count in sorted(self._gaps.items())}
        return self.seen

    async def _used(self) -> None:
        await asyncio.sleep(self._order.begin - time.monotonic())
        cpu = time.process_time()
        await asyncio.sleep(self._order.end - time.monotonic())
        self.seen.cpu_s = time.process_time() - cpu

    async def _stream(self, number: int) -> None:
        order = self._order
        chooser = random.Random(f"{order.seed}-{number}")
        wanted = max(1, order.output * (number + 1) // order.of)
        while time.monotonic() < order.end:
            try:
                await self._answer([chooser.randint(*_TOKEN_IDS) for _ in range(order.prompt)], wanted)
            except aiohttp.ClientError as error:
                self.seen.errors.append(repr(error))
                await asyncio.sleep(0.2)
            wanted = chooser.randint(max(1, order.output // 2), 3 * order.output // 2)

    async def _answer(self, prompt: list[int], wanted: int) -> None:
        body = {"model": self._order.model, "prompt": prompt, "max_tokens": wanted, "ignore_eos": True}
        body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        sent = time.monotonic()
        events: list[tuple[float, int]] = []
        tail = b""
        async with self._session.post(f"{self._order.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise aiohttp.ClientError(f"{reply.status}: {(await reply.text())[:200]}")
            async for data in reply.content.iter_any():
                # The mark may be cut in two.
                if count := (tail[1 - len(_EVENT) :] + data).count(_EVENT):
                    events.append((time.monotonic(), count))
                tail = (tail + data)[-1000:]
        found = _TOKENS.findall(tail)
        tokens = int(found[-1]) if found else 0
        if tokens != wanted:
            raise aiohttp.ClientError(f"{tokens} tokens instead of {wanted}: {tail[-200:]!r}")
        self._count(sent, events, tokens)

    def _count(self, sent: float, events: list[tuple[float, int]], tokens: int) -> None:
        begin, end, seen = self._order.begin, self._order.end, self.seen
        last, count = events.pop()
        if count > 1:  # The last event is the usage.
            events.append((last, count - 1))
        chunks = sum(count for _, count in events)
        inside = sum(count for at, count in events if begin <= at < end)
        seen.chunks += inside
        seen.tokens += tokens * inside / chunks
        before = sent
        for number, (at, count) in enumerate(events):
            if begin <= at < end:
                if number:
                    self._gaps[round(1e4 * (at - before))] += 1
                else:
                    seen.requests += 1
                    seen.ttft_ms.append(round(1e3 * (at - sent), 1))
                if count > 1:  # They came together.
                    self._gaps[0] += count - 1
            before = at


async def main() -> None:
    """Serve until the input ends."""
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    timeout = aiohttp.ClientTimeout(total=None)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = msgspec.convert(json.loads(line), Order)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            seen = await Client(order, session).run()
        print(msgspec.json.encode(seen).decode(), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    os._exit(0)

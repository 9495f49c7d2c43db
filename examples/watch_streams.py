# SPDX-License-Identifier: Apache-2.0
"""Keeps some streams running against a served graph and tells what their clients noticed.

    python -m examples.watch_streams --streams 4 --seconds 30

Used by the tutorial on draining: exit code 1 when any client saw an error or a stream that ended early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

import httpx

PROMPT = "Tell me a long story about a lighthouse, its keeper and the sea. " * 8


@dataclass
class Seen:
    """What the clients saw together."""

    tokens: int = 0
    requests: int = 0
    longest_gap_s: float = 0.0
    errors: list[str] = field(default_factory=list)


async def stream(client: httpx.AsyncClient, url: str, model: str, length: int, seen: Seen) -> None:
    """One request."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": length, "stream": True, "ignore_eos": True}
    count, last, finish = 0, 0.0, ""
    try:
        async with client.stream("POST", f"{url}/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choice = (json.loads(line.removeprefix("data: ")).get("choices") or [{}])[0]
                finish = choice.get("finish_reason") or finish
                if choice.get("text"):
                    now = time.perf_counter()
                    seen.longest_gap_s = max(seen.longest_gap_s, now - last if last else 0.0)
                    last, count = now, count + 1
    except httpx.HTTPError as error:
        seen.errors.append(f"{type(error).__name__}: {error}")
        return
    seen.requests += 1
    seen.tokens += count
    if finish != "length":
        seen.errors.append(f"a stream ended early ({finish or 'no finish reason'})")


async def main(url: str, streams: int, seconds: float, length: int) -> int:
    """Run until the time is over and every stream has ended."""
    seen, end = Seen(), time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        model = (await client.get(f"{url}/models")).json()["data"][0]["id"]

        async def repeat() -> None:
            while time.monotonic() < end:
                await stream(client, url, model, length, seen)

        await asyncio.gather(*(repeat() for _ in range(streams)))
    print(
        f"{seen.requests} requests, {seen.tokens} chunks of text, "
        f"longest gap {seen.longest_gap_s * 1e3:.0f} ms, {len(seen.errors)} errors"
    )
    print("\n".join(sorted(set(seen.errors))))
    return int(bool(seen.errors) or not seen.requests)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keep streams running and tell what clients noticed.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--length", type=int, default=200, help="tokens of each answer")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.url, given.streams, given.seconds, given.length)))

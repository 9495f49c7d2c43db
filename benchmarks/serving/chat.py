# SPDX-License-Identifier: Apache-2.0
"""Workload ``chat``: users with conversations of five turns, each turn longer by the last answer and a new question.

A turn should reach a worker that still has the KV of the earlier turns. Measured for later turns: the share of cached
prompt tokens (from the answer's usage) and TTFT. Stock Dynamo and this package run at the same time, each with its
frontend in ``kv`` mode, and get requests in turn; on CPUs the engines of the other system are stopped meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import numpy as np
import typer
from rich.console import Console

from benchmarks.graph import arguments_of, end_on_sigterm, machine
from benchmarks.serving.parts import Kind, Size
from benchmarks.serving.systems import System, resting, running
from components.errors import MigrateError
from components.transfer import Transport

PAIRS: dict[str, tuple[tuple[Kind, Kind], Size]] = {
    "agg": ((Kind.OURS_AGG, Kind.STOCK_AGG), Size(0, 2)),
    "disagg": ((Kind.OURS, Kind.STOCK), Size(2, 2)),
}
"""Ours, stock and the number of workers of each."""
TURNS = 5
FIRST_WORDS, WORDS, ANSWER = 300, 60, 40
_PAUSE_S = 0.3
_LIMIT_S = 120.0
_VOCABULARY = ("river", "mountain", "cloud", "layer", "stone", "garden", "window", "silver", "copper", "yellow")


class Turn(msgspec.Struct, frozen=True):
    """One question and its answer."""

    system: str
    users: int
    repeat: int
    user: int
    turn: int
    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int


class Chats(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    date: str
    turns: list[Turn] = []
    errors: list[str] = []


def measure(
    found: Chats,
    pair: str,
    users: list[int],
    repeats: int,
    transport: Transport,
    devices: tuple[int, ...],
    engine: dict[str, Any],
    logs: Path,
    say: Callable[[str], None],
    keep: Callable[[], None],
) -> None:
    """Add the turns of both systems of a pair. Raises ``MigrateError`` when one does not start or answer."""
    kinds, size = PAIRS[pair]
    where: dict[str, Any] = {"logs": logs, "engine": engine, "devices": devices, "size": size, "wait": False}
    with ExitStack() as stack:
        systems = [stack.enter_context(running(kind, found.model, transport, **where)) for kind in kinds]
        for system in systems:
            system.wait()
        say(f"{pair}: both systems are up")
        for system in systems:
            asyncio.run(_all(system, 2, -1))
        first = 1 + max((turn.repeat for turn in found.turns if turn.system in kinds), default=-1)
        for repeat in range(first, first + repeats):
            for number in users:
                for system in systems if repeat % 2 == 0 else reversed(systems):
                    with resting(() if devices else [other for other in systems if other is not system]):
                        turns = asyncio.run(_all(system, number, repeat))
                    found.turns += turns
                    keep()
                    share, ttft = share_of(turns), np.median(late(turns))
                    say(f"{system.kind}, {number} users: {share:.3f} cached, TTFT p50 {ttft:.0f} ms")


async def _all(system: System, users: int, repeat: int) -> list[Turn]:
    timeout = aiohttp.ClientTimeout(total=_LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        talks = await asyncio.gather(*(_talk(session, system, users, repeat, user) for user in range(users)))
    return [turn for talk in talks for turn in talk]


async def _talk(session: aiohttp.ClientSession, system: System, users: int, repeat: int, user: int) -> list[Turn]:
    # The same words for both systems; no two conversations begin alike.
    chooser = random.Random(f"{users} {repeat} {user}")
    messages, turns = [_said(chooser, FIRST_WORDS)], []
    for number in range(TURNS):
        ttft, usage, text = await _ask(session, system, messages)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        what = (system.kind.value, users, repeat, user, number)
        turns.append(Turn(*what, round(1e3 * ttft, 1), usage["prompt_tokens"], cached))
        messages += [{"role": "assistant", "content": text}, _said(chooser, WORDS)]
        await asyncio.sleep(chooser.random() * _PAUSE_S)
    return turns


def _said(chooser: random.Random, words: int) -> dict[str, str]:
    text = " ".join(chooser.choice(_VOCABULARY) for _ in range(words))
    return {"role": "user", "content": f"{chooser.random()} {text}"}


async def _ask(
    session: aiohttp.ClientSession, system: System, messages: list[dict[str, str]]
) -> tuple[float, dict[str, Any], str]:
    body = {"model": system.model, "messages": messages, "max_tokens": ANSWER, "stream": True, "temperature": 0}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
    sent, first, text, usage = time.monotonic(), 0.0, "", None
    try:
        async with session.post(f"{system.url}/v1/chat/completions", json=body) as reply:
            if reply.status != 200:
                raise MigrateError(f"{system.kind}: {reply.status}: {(await reply.text())[:300]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event.get("choices"):
                    first = first or time.monotonic() - sent
                    text += event["choices"][0]["delta"].get("content") or ""
    except (aiohttp.ClientError, TimeoutError) as error:
        raise MigrateError(f"{system.kind}: {error!r}") from error
    if usage is None:
        raise MigrateError(f"{system.kind}: an answer without usage, after {text!r}")
    return first, usage, text


def share_of(turns: list[Turn]) -> float:
    """Of the prompt tokens of later turns: how much was cached."""
    later = [turn for turn in turns if turn.turn]
    return sum(turn.cached_tokens for turn in later) / max(1, sum(turn.prompt_tokens for turn in later))


def late(turns: list[Turn]) -> list[float]:
    """TTFT of later turns."""
    return [turn.ttft_ms for turn in turns if turn.turn]


def main(
    pairs: Annotated[str, typer.Option(help="agg and disagg, joined by commas")] = "agg,disagg",
    users: Annotated[str, typer.Option(help="numbers of users, joined by commas")] = "6,24",
    repeats: Annotated[int, typer.Option(min=1)] = 6,
    model: Annotated[str, typer.Option(help="as in configs/agg.yaml")] = "tiny-llama",
    devices: Annotated[str, typer.Option(help="GPUs that workers take in turn, joined by commas; empty: CPU")] = "",
    engine_args: Annotated[str, typer.Option(help="vLLM's arguments for all workers, as JSON")] = "{}",
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    path: Annotated[Path, typer.Option("--json", help="file for the raw samples")] = Path("chat.json"),
    add: Annotated[bool, typer.Option("--add", help="go on with the repeats of the file")] = False,
    logs: Annotated[Path | None, typer.Option(help="folder to keep all logs in")] = None,
) -> None:
    """Measure; the serving report takes up ``benchmarks/results/chat-*.json``."""
    from benchmarks.serving.chat_report import lines

    end_on_sigterm()
    found = Chats(machine(), model, time.strftime("%Y-%m-%d"))
    if add and path.is_file():
        found.turns = msgspec.json.decode(path.read_bytes(), type=Chats).turns
    console = Console(soft_wrap=True, markup=False, highlight=False)

    def keep() -> None:
        path.write_bytes(msgspec.json.encode(found))

    chosen = [int(word) for word in users.split(",")]
    gpus = tuple(int(word) for word in devices.split(",") if word)
    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch:
        for pair in pairs.split(","):
            where = (transport, gpus, arguments_of(engine_args), logs or Path(scratch), console.print, keep)
            measure(found, pair, chosen, repeats, *where)
    console.print("\n".join(lines(found)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()

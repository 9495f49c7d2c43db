# SPDX-License-Identifier: Apache-2.0
"""Moves one running request to and fro and watches two neighbours, one on each decode worker."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from components.client import Workers
from components.errors import MigrateError
from components.migration.messages import Mode, MoveRecord, RequestRow

_PAUSE_S = 0.4
"""Pause between two moves, for some undisturbed tokens."""
_QUIET_S = 1.5
"""Undisturbed decoding of a new request."""


class Sample(msgspec.Struct, frozen=True):
    """One migration. Times in seconds."""

    tokens: int
    """Prompt tokens of the request."""
    mode: str
    """A ``Mode``, or ``dynamo`` for Dynamo's own migration."""
    downtime_s: float
    added_stall_s: float
    total_s: float
    bytes: int
    rounds: int
    descriptors: int
    lane: str
    step_s: float
    """Median gap between the request's undisturbed tokens."""
    client_gap_s: float = 0.0
    """Longest gap between tokens as the client sees it, from the call until ``_PAUSE_S`` after its answer: the
    commit, and the frontend's repeat where it follows."""
    workers: int = 2
    """With two workers the source relays; with more the frontend repeats the request and the destination adopts it."""


class Neighbours(msgspec.Struct, frozen=True):
    """Gaps between tokens of the other requests, in seconds."""

    tokens: int
    mode: str
    source_before: tuple[float, ...]
    """At the source, in the quiet time before each move."""
    source_precopy: tuple[float, ...]
    """Until the freeze. No gaps in modes without pre-copy."""
    source_during: tuple[float, ...]
    """The whole move; its last step or two come after the cut-over."""
    target_before: tuple[float, ...]
    target_precopy: tuple[float, ...]
    target_during: tuple[float, ...]


@dataclass
class Watched:
    """A streaming request and the times at which its tokens came."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    """True after a regular end with a finish reason."""
    task: asyncio.Task[None] | None = None

    async def run(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """Read the stream until it ends or is cancelled. Raises ``MigrateError`` with the stream's error."""
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            if reply.is_error:
                raise MigrateError(f"HTTP {reply.status_code}: {(await reply.aread())[:500]!r}")
            async for line in reply.aiter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if error := event.get("error"):
                    raise MigrateError(str(error))
                if choices := event.get("choices"):
                    self.times.append(time.time())
                    self.text += choices[0].get("text") or ""
                    self.ended = choices[0].get("finish_reason") in ("length", "stop")

    @property
    def done(self) -> bool:
        """True after any end of the stream."""
        return self.task is not None and self.task.done()

    def gaps(self, windows: list[tuple[float, float]]) -> list[float]:
        """Gaps that end within one of the windows."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [b - a for a, b in pairs if any(start <= b <= end for start, end in windows)]


class Prompts:
    """Makes requests of a given length, no two with the same beginning."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._serial = 0

    def body(self, tokens: int, output: int) -> dict[str, Any]:
        """A request to ``/v1/completions``."""
        self._serial += 1
        words = self._tokenizer.encode(f"Request {self._serial}. ") + self._tokenizer.encode(" The clock") * tokens
        return {
            "model": self._model,
            "prompt": self._tokenizer.decode(words[: tokens - 1]),
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
        }


@dataclass
class _Seen:
    """What one row has given so far. Times are pairs of begin and end."""

    samples: list[Sample] = field(default_factory=list)
    failed: list[MoveRecord] = field(default_factory=list)
    ends: list[tuple[str, str]] = field(default_factory=list)
    """Source and target of each move."""
    windows: list[tuple[float, float]] = field(default_factory=list)
    precopies: list[tuple[float, float]] = field(default_factory=list)
    quiet: list[tuple[float, float]] = field(default_factory=list)
    """Without a move."""
    before: list[tuple[float, float]] = field(default_factory=list)
    """The last of those before each move, with the request at its source."""
    warm: bool = False


class Bench:
    """Works on a running graph with two workers or more that decode."""

    def __init__(self, client: Workers, port: int, prompts: Prompts, context: int, alone: bool = False) -> None:
        self._client = client
        self._alone = alone
        self._prompts = prompts
        self._context = context
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, trust_env=False)

    async def _running(self) -> dict[str, tuple[str, RequestRow]]:
        """Requests with their workers; up to a second old."""
        await self._client.refresh()
        return {row.request_id: (worker.worker, row) for worker, row in self._client.status().requests()}

    async def _start(self, tokens: int, output: int) -> tuple[Watched, str]:
        known = await self._running()
        watched = Watched()
        watched.task = asyncio.ensure_future(watched.run(self._http, self._prompts.body(tokens, output)))
        while True:
            for name, (_, row) in (await self._running()).items():
                if name not in known and row.output_tokens > 8:
                    return watched, name
            if watched.task.done():
                raise MigrateError(f"a request of {tokens} tokens ended at once: {watched.task.exception()}")
            await asyncio.sleep(0.05)

    async def _decode_workers(self) -> list[str]:
        await self._client.refresh()
        return [w.worker for w in self._client.status().workers if w.role in ("decode", "agg")]

    async def _neighbour(self, worker: str) -> Watched:
        watched, request = await self._start(64, self._context - 128)
        while (await self._running())[request][0] != worker:
            await self._client.move(request, worker)
            await asyncio.sleep(_PAUSE_S)
        return watched

    async def run(self, tokens: int, mode: Mode, moves: int) -> tuple[list[Sample], Neighbours, list[MoveRecord]]:
        """Samples of one length and mode, what neighbours saw, and moves that failed.

        A request that ends is followed by another. With more than two workers, and for a replay, each move has a
        request of its own, because the frontend sends a request to each worker once. One move beforehand is not
        counted.
        """
        workers = await self._decode_workers()
        fresh = len(workers) > 2 or mode is Mode.REPLAY
        # Longer than the slowest mode.
        beside = {worker: await self._neighbour(worker) for worker in workers if not self._alone}
        seen = _Seen()
        watched, request, source = await self._begin(tokens, seen)
        try:
            while len(seen.ends) < moves:
                if watched.done or (fresh and seen.warm):
                    await _stop(watched)
                    await self._gone(request)
                    watched, request, source = await self._begin(tokens, seen)
                target = next(worker for worker in workers if worker != source)
                began = time.time()
                # Workers' tables are up to a second old: the last move has the request's present worker.
                record = await self._client.migrate(request, source, target, mode)
                ended = time.time()
                origin, source = source, target if record.ok else source
                await asyncio.sleep(_PAUSE_S)
                if not seen.warm:
                    seen.warm = True
                    seen.quiet.append((ended + 0.1, time.time()))
                    continue
                if watched.done:
                    continue
                seen.ends.append((origin, target))
                seen.before.append(seen.quiet[-1])
                seen.windows.append((began, ended))
                seen.precopies.append((began, ended - record.downtime_s if mode is Mode.LIVE else began))
                if record.ok and record.mode == mode:
                    step = statistics.median(watched.gaps(seen.quiet))
                    gap = max(watched.gaps([(began, ended + _PAUSE_S)]))
                    seen.samples.append(_sample(tokens, record, step, gap, len(workers)))
                else:
                    seen.failed.append(record)
                seen.quiet.append((ended + 0.1, time.time()))
        finally:
            for each in (watched, *beside.values()):
                await _stop(each)

        def gaps(end: int, times: list[tuple[float, float]]) -> tuple[float, ...]:
            moves = zip(seen.ends, times, strict=False)
            seen_by = [(beside[pair[end]], window) for pair, window in moves if pair[end] in beside]
            return tuple(gap for neighbour, window in seen_by for gap in neighbour.gaps([window]))

        found = [gaps(end, times) for end in (0, 1) for times in (seen.before, seen.precopies, seen.windows)]
        await self._until_idle()
        return seen.samples, Neighbours(tokens, mode, *found), seen.failed

    async def _begin(self, tokens: int, seen: _Seen) -> tuple[Watched, str, str]:
        watched, request = await self._start(tokens, self._context - tokens - 8)
        await asyncio.sleep(_QUIET_S)
        seen.quiet.append((time.time() - _QUIET_S + 0.2, time.time()))
        return watched, request, (await self._running())[request][0]

    async def _gone(self, request: str) -> None:
        while request in await self._running():
            await asyncio.sleep(0.05)

    async def _until_idle(self) -> None:
        while await self._running():
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """End the HTTP client."""
        await self._http.aclose()


async def _stop(watched: Watched) -> None:
    if watched.task is not None:
        watched.task.cancel()
        with suppress(asyncio.CancelledError, httpx.HTTPError):
            await watched.task


def _sample(tokens: int, record: MoveRecord, step_s: float, client_gap_s: float, workers: int) -> Sample:
    return Sample(
        tokens=tokens,
        mode=record.mode,
        downtime_s=record.downtime_s,
        added_stall_s=record.added_stall_s,
        total_s=record.total_s,
        bytes=record.bytes,
        rounds=record.rounds,
        descriptors=record.descriptors,
        lane=record.lane,
        step_s=step_s,
        client_gap_s=client_gap_s,
        workers=workers,
    )

# SPDX-License-Identifier: Apache-2.0
"""One life of a request in the engine of this worker.

``Leg`` is a life that Dynamo's handler reads directly from the engine: the stock path, plus a list of its tokens and
the times of the last ones. ``Arrival`` is a life from another worker: a task reads it from the engine, and its reader
reads it here, from any token on. The reader is the previous worker (relay) or a handler with the frontend's repeat
(adoption). The newest reader wins.

Threading: one asyncio loop. One time-out: an arrival without a reader for ``orphan_s`` is given up.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from statistics import median

import msgspec

from components.engine.kv import RequestId
from components.engine.protocol import GenerateOutput
from components.errors import MigrateError, RequestNotFound, SessionError
from components.migration.messages import Life, Owner, Ticket
from components.timeline import mark

_GAPS = 16


def new_life() -> Life:
    """A random number for one life of one request."""
    return secrets.randbits(63)


class Handler(Enum):
    """Whether a handler of this worker gives a life's tokens to the frontend."""

    NONE = auto()
    """None has begun to."""
    SERVES = auto()
    GONE = auto()


@dataclass(eq=False)
class Away:
    """The life that continues at another worker."""

    owner: Owner
    first: GenerateOutput | None
    """Its first output, which proves that it runs; None: it is still in ``relay``."""
    relay: AsyncGenerator[GenerateOutput, None]
    """The outputs after that one. Closed when no reader here passes them on; the owner then counts as unread."""
    cut: tuple[int, ...]
    """All output tokens up to the cut."""
    told: frozenset[int] | None = None
    """Workers that know the owner; None during the announcement."""
    told_at: float = 0.0
    look_at: float = 0.0
    """Time of the next check whether the frontend is to repeat it."""


@dataclass(eq=False)
class Leg:
    """See the module docstring."""

    request_id: RequestId
    engine_id: RequestId
    """Its name in the engine; the frontend's id for a stock request, so that ``abort`` finds it."""
    prompt_token_ids: Sequence[int]
    native: Callable[[], bytes]
    """The request in the engine's form, made for a move."""
    fixed: str = ""
    """Why it cannot move; empty: it can."""
    attached: str = ""
    """Why the frontend does not repeat it; empty: it does."""
    max_tokens: int | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C headers of the trace that the request belongs to."""
    tried: frozenset[int] = frozenset()
    """Workers to which the frontend has sent this request; it sends the request to none of them again."""
    life: Life = field(default_factory=new_life)
    began: float = field(default_factory=lambda: time.monotonic())
    tokens: list[int] = field(default_factory=list)
    """Output tokens that its handler has passed on; of an arrival those that the engine has made."""
    away: Away | None = None
    may_part: bool = False
    """True from the first move of a life that a handler reads from the engine: that reader watches for its end."""
    parted: Callable[[], None] | None = None
    """Called when it leaves."""
    order: tuple[int, ...] = ()
    """As in ``Owner``."""
    attempts: int = 0
    """Attempts to move this life."""
    handler: Handler = Handler.NONE
    over: bool = False
    """True once the answer has ended, or the frontend is to repeat the request."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the running move."""
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=_GAPS + 1))
    _token: asyncio.Event = field(default_factory=asyncio.Event)

    def depart(self, away: Away) -> None:
        """The life has left: its readers turn to the next owner after its tokens up to the cut."""
        self.away = away
        if self.parted is not None:
            self.parted()

    def note(self, tokens: Sequence[int]) -> None:
        """Note sent tokens."""
        self.tokens.extend(tokens)
        self._note_time()
        if self.may_part:
            mark("source", "token", self.request_id)

    def _note_time(self) -> None:
        self._times.append(time.monotonic())
        self._token.set()

    async def next_token(self, timeout_s: float) -> None:
        """Return when the next token leaves, or after that time."""
        self._token.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._token.wait(), timeout_s)

    def known(self) -> list[int]:
        """All output tokens that this worker has seen."""
        return self.tokens

    def ticket(self, life: Life, fingerprint: str, made: Sequence[int], order: tuple[int, ...]) -> Ticket:
        """The ticket with which another worker begins ``life`` of this request after the output tokens ``made``."""
        return Ticket(
            self.request_id,
            life,
            tuple(self.prompt_token_ids),
            self.native(),
            fingerprint,
            tuple(made),
            tuple(self.tried),
            self.max_tokens,
            self.attached,
            dict(self.trace),
            order,
        )

    @property
    def moves(self) -> int:
        """Number of moves of the request."""
        return len(self.order) + (self.away is not None)

    @property
    def last_token_at(self) -> float:
        """Time of the last sent token, or of the life's begin."""
        return self._times[-1] if self._times else self.began

    def median_gap(self) -> float:
        """Median of the last gaps between outputs, in seconds; 0: none yet."""
        times = list(self._times)
        return median(b - a for a, b in zip(times, times[1:], strict=False)) if len(times) > 1 else 0.0


@dataclass(eq=False)
class Arrival(Leg):
    """See the module docstring."""

    before: tuple[int, ...] = ()
    """Output tokens of earlier lives; complete from the commit on."""
    outputs: list[GenerateOutput] = field(default_factory=list)
    committed: bool = False
    refused: MigrateError | None = None
    """Why its landing failed."""
    reader: int = 0
    """Number of its reader; 0 before the first."""
    unread_since: float | None = field(default_factory=lambda: time.monotonic())
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def depart(self, away: Away) -> None:
        """See ``Leg``."""
        super().depart(away)
        self._changed.set()

    def add(self, output: GenerateOutput) -> None:
        """Add an output of the engine."""
        self.outputs.append(output)
        self.tokens.extend(output.token_ids)
        self._note_time()
        if len(self.outputs) == 1 or self.away is not None:
            mark("target", "first token", self.request_id)
        self._changed.set()

    def known(self) -> list[int]:
        """All output tokens, including earlier lives."""
        return [*self.before, *self.tokens]

    def index_after(self, token_ids: Sequence[int]) -> int | None:
        """Index of the output token after these tokens of prompt and answer; None when they are not this life's."""
        index = len(token_ids) - len(self.prompt_token_ids)
        if index < 0 or [*self.prompt_token_ids, *self.known()[:index]] != list(token_ids):
            return None
        return index

    def start(self, index: int, token_ids: Sequence[int]) -> int:
        """The output token that a reader begins with: ``index``, or the one after the reader's tokens.

        Raises ``RequestNotFound`` when those are not this life's. Tokens of the next owner count as this life's.
        """
        if not token_ids:
            return index
        after = self.index_after(token_ids)
        if after is not None:
            return after
        if self.away is None:
            raise RequestNotFound(f"life {self.life:x} of request {self.request_id} made other tokens")
        return len(self.known())

    async def read(self, index: int) -> AsyncGenerator[GenerateOutput, None]:
        """Outputs from token ``index`` on, to the one with a finish reason or the last one before the life leaves.

        Raises ``SessionError`` when another reader takes over.

        -1 begins with the first token made here. The client of a dead worker may lack some tokens before that.
        """
        self.reader += 1
        me, position = self.reader, 0
        self.unread_since = None
        self._changed.set()
        try:
            if 0 <= index < len(self.before):
                yield GenerateOutput(index, self.before[index:])
                index = len(self.before)
            while True:
                if self.reader != me:
                    raise SessionError(f"request {self.request_id} has a newer reader")
                if position == len(self.outputs):
                    if self.away is not None and len(self.known()) >= len(self.away.cut):
                        return
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                # A reader that is slower than the engine gets several tokens at once.
                new, position = self.outputs[position:], len(self.outputs)
                for joined in join(new):
                    output = since(joined, index)
                    if output is not None:
                        yield output
                        if output.finish_reason is not None:
                            return
        finally:
            if self.reader == me:
                self.unread_since = time.monotonic()


def join(outputs: Sequence[GenerateOutput]) -> list[GenerateOutput]:
    """The same tokens in fewer outputs. An output that ends something stays as it is."""
    joined: list[GenerateOutput] = []
    for output in outputs:
        last = joined[-1] if joined else None
        follows = last is not None and last.index + len(last.token_ids) == output.index
        if last is None or not follows or last.finish_reason is not None or output.finish_reason is not None:
            joined.append(output)
        else:
            joined[-1] = msgspec.structs.replace(
                last, token_ids=last.token_ids + output.token_ids, logprobs=last.logprobs + output.logprobs
            )
    return joined


def since(output: GenerateOutput, index: int) -> GenerateOutput | None:
    """The part of an output from token ``index`` on; None when it is empty."""
    skip = index - output.index
    if skip <= 0:
        return output
    if skip >= len(output.token_ids) and output.finish_reason is None:
        return None
    return msgspec.structs.replace(
        output, index=index, token_ids=output.token_ids[skip:], logprobs=output.logprobs[skip:]
    )

# SPDX-License-Identifier: Apache-2.0
"""One life of a request in the engine of this worker.

``Leg`` is a life that Dynamo's handler reads directly from the engine: the stock path, plus a list of its tokens and
the times of the last ones. ``Arrival`` is a life that came from another worker: a task reads it from the engine, and
whoever has it now reads it here, from any token on: the worker it came from (relay) or a handler to which the frontend
has sent the request again (adoption). The newest reader wins.

Threading: one asyncio loop. Nobody's time-outs but one: an arrival that nobody reads for ``orphan_s`` is given up.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import msgspec

from components.engine.protocol import GenerateOutput, RequestId
from components.errors import MigrateError, RequestNotFound, SessionError
from components.migration.messages import Life, Owner, Ticket

_GAPS = 16


def new_life() -> Life:
    """A number that no other life of any request has."""
    return secrets.randbits(63)


@dataclass(eq=False)
class Away:
    """The life that goes on elsewhere."""

    owner: Owner
    first: GenerateOutput
    """Its first output, which proved that it runs there."""
    relay: AsyncGenerator[GenerateOutput, None]
    """The outputs after that one. Closed when nobody here passes them on: then the owner sees itself unread."""
    cut: tuple[int, ...]
    """All output tokens up to the cut."""
    told: frozenset[int] | None = None
    """Workers that know the owner; None while they are being told."""
    told_at: float = 0.0


@dataclass(eq=False)
class Leg:
    """See the module docstring."""

    request_id: RequestId
    engine_id: RequestId
    """Its name in the engine: the frontend's id for a stock request, which ``abort`` then finds."""
    prompt_token_ids: Sequence[int]
    native: Callable[[], bytes]
    """The request in the engine's own form, made when a move asks for it."""
    fixed: str = ""
    """Why it cannot move; empty: it can."""
    attached: str = ""
    """Why the frontend does not repeat it; empty: it does."""
    max_tokens: int | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C headers of the trace that the request belongs to."""
    tried: frozenset[int] = frozenset()
    """Workers that have had this request from the frontend, which gives it to none of them again."""
    life: Life = field(default_factory=new_life)
    began: float = field(default_factory=lambda: time.monotonic())
    tokens: list[int] = field(default_factory=list)
    """Output tokens that have left this worker."""
    away: Away | None = None
    parting: asyncio.Event | None = None
    """There from the first move on of a life that a handler reads from the engine; set when it has left."""
    order: tuple[int, ...] = ()
    """As in ``Owner``."""
    attempts: int = 0
    """To move this life."""
    served: bool = False
    """A handler of this worker gives its tokens to the frontend."""
    handed_on: bool = False
    """The frontend has been asked to repeat the request."""
    over: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the move under way."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once nobody in this worker has to do with it any more."""
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=_GAPS + 1))

    def expect_parting(self) -> None:
        """A move begins: who reads the engine's stream looks out for its end."""
        self.parting = self.parting or asyncio.Event()

    def depart(self, away: Away) -> None:
        """The life has left: readers turn to its next owner as soon as they have its tokens up to the cut."""
        self.away = away
        if self.parting is not None:
            self.parting.set()

    def note(self, tokens: Sequence[int]) -> None:
        """These have left now."""
        self.tokens.extend(tokens)
        self._times.append(time.monotonic())

    def known(self) -> list[int]:
        """All output tokens that this worker has seen."""
        return self.tokens

    def ticket(self, life: Life, fingerprint: str, made: Sequence[int], order: tuple[int, ...]) -> Ticket:
        """What a worker needs to begin ``life`` of this request after the output tokens ``made``."""
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
        """How often the request has moved."""
        return len(self.order) + (self.away is not None)

    @property
    def last_token_at(self) -> float:
        """When the last token left; when the life began, if none has."""
        return self._times[-1] if self._times else self.began

    def median_gap(self) -> float:
        """Median of the last gaps between outputs, in seconds; 0 while there are none."""
        times = list(self._times)
        return median(b - a for a, b in zip(times, times[1:], strict=False)) if len(times) > 1 else 0.0


@dataclass(eq=False)
class Arrival(Leg):
    """See the module docstring."""

    before: tuple[int, ...] = ()
    """Output tokens that were made elsewhere; complete from the commit on."""
    outputs: list[GenerateOutput] = field(default_factory=list)
    committed: bool = False
    refused: MigrateError | None = None
    """Why it has not landed."""
    reader: int = 0
    """Number of the reader that has it; 0 before the first."""
    unread_since: float | None = field(default_factory=lambda: time.monotonic())
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def expect_parting(self) -> None:
        """``read`` ends by itself."""

    def depart(self, away: Away) -> None:
        """See ``Leg``."""
        super().depart(away)
        self._changed.set()

    def add(self, output: GenerateOutput) -> None:
        """The engine has given this."""
        self.outputs.append(output)
        self._times.append(time.monotonic())
        self._changed.set()

    def known(self) -> list[int]:
        """All output tokens, with those of earlier lives."""
        return [*self.before, *(token for output in self.outputs for token in output.token_ids)]

    def index_after(self, token_ids: Sequence[int]) -> int | None:
        """The output token that follows these tokens of prompt and answer; None when they are not this life's."""
        index = len(token_ids) - len(self.prompt_token_ids)
        if index < 0 or [*self.prompt_token_ids, *self.known()[:index]] != list(token_ids):
            return None
        return index

    def start(self, index: int, token_ids: Sequence[int]) -> int:
        """The output token that a reader begins with: ``index``, or what follows the tokens that it has.

        Raises ``RequestNotFound`` when those are not this life's. Tokens that its next owner made are.
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
        """Outputs from token ``index`` on, to the one with a finish reason or the last one before the life left.

        Raises ``SessionError`` when another reader takes over.

        -1 begins with what is made here. A client whose worker died may lack some of the tokens before that.
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
                output = since(self.outputs[position], index)
                position += 1
                if output is not None:
                    yield output
                    if output.finish_reason is not None:
                        return
        finally:
            if self.reader == me:
                self.unread_since = time.monotonic()


def since(output: GenerateOutput, index: int) -> GenerateOutput | None:
    """The part of an output from token ``index`` on; None when nothing of it is left."""
    skip = index - output.index
    if skip <= 0:
        return output
    if skip >= len(output.token_ids) and output.finish_reason is None:
        return None
    return msgspec.structs.replace(
        output, index=index, token_ids=output.token_ids[skip:], logprobs=output.logprobs[skip:]
    )

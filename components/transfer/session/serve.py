# SPDX-License-Identifier: Apache-2.0
"""The source's side of an ``Ask``: check it, write the blocks, always say how it ended.

A generator on the worker thread; ends by itself when the asked budget is over, when the peer says ``Stop``
or when the peer cannot be reached. Two chunks are under way at once: one is gathered while the other flies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from components.errors import DeadlineExceeded, MigrateError, TransferCancelled, TransferError
from components.transfer.config import TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Copy
from components.transfer.data.nixl import Moved
from components.transfer.data.staging import Staging
from components.transfer.layout import Ints
from components.transfer.session import messages as wire

if TYPE_CHECKING:
    from components.transfer.session.exchange import Exchange, Inbox

logger = logging.getLogger(__name__)
Flow = Generator[bool, None, None]
T = TypeVar("T")


def serve_ask(exchange: Exchange, peer: AgentRecord, ask: wire.Ask, inbox: Inbox) -> Flow:
    """Write the asked blocks to the peer."""
    moved = Moved()
    answer = wire.Ended(ask.id)
    try:
        yield from _bounded(_write(exchange, peer, ask, inbox, moved), inbox, ask.budget_ms)
        answer = _ended(ask.id, moved, exchange.lane_of("WRITE", peer))
    except MigrateError as error:
        answer = wire.Ended(ask.id, error.code, str(error)[:1024])
    exchange.send(peer, answer)


def serve_invite(exchange: Exchange, peer: AgentRecord, invite: wire.Invite, inbox: Inbox) -> Flow:
    """Fetch what the peer wants to push, and tell it how that ended."""
    try:
        theirs, ours = wire.unpack(invite.src), wire.unpack(invite.dst)
        exchange.check_blocks(ours, peer, invite.unit)
        if len(ours) != len(theirs) or (len(theirs) and int(theirs.max()) >= peer.count(invite.unit)):
            raise TransferError("the block lists of the invitation do not fit")
        end = time.monotonic() + invite.budget_ms / 1000
        copy = Copy(peer, ours, theirs, invite.request_id, end, unit=invite.unit)
        result = yield from _bounded(exchange.fetch_invited(copy), inbox, invite.budget_ms)
        answer = _ended(invite.id, result, result.lane)
    except MigrateError as error:
        answer = wire.Ended(invite.id, error.code, str(error)[:1024])
    exchange.send(peer, answer)


def _ended(number: int, done: Moved | TransferResult, lane: str) -> wire.Ended:
    return wire.Ended(number, "", "", done.bytes, done.descriptors, done.prep_s, done.post_s, done.wire_s, lane)


def _bounded(steps: Generator[bool, None, T], inbox: Inbox, budget_ms: int) -> Generator[bool, None, T]:
    """Step until the end, or until the peer or its budget says stop."""
    end = time.monotonic() + budget_ms / 1000
    stopped = False
    try:
        while True:
            failure = None if stopped else _why_stop(inbox, end)
            stopped = stopped or failure is not None
            yield next(steps) if failure is None else steps.throw(failure)
    except StopIteration as stop:
        result: T = stop.value
        return result


def _why_stop(inbox: Inbox, end: float) -> MigrateError | None:
    if inbox.stopped:
        return TransferCancelled("the destination stopped the transfer")
    if time.monotonic() > end:
        return DeadlineExceeded("the time the destination gave is over")
    return None


def _write(exchange: Exchange, peer: AgentRecord, ask: wire.Ask, inbox: Inbox, moved: Moved) -> Flow:
    src = wire.unpack(ask.src)
    exchange.check_blocks(src, peer, ask.unit)
    if ask.slots:
        if exchange.staging is None or ask.unit:
            raise TransferError("this agent has no staging memory")
        yield from _write_staged(exchange, exchange.staging, peer, ask, src, inbox, moved)
        return
    dst = wire.unpack(ask.dst)
    if len(dst) != len(src) or (len(dst) and int(dst.max()) >= peer.count(ask.unit)):
        raise TransferError("the block lists of the request do not fit")
    copy = Copy(peer, src, dst, ask.request_id, 0.0, unit=ask.unit)
    yield from exchange.link.move("WRITE", peer, exchange.memory(copy), moved, copy.arrived, copy.poison)


def _write_staged(
    exchange: Exchange,
    staging: Staging,
    peer: AgentRecord,
    ask: wire.Ask,
    src: Ints,
    inbox: Inbox,
    moved: Moved,
) -> Flow:
    while not (slots := staging.acquire("send", 2)):
        yield False
    chunks = staging.chunks(len(src), ask.slot_bytes)
    index = staging.index(src)
    writes: list[Flow] = []
    quiet = False
    try:
        for number, (first, last) in enumerate(chunks):
            slot = slots[number % len(slots)]
            # Our slot must have been written out before it is filled again.
            while len(writes) >= len(slots):
                yield _step(writes)
            gate = staging.gather(index[first:last], slot)
            while not gate.ready():
                yield _step(writes) if writes else False
            # The peer's slot must have been emptied before it is written again.
            while number >= len(ask.slots) and number - len(ask.slots) not in inbox.freed:
                yield _step(writes) if writes else False
            size = (last - first) * staging.block_bytes
            extent = np.array([[staging.address(slot), ask.slots[number % len(ask.slots)], size]], np.int64)
            notice = wire.encode(wire.Landed(ask.id, number))
            write = exchange.link.move("WRITE", peer, extent, moved, _drop, _harmless, notice)
            next(write, None)
            writes.append(write)
            yield True
        while writes:
            yield _step(writes)
        quiet = True
    except MigrateError as error:
        for write in writes:
            try:
                pending = write.throw(error)
                while True:
                    yield pending
                    pending = next(write)
            except (StopIteration, MigrateError):
                continue
        quiet = True
        raise
    finally:
        if quiet:
            staging.release("send", slots)


def _step(writes: list[Flow]) -> bool:
    try:
        return next(writes[0])
    except StopIteration:
        writes.pop(0)
        return True


def _drop(_: int) -> None:
    """The destination counts what arrived."""


def _harmless() -> Callable[[], None]:
    """A slot of ours that NIXL still reads harms nobody."""
    return lambda: None

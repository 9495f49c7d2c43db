# SPDX-License-Identifier: Apache-2.0
"""The source's side of an ``Ask``: checks it, writes the blocks, always sends ``Ended``.

A generator on the worker thread; ends when the budget is over, on ``Stop``, or when the peer is unreachable.
It uses every free slot: some chunks are gathered while others are in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator

import numpy as np

from components.errors import DeadlineExceeded, MigrateError, TransferCancelled, TransferError
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Copy, harmless
from components.transfer.data.nixl import Moved
from components.transfer.data.staging import Gate, Staging
from components.transfer.layout import Ints
from components.transfer.session import messages as wire
from components.transfer.session.side import Inbox, Side

Flow = Generator[bool, None, None]


def serve_write(side: Side, peer: AgentRecord, ask: wire.Ask, inbox: Inbox) -> Flow:
    """Write the requested blocks to the peer."""
    moved = Moved()
    answer = wire.Ended(ask.id)
    try:
        yield from _bounded(_write(side, peer, ask, inbox, moved), inbox, ask.budget_ms)
        lane = side.lane_of("WRITE", peer)
        figures = (moved.bytes, moved.descriptors, moved.prep_s, moved.post_s, moved.wire_s)
        answer = wire.Ended(ask.id, "", "", *figures, lane)
    except MigrateError as error:
        answer = wire.Ended(ask.id, error.code, str(error)[:1024])
    side.send(peer, answer)


def _bounded(steps: Flow, inbox: Inbox, budget_ms: int) -> Flow:
    """Step until the end, until ``Stop``, or until the budget is over."""
    end = time.monotonic() + budget_ms / 1000
    stopped = False
    try:
        while True:
            failure = None if stopped else _why_stop(inbox, end)
            stopped = stopped or failure is not None
            yield next(steps) if failure is None else steps.throw(failure)
    except StopIteration:
        return


def _why_stop(inbox: Inbox, end: float) -> MigrateError | None:
    if inbox.stopped:
        return TransferCancelled("the destination stopped the transfer")
    if time.monotonic() > end:
        return DeadlineExceeded("the time the destination gave is over")
    return None


def _write(side: Side, peer: AgentRecord, ask: wire.Ask, inbox: Inbox, moved: Moved) -> Flow:
    local = wire.unpack(ask.src)
    side.check_blocks(local)
    if ask.slots:
        if side.staging is None:
            raise TransferError("this agent has no staging memory")
        yield from _write_staged(side, side.staging, peer, ask, local, inbox, moved)
        return
    remote = wire.unpack(ask.dst)
    if len(remote) != len(local) or (len(remote) and int(remote.max()) >= peer.num_blocks):
        raise TransferError("the block lists of the request do not fit")
    copy = Copy(peer, side.shares.given(peer), local, remote, ask.request_id, 0.0)
    yield from side.link.move("WRITE", peer, side.memory(copy), moved, copy.mark_unsafe)


def _write_staged(
    side: Side,
    staging: Staging,
    peer: AgentRecord,
    ask: wire.Ask,
    local: Ints,
    inbox: Inbox,
    moved: Moved,
) -> Flow:
    while not (slots := staging.acquire("send", staging.side)):
        yield False
    packing = staging.packing(side.shares.given(peer))
    chunks = staging.chunks(len(local), ask.slot_bytes, packing)
    index = staging.index(local)
    free, number, posted = list(slots), 0, 0
    gathered: deque[tuple[int, Gate]] = deque()
    writes: list[tuple[int, Flow]] = []
    quiet = False
    try:
        while posted < len(chunks) or writes:
            worked = False
            # One at a time: the first chunk is sent while the next one is gathered.
            if free and number < len(chunks) and len(gathered) < 2:
                slot = free.pop(0)
                gathered.append((slot, staging.gather(index[slice(*chunks[number])], slot, packing)))
                number, worked = number + 1, True
            # The peer must have emptied its slot before the next write to it.
            emptied = posted < len(ask.slots) or posted - len(ask.slots) in inbox.freed
            if gathered and emptied and gathered[0][1].ready():
                slot, _ = gathered.popleft()
                size = (chunks[posted][1] - chunks[posted][0]) * packing.block_bytes
                extent = np.array([[staging.address(slot), ask.slots[posted % len(ask.slots)], size]], np.int64)
                notice = side.sealed(peer, wire.Landed(ask.id, posted))
                # NIXL at most still reads a local slot.
                writes.append((slot, side.link.move("WRITE", peer, extent, moved, harmless, notice)))
                posted, worked = posted + 1, True
            for slot, write in list(writes):
                try:
                    worked |= next(write)
                except StopIteration:
                    writes.remove((slot, write))
                    free.append(slot)
                    worked = True
            yield worked
        quiet = True
    except MigrateError as error:
        for _, write in writes:
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

# SPDX-License-Identifier: Apache-2.0
"""The destination's side: reserves blocks, copies rounds while the source decodes, then the tail, then runs.

Blocks that cannot be copied or verified are recomputed. A round holds its blocks until nothing can write to them any
more, so that an aborted request never frees a block that still changes.

Threading: one asyncio loop; a round is a task that waits for the agent's thread.
Time-outs: ``deadline_s`` for each round. Errors: ``NoRoom``, ``SessionError``, ``IncompatibleLayout`` from the
calls; a failed round is part of the status.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from components.engine.kv import Frozen, KVOffer, LandingStatus
from components.engine.paged.request import Active, Landing
from components.engine.paged.scheduler import Scheduler
from components.engine.protocol import FinishReason, RequestPhase
from components.errors import (
    IncompatibleLayout,
    IntegrityError,
    MigrateError,
    NoRoom,
    SessionError,
    TransferError,
)
from components.transfer import TransferAgent, TransferHandle, TransferResult

logger = logging.getLogger(__name__)
_QUIET_S = 30.0
"""Longest wait of a request for a failed copy before it recomputes the blocks."""


class LandingZone:
    """Receives requests for one engine."""

    def __init__(self, scheduler: Scheduler, agent: TransferAgent, deadline_s: float, wake: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._agent = agent
        self._deadline_s = deadline_s
        self._wake = wake
        self._rounds: set[asyncio.Task[None]] = set()
        self.flying: Counter[int] = Counter()
        """Blocks that copies hold."""
        self.refused: Counter[str] = Counter()
        """Copies whose blocks were refused, by error code."""

    def reserve(self, active: Active, offer: KVOffer) -> None:
        """Reserve blocks for the offer and begin the first round. Raises ``NoRoom``, with nothing reserved."""
        scheduler = self._scheduler
        if offer.block_size != scheduler.block_size:
            raise IncompatibleLayout(f"KV blocks of {offer.block_size} tokens; here they have {scheduler.block_size}")
        if scheduler.seats() >= scheduler.max_num_seqs:
            raise NoRoom(f"all {scheduler.max_num_seqs} request slots are in use")
        size = scheduler.block_size
        whole = min(offer.num_tokens, len(active.tokens) - 1) // size
        room = max(whole, -(-offer.room_tokens // size))
        # One more block: otherwise the request would be preempted directly after landing.
        if scheduler.pool.free < room + 1:
            raise NoRoom(f"{room + 1} KV blocks are needed, {scheduler.pool.free} are free")
        scheduler.grow(active, room * size)
        active.landing = Landing(offer)
        active.phase = RequestPhase.LANDING
        self._start_round(active, whole)

    def status(self, active: Active) -> LandingStatus:
        """Progress, or the result."""
        if active.landing is not None:
            return active.landing.status(self._scheduler.block_size)
        return active.landed or LandingStatus(reserved=True)

    def extend(self, active: Active, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Begin another round. Raises ``NoRoom``, or ``SessionError`` during the previous round."""
        landing = self._landing(active)
        if landing.round is not None or landing.commit is not None:
            raise SessionError("the previous round is still being copied")
        self._require_same_tokens(active, tokens)
        whole = offer.num_tokens // self._scheduler.block_size
        self._scheduler.grow(active, max(whole * self._scheduler.block_size, offer.room_tokens))
        self._adopt_tokens(active, tokens)
        self._adopt_offer(landing, offer)
        self._start_round(active, whole)

    def commit(self, active: Active, frozen: Frozen) -> None:
        """Copy the tail and run. Raises ``NoRoom`` or ``SessionError``, with nothing changed."""
        landing = self._landing(active)
        if landing.commit is not None:
            return
        self._require_same_tokens(active, frozen.output_token_ids)
        self._scheduler.grow(active, frozen.offer.num_tokens)
        self._adopt_tokens(active, frozen.output_token_ids)
        if frozen.rng_state:
            active.generator = int.from_bytes(frozen.rng_state, "little")
        landing.commit = frozen
        if landing.round is None:
            self._start_tail(active, frozen)

    def _landing(self, active: Active) -> Landing:
        if active.landing is None:
            raise SessionError(f"request {active.request_id} is not landing")
        return active.landing

    def _require_same_tokens(self, active: Active, tokens: tuple[int, ...]) -> None:
        if active.outputs != tokens[: active.num_outputs]:
            raise SessionError("the source's tokens differ from those this request started with")

    def _adopt_tokens(self, active: Active, tokens: tuple[int, ...]) -> None:
        active.tokens += tokens[active.num_outputs :]

    def _adopt_offer(self, landing: Landing, offer: KVOffer) -> None:
        """Take a newer offer. Blocks copied from other source blocks than it names count as not copied."""
        copied = slice(landing.landed_blocks)
        moved = offer.block_ids[copied] != landing.offer.block_ids[copied]
        if offer.generation != landing.offer.generation or offer.agents != landing.offer.agents or moved:
            landing.landed_blocks = 0
        landing.offer = offer

    # Rounds

    def _start_tail(self, active: Active, frozen: Frozen) -> None:
        landing = self._landing(active)
        self._adopt_offer(landing, frozen.offer)
        if not frozen.offer.num_tokens:
            # The source was preempted.
            self._run(active, 0)
        else:
            self._start_round(active, len(frozen.offer.block_ids))

    def _start_round(self, active: Active, upto: int) -> None:
        landing = self._landing(active)
        first = landing.landed_blocks
        remote = landing.offer.block_ids[first:upto]
        local = active.blocks[first : first + len(remote)]
        if not remote and landing.commit is None:
            return
        landing.progress = msgspec.structs.replace(landing.progress, rounds=landing.progress.rounds + 1)
        self._scheduler.pool.hold(local)
        self.flying.update(local)
        landing.round = asyncio.ensure_future(self._round(active, landing, remote, local))
        self._rounds.add(landing.round)
        landing.round.add_done_callback(self._rounds.discard)

    async def _round(self, active: Active, landing: Landing, remote: tuple[int, ...], local: list[int]) -> None:
        moved, error, quiet = TransferResult(), None, True
        try:
            if remote:
                within = (landing.commit.use_within_s if landing.commit else 0.0) or self._deadline_s
                deadline = min(self._deadline_s, within)
                handle = landing.handle = self._agent.fetch(
                    landing.offer.agents[0], remote, local, request_id=active.request_id, deadline_s=deadline
                )
                try:
                    moved = await handle
                except MigrateError as failed:
                    error = failed
                    logger.warning("KV blocks of request %s did not arrive: %s", active.request_id, failed)
                    quiet = await self._until_quiet(handle)
        finally:
            landing.handle = landing.round = None
            if quiet:
                self._scheduler.pool.drop(local)
                self.flying.subtract(local)
            else:
                # Unusable until the process ends; the request ends below.
                logger.error("blocks %s are given up: a peer that hangs may still write into them", local)
        if active.ended:
            return
        landing.progress = landing.progress.after(
            moved.bytes, moved.descriptors, moved.post_s, moved.wire_s, moved.lane
        )
        if error is None:
            landing.landed_blocks += len(local)
        else:
            self._refuse(landing, error)
        if not quiet:
            self._scheduler.end_request(active, FinishReason.ERROR, (TransferError.code, str(error)))
        elif landing.commit is not None:
            self._settle_commit(active, landing, landing.commit)
        self._wake()

    async def _until_quiet(self, handle: TransferHandle) -> bool:
        end = time.monotonic() + _QUIET_S
        while set(handle.unsafe_blocks) & self._agent.unsafe_blocks():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.001)
        return True

    def _settle_commit(self, active: Active, landing: Landing, frozen: Frozen) -> None:
        if landing.offer is not frozen.offer:
            # The commit came during this round: copy the tail now.
            self._start_tail(active, frozen)
            return
        checked = self._checked(landing, frozen)
        wrong = self._first_wrong_block(active, checked, frozen)
        if wrong is not None:
            error = IntegrityError(f"block {wrong} differs from what the source has")
            logger.warning("request %s: %s", active.request_id, error)
            self._refuse(landing, error)
            # The checked blocks stand for those before them: when a source has lost its blocks, all differ.
            landing.landed_blocks = wrong if checked[0] == 0 else 0
        good = landing.landed_blocks * self._scheduler.block_size
        self._run(active, min(good, frozen.offer.num_tokens))

    def _refuse(self, landing: Landing, error: MigrateError) -> None:
        landing.progress = msgspec.structs.replace(landing.progress, error=(error.code, str(error)))
        self.refused[error.code] += 1

    def _checked(self, landing: Landing, frozen: Frozen) -> range:
        """Positions of copied blocks with a known source checksum."""
        return range(len(frozen.offer.block_ids) - len(frozen.checksums), landing.landed_blocks)

    def _first_wrong_block(self, active: Active, checked: range, frozen: Frozen) -> int | None:
        """Position of the first checked block that differs from the source."""
        before = len(frozen.offer.block_ids) - len(frozen.checksums)
        local = self._agent.checksums([active.blocks[i] for i in checked])
        remote = [frozen.checksums[i - before] for i in checked]
        return next((i for i, a, b in zip(checked, local, remote, strict=True) if a != b), None)

    def _run(self, active: Active, computed: int) -> None:
        """End the landing: decode, after recomputing what is missing."""
        landing = self._landing(active)
        active.landed = landing.status(self._scheduler.block_size)
        active.landing = None
        active.computed = min(computed, len(active.tokens) - 1)
        self._scheduler.run(active)
        self._wake()

    async def close(self) -> None:
        """Wait for rounds whose requests have ended."""
        if self._rounds:
            await asyncio.wait(self._rounds, timeout=self._deadline_s)

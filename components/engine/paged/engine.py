# SPDX-License-Identifier: Apache-2.0
"""The engine protocol over paged KV blocks and no model; see the package.

Life cycle: ``start`` makes the KV tensors, registers them with a transfer agent and starts the step loop; ``stop``
ends everything. Threading: one asyncio loop; only the agent has threads.
Time-outs: the caller's, except one: the engine ends a frozen or landing request whose owner is silent for ``lease_s``.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import msgspec

from components.engine.kv import CommitTo, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.leases import Leases
from components.engine.paged import tables
from components.engine.paged.blocks import BlockPool
from components.engine.paged.landing import LandingZone
from components.engine.paged.model import PagedKV, generator_of, salt_of
from components.engine.paged.options import PagedOptions
from components.engine.paged.request import Active, read
from components.engine.paged.scheduler import Scheduler
from components.engine.protocol import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    RequestInfo,
    RequestPhase,
)
from components.errors import InvalidRequest, SessionError, WorkerLost
from components.transfer import AgentConfig, SharedZeros, TransferAgent

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """State between ``start`` and ``stop``."""

    info: EngineInfo
    agent: TransferAgent
    scheduler: Scheduler
    landings: LandingZone
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class PagedEngine:
    """``components.engine.protocol.Engine`` without a model."""

    def __init__(self, options: PagedOptions, agents: Callable[[AgentConfig], TransferAgent] = TransferAgent) -> None:
        """``agents`` makes the transfer agent; simulations bring one without threads."""
        self.options = options
        self._agents = agents
        self._parts: Parts | None = None
        self._loop: asyncio.Task[None] | None = None
        self._arrivals = itertools.count()
        self._step_s = 0.0
        self._leases: Leases[Active] = Leases(options.lease_s, self._lost)

    async def start(self) -> EngineInfo:
        """Make the KV blocks and publish them. Raises ``ConfigError``, ``TransferError``."""
        options = self.options
        options.validate()
        sizes = (options.num_blocks, options.block_size, options.layers, options.words, options.vocab_size)
        with SharedZeros() if options.agent.get("transport", "auto") in ("auto", "shm") else nullcontext():
            kv = PagedKV(*sizes)
        pool = BlockPool(options.num_blocks)
        scheduler = Scheduler(kv, pool, options.max_num_seqs, options.max_num_batched_tokens)
        layout = (options.model, options.block_size, options.layers, options.words, options.vocab_size, options.seed)
        fingerprint = hashlib.sha256(repr(layout).encode()).hexdigest()[:32]
        settings = {**options.agent, "fingerprint": fingerprint, "block_size": options.block_size}
        agent = self._agents(AgentConfig.of({**settings, "dtype": "int64", "layers": options.layers}))
        await asyncio.get_running_loop().run_in_executor(None, agent.start, kv.pools())
        scheduler.agents = (agent.ref,)
        scheduler.checksums = lambda blocks: agent.checksums(self._checked(blocks))
        info = EngineInfo(
            model=options.model,
            fingerprint=fingerprint,
            block_size=options.block_size,
            num_blocks=options.num_blocks,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            agents=scheduler.agents,
            lanes=agent.lanes,
            kv_bytes_per_token=kv.bytes_per_token,
            lease_s=options.lease_s,
        )
        landings = LandingZone(scheduler, agent, options.copy_deadline_s, self._wake)
        self._parts = Parts(info, agent, scheduler, landings)
        self._loop = asyncio.ensure_future(self._run(self._parts))
        return info

    def _checked(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        return {"full": blocks, "tail": blocks[-2:], "off": ()}[self.options.integrity]

    async def stop(self) -> None:
        """End all requests and release everything. Idempotent."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        if self._loop is not None:
            self._loop.cancel()
        self._end_all(parts, "the engine was stopped")
        await parts.landings.close()
        await asyncio.get_running_loop().run_in_executor(None, parts.agent.close)

    def _end_all(self, parts: Parts, why: str) -> None:
        for active in list(parts.scheduler.requests.values()):
            self._end(active, FinishReason.ERROR, (WorkerLost.code, why))

    @property
    def parts(self) -> Parts:
        """Raises ``WorkerLost`` while it does not run."""
        if self._parts is None or self._loop is None or self._loop.done():
            raise WorkerLost("the engine does not run")
        return self._parts

    # Steps

    async def _run(self, parts: Parts) -> None:
        try:
            while True:
                began = time.monotonic()
                if not parts.scheduler.begin():
                    parts.wake.clear()
                    await parts.wake.wait()
                    continue
                await asyncio.sleep(self.options.step_s)
                parts.scheduler.end()
                self._step_s = time.monotonic() - began
        except Exception as error:
            logger.exception("the step loop has failed")
            self._end_all(parts, f"the engine's step loop has failed: {error}")

    def _wake(self) -> None:
        if self._parts is not None:
            self._parts.wake.set()

    # Requests

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        """See the protocol. Raises ``InvalidRequest``, ``NoRoom`` or ``IncompatibleLayout`` before anything starts."""
        active = self._enter(read(request))
        try:
            while True:
                output = await active.out.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._leases.stop(active)
            if not active.ended:
                self._end(active, FinishReason.CANCELLED)

    def _enter(self, request: GenerateRequest) -> Active:
        parts, options, sampling = self.parts, self.options, request.sampling
        room = options.max_model_len - len(request.prompt_token_ids)
        if request.request_id in parts.scheduler.requests:
            raise SessionError(f"request id {request.request_id} is in use in this engine")
        if not request.prompt_token_ids or room <= 0:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt_token_ids)} tokens; 1 to {options.max_model_len - 1} are possible"
            )
        if sampling.n != 1:
            raise InvalidRequest("this engine gives one answer to a request")
        active = Active(
            request=request,
            tokens=[*request.prompt_token_ids, *request.output_token_ids],
            born=time.monotonic(),
            arrival=next(self._arrivals),
            phase=RequestPhase.WAITING,
            max_outputs=min(room, room if sampling.max_tokens is None else sampling.max_tokens),
            salt=salt_of(sampling, options.seed),
            generator=generator_of(sampling, len(request.output_token_ids)),
        )
        if active.num_outputs >= active.max_outputs:
            raise InvalidRequest(f"{active.num_outputs} tokens were generated, {active.max_outputs} are allowed")
        if request.landing is not None:
            parts.landings.reserve(active, request.landing)
            self._leases.renew(active)
        parts.scheduler.requests[request.request_id] = active
        self._wake()
        return active

    def _end(self, active: Active, reason: FinishReason, error: tuple[str, str] | None = None) -> None:
        self._leases.stop(active)
        if self._parts is not None:
            self._parts.scheduler.end_request(active, reason, error)
            self._wake()
        elif not active.ended:
            active.ended = True
            active.finish(reason, error)

    async def abort(self, request_id: RequestId) -> None:
        """End a request in any phase; unknown ids are ignored."""
        active = self.parts.scheduler.requests.get(request_id)
        if active is not None:
            self._end(active, FinishReason.CANCELLED)

    async def release(self, request_id: RequestId) -> None:
        """Another engine continues the request: free its blocks here."""
        active = self.parts.scheduler.requests.get(request_id)
        if active is not None:
            self._end(active, FinishReason.FROZEN)

    async def offer(self, request_id: RequestId) -> KVOffer:
        """The full, computed blocks of a request."""
        return self.parts.scheduler.offer(self.parts.scheduler.get(request_id), whole_blocks=True)

    async def freeze(
        self, request_id: RequestId, commit_to: CommitTo | None = None, use_within_s: float = 0.0
    ) -> Frozen:
        """Stop generating and return the state; it is sent to nobody."""
        active = self.parts.scheduler.get(request_id)
        frozen = await self.parts.scheduler.freeze(active)
        if not active.ended:
            self._leases.renew(active)
        return frozen

    async def resume(self, request_id: RequestId) -> None:
        """Continue generating."""
        active = self.parts.scheduler.get(request_id)
        if active.landing is None:
            # One that still lands runs elsewhere: only its owner's commit ends its lease.
            self._leases.stop(active)
        self.parts.scheduler.resume(active)
        self._wake()

    async def landing_status(self, request_id: RequestId, wait_s: float = 0.0) -> LandingStatus:
        """Progress of a landing request."""
        active = self.parts.scheduler.get(request_id)
        if active.landing is not None:
            self._leases.renew(active)
        return self.parts.landings.status(active)

    async def extend(self, request_id: RequestId, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another pre-copy round."""
        active = self.parts.scheduler.get(request_id)
        self._leases.renew(active)
        self.parts.landings.extend(active, offer, tokens)

    async def expect_commit(self, request_id: RequestId, hold_s: float) -> None:
        """Ignored: steps of this engine are short pauses, and a commit waits for the end of one."""

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        """Copy what is missing and run."""
        active = self.parts.scheduler.get(request_id)
        self.parts.landings.commit(active, frozen)
        self._leases.stop(active)

    async def report(self) -> tuple[EngineStats, list[RequestInfo]]:
        """Load and table."""
        scheduler, now = self.parts.scheduler, time.monotonic()
        stats = tables.stats(scheduler, self._step_s)
        refused = dict(self.parts.landings.refused)
        stats = msgspec.structs.replace(stats, leases_expired_total=self._leases.expired, kv_refused=refused)
        return stats, [active.describe(now) for active in scheduler.requests.values()]

    async def check_integrity(self) -> None:
        """Raise ``SessionError`` when blocks and requests do not add up."""
        tables.verify(self.parts.scheduler, self.parts.landings.flying)

    def _lost(self, active: Active, error: tuple[str, str]) -> None:
        self._end(active, FinishReason.ERROR, error)

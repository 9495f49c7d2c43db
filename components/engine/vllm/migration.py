# SPDX-License-Identifier: Apache-2.0
"""Migration inside a vLLM scheduler: records of its requests, and the calls of ``kv_control``.

Life of a record: made for every request when vLLM adds it (``on_new_request``), dropped at its end
(``request_finished``). A request without a ``Marker`` is a plain one, which can be frozen and moved.

Threading: the engine core's thread. ``control`` runs between two steps; the hooks are vLLM's.
Errors: those of the engine protocol, raised by ``control``.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.request import RequestStatus

from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo
from components.engine.vllm.claims import require_same
from components.engine.vllm.compat.requests import external_id
from components.engine.vllm.compat.resumed import as_resumed
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.compat.tokens import known
from components.engine.vllm.control import MARKER, Call, Marker, Op, Reply, decode_marker, encode
from components.engine.vllm.direct import Inbox
from components.engine.vllm.handoff import Handoff
from components.engine.vllm.migrate_in import MigrateIn
from components.engine.vllm.migrate_out import MigrateOut
from components.engine.vllm.ranks import Ranks
from components.engine.vllm.records import Install, Record, StepMetadata, StepResults
from components.engine.vllm.tables import request_table, stats_of, verify_blocks
from components.errors import ConfigError, MigrateError, RequestNotFound, SessionError
from components.timeline import mark

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.executor import Executor
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)
_ENDED_EARLY = 16


@dataclass(frozen=True)
class Settings:
    """``kv_connector_extra_config["migration"]``."""

    integrity: str = "tail"
    """Checksums: ``tail`` (last two blocks), ``full`` or ``off``."""
    wait_bytes: int = 16 << 20
    """Size up to which a commit's copy is made between two steps; larger copies run beside the steps."""
    copy_deadline_s: float = 30.0
    adapters: str = ""
    """Digest of the LoRA adapters; part of the fingerprint."""
    host: str = "127.0.0.1"
    """Address at which other engines reach this one."""

    @property
    def checked_blocks(self) -> int | None:
        """Number of blocks at the end of a request with a checksum; None: all. Raises ``ConfigError``."""
        counts: dict[str, int | None] = {"tail": 2, "off": 0, "full": None}
        if self.integrity not in counts:
            raise ConfigError(f"integrity {self.integrity!r} is not one of {', '.join(counts)}")
        return counts[self.integrity]


class Migration:
    """See the module docstring."""

    def __init__(self, port: SchedulerPort, settings: Settings) -> None:
        self.port = port
        self.outgoing = MigrateOut(port, settings.checked_blocks, self._attached)
        inbox = Inbox(settings.host)
        self.incoming = MigrateIn(port, settings.wait_bytes, settings.copy_deadline_s, self._attached, inbox)
        self.handoff = Handoff(port, self.incoming, self.outgoing)
        self._ranks: Ranks | None = None
        self._records: dict[str, Record] = {}
        self._named: dict[RequestId, list[Record]] = {}
        """Records by the caller's id, which several requests can share. The oldest one has the name."""
        self._ended_early: dict[RequestId, tuple[int, ...]] = {}
        """The last requests that ended by themselves after a direct commit, perhaps before their worker's."""
        self.untold: dict[str, bytes] = {}
        """Encoded tokens of direct commits whose worker's commit has not come, by vLLM's id. Each output of such a
        request has them, because vLLM's client joins outputs and keeps only the last one's parameters."""
        self._step_began = 0.0
        self._last_step_s = 0.0
        self._past_preemptions = 0

    def _attached(self) -> Ranks:
        if self._ranks is None:
            raise SessionError("the engine has not been asked for its agents (``Op.INFO``), which comes first")
        return self._ranks

    # Calls

    def control(self, call: Call, executor: Executor) -> Reply | Future[Reply]:
        """Run one call between two steps."""
        match call.op:
            case Op.INFO:
                return self._info(Ranks(executor))
            case Op.REPORT:
                return self._report()
            case Op.CHECK:
                others = (*self.incoming.copies.kept_blocks(), *self.handoff.lent_blocks())
                verify_blocks(self.port, self._records.values(), others)
                return Reply()
            case Op.RELEASE:
                self.handoff.release(call.request_id, call.expired)
                return Reply()
            case Op.COMMIT if call.frozen is not None and call.request_id in self._ended_early:
                require_same(self._ended_early[call.request_id], call.frozen)
                return Reply()
        record = self.record(call.request_id)
        match call.op:
            case Op.OFFER:
                return Reply(offer=self.outgoing.offer(record))
            case Op.FREEZE:
                return self.outgoing.freeze(record, call.commit_to, call.use_within_s)
            case Op.RESUME:
                self.outgoing.resume(record)
            case Op.LANDING:
                return self.incoming.landing(record, wait=call.hold_s > 0)
            case Op.EXTEND if call.offer is not None:
                self.incoming.extend(record, call.offer, call.tokens)
            case Op.COMMIT if call.frozen is not None:
                self.incoming.commit(record, call.frozen)
                self.untold.pop(record.request.request_id, None)
            case _:
                raise SessionError(f"call {call.op} lacks its arguments")
        return Reply()

    def find(self, request_id: RequestId) -> Record | None:
        """A request by vLLM's id or the caller's."""
        return self._records.get(request_id) or next(iter(self._named.get(request_id, ())), None)

    def record(self, request_id: RequestId) -> Record:
        """``find``. Raises ``RequestNotFound`` in place of None."""
        record = self.find(request_id)
        if record is None:
            raise RequestNotFound(f"request {request_id} is not in this engine")
        return record

    def before_step(self) -> None:
        """Land what has been committed since the last step."""
        self.take_commits()
        self.incoming.copies.before_step()

    def take_commits(self) -> None:
        """Direct commits since the last step. A refused one is only logged: the worker's commit gets the error."""
        for call in self.incoming.inbox.take():
            self._take_commit(call)

    def _take_commit(self, call: Call) -> None:
        record = self._records.get(call.request_id)
        try:
            if record is not None and call.frozen is not None:
                self.incoming.commit(record, call.frozen, direct=True)
                if record.direct is not None:
                    self.untold[call.request_id] = encode(record.direct)
        except MigrateError as error:
            logger.debug("request %s: direct commit refused: %s", call.request_id, error)
        except Exception:
            logger.exception("request %s: direct commit", call.request_id)

    def _info(self, ranks: Ranks) -> Reply:
        infos = ranks.attach()
        self._ranks = ranks
        self.outgoing.agents = tuple(info.agent for info in infos)
        per_block = sum(info.block_bytes for info in infos)
        cache = self.incoming.cache
        cache.bytes_per_block, cache.num_ranks = per_block, len(infos)
        cache.divides = all(info.divides for info in infos)
        model, batch = self.port.config.model_config, self.port.config.scheduler_config
        info = EngineInfo(
            model=str(model.served_model_name or model.model),
            fingerprint=infos[0].fingerprint,
            block_size=self.port.config.cache_config.block_size,
            num_blocks=self.port.num_blocks,
            max_model_len=model.max_model_len,
            max_num_seqs=batch.max_num_seqs,
            max_num_batched_tokens=batch.max_num_batched_tokens,
            agents=self.outgoing.agents,
            lanes=infos[0].lanes,
            kv_bytes_per_token=sum(per_block // group.block_size for group in self.port.groups if not group.windowed),
            steps_ahead=int(bool(batch.async_scheduling)),
            weights=infos[0].weights,
        )
        return Reply(info=info)

    def _report(self) -> Reply:
        records = self._records.values()
        stats = msgspec.structs.replace(
            stats_of(self.port, records),
            # Entering with tokens counts as one.
            preemptions_total=self._past_preemptions + sum(record.request.num_preemptions for record in records),
            kv_refused=dict(self.incoming.copies.refused),
            step_s=self._last_step_s,
        )
        return Reply(stats=stats, requests=request_table(self.port, records, self.outgoing.why_not))

    def expects_commit(self, request_id: RequestId) -> bool:
        """True while a landed request waits for its commit."""
        record = self.find(request_id)
        return record is not None and self.incoming.holds(record)

    # vLLM's hooks

    def on_new_request(self, request: Request) -> None:
        """vLLM has queued a request."""
        params = request.kv_transfer_params or {}
        # Removed from vLLM's parameters, which vLLM logs in a crash: the marker may contain tokens.
        data = params.pop(MARKER, None)
        marker = Marker(external_id(request)) if data is None else decode_marker(data)
        record = Record(request, marker, born=time.monotonic())
        self._records[request.request_id] = record
        self._named.setdefault(record.request_id, []).append(record)
        self._ended_early.pop(record.request_id, None)
        if marker.num_prompt_tokens is not None:
            record.needs_install = as_resumed(request, marker.num_prompt_tokens)
            if request.num_prompt_tokens != marker.num_prompt_tokens:
                # Images become other tokens here: the request has no landing, and a commit fails.
                record.marker = marker = msgspec.structs.replace(marker, landing=None)
        if request.use_structured_output and (record.needs_install or marker.landing is not None):
            record.grammar = self.port.replay_grammar(request)
        if marker.landing is not None:
            known(request)
            self.incoming.begin(record, marker.landing)
        self.handoff.begin(record)

    def external_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM asks for the number of tokens from another engine; (None, False) holds the request."""
        record = self._records.get(request.request_id)
        if record is None:
            return 0, False
        if self.incoming.holds(record) or not self._guided(record):
            return None, False
        return self.handoff.external_tokens(record, num_computed_tokens)

    def _guided(self, record: Record) -> bool:
        """True once a request's grammar, if any, has followed the tokens that it came with."""
        if record.grammar is not None:
            try:
                if not record.grammar.ready:
                    return False
                record.grammar.catch_up(record.request.output_token_ids)
            except SessionError as error:
                logger.warning("request %s ends: %s", record.request_id, error)
                self.port.fail_grammar(record.request)
                return False
            record.grammar = None
        return True

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM has allocated blocks for a queued request."""
        record = self._records.get(request.request_id)
        if record is not None and record.handoff is not None:
            self.handoff.allocated(record, blocks.get_block_ids(), num_external_tokens)

    def before_finish(self, vllm_ids: list[str]) -> None:
        """Requests will end by a client's call."""
        for vllm_id in vllm_ids:
            record = self._records.get(vllm_id)
            # A load of another connector goes on into blocks that are free only afterwards.
            if record is not None and record.incoming is not None:
                self.port.let_finish(record.request)

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """A request has ended. Its blocks are freed then, unless a job keeps them or they are lent.

        Returns the description of lent blocks for a decode engine.
        """
        record = self._records.pop(request.request_id, None)
        if record is None:
            return None
        self._named[record.request_id].remove(record)
        if not self._named[record.request_id]:
            del self._named[record.request_id]
        self._past_preemptions += request.num_preemptions
        if record.direct is not None and request.status is not RequestStatus.FINISHED_ABORTED:
            self._ended_early[record.request_id] = record.direct
            if len(self._ended_early) > _ENDED_EARLY:
                del self._ended_early[next(iter(self._ended_early))]
        self.outgoing.finished(record)
        self.incoming.finished(record)
        return self.handoff.lend(record)

    def step_metadata(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """Work of the workers for this step."""
        self._step_began = time.monotonic()
        jobs, cancelled = self.incoming.copies.take_new_jobs()
        self.port.step()
        meta = StepMetadata(jobs=jobs, cancelled=cancelled, to_sum=self.handoff.to_sum(scheduler_output))
        cached = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for vllm_id in (*cached, *(new.req_id for new in scheduler_output.scheduled_new_reqs)):
            record = self._records.get(vllm_id)
            if record is not None and record.landed is not None:
                mark("target-core", "first step", record.request_id)
            if record is not None and record.needs_install and vllm_id in cached:
                record.needs_install = False
                meta.installs.append(_install(record))
        return meta

    def step_results(self, results: StepResults) -> None:
        """Results of the workers at the end of a step."""
        self.incoming.copies.take_results(results)

    def after_step(self) -> None:
        """Freeze requests that waited for this step."""
        self._last_step_s = time.monotonic() - self._step_began
        self.outgoing.after_step()

    def forget_ended(self) -> None:
        """Forget direct commits of requests that have ended."""
        for vllm_id in self.untold.keys() - self._records.keys():
            del self.untold[vllm_id]

    def close(self) -> None:
        """At the end of the engine. Idempotent."""
        self.incoming.inbox.close()
        self.outgoing.outbox.close()

    def has_only_taken_out(self) -> bool:
        """True when the engine only keeps frozen requests."""
        return not self.incoming.copies.busy and self.port.is_idle_but_for(self.outgoing.num_taken_out)


def _install(record: Record) -> Install:
    request: Any = record.request
    return Install(
        request.request_id,
        list(request.prompt_token_ids),
        list(request.output_token_ids),
        request.sampling_params,
        request.lora_request,
        record.rng_state,
        request.mm_features,
    )

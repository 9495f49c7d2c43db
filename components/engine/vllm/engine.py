# SPDX-License-Identifier: Apache-2.0
"""The engine protocol over vLLM's ``AsyncLLM``.

Life cycle: ``start`` builds the engine core (a child process) and waits for it; ``stop`` ends it.
Threading: one asyncio loop; every call into the core is one message and one answer.
Time-outs: the caller's, except one: a frozen or landing request whose owner is silent for ``lease_s``
is ended here, with an error on its stream, so that a lost router cannot hold KV blocks for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from components.engine.protocol import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Frozen,
    GenerateOutput,
    GenerateRequest,
    KVOffer,
    LandingStatus,
    RequestId,
    RequestInfo,
)
from components.engine.vllm.control import MARKER, Call, Op, Reply, decode_frozen, decode_reply, encode
from components.engine.vllm.sampling import finish_reason, logprobs_of, to_vllm
from components.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    MigrateError,
    RequestNotFound,
    SessionError,
    WorkerLost,
)
from components.models import adapters

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Live:
    """What this process keeps of a request in the engine."""

    lease: asyncio.TimerHandle | None = None
    ended: GenerateOutput | None = None
    """Final output to give instead of vLLM's, once somebody ended the request on purpose."""
    delivered: int = 0


@dataclass(frozen=True)
class VLLMOptions:
    """Arguments of the engine: vLLM's own, and those of the hand-over."""

    engine_args: dict[str, Any]
    """Keyword arguments of vLLM's ``AsyncEngineArgs``."""
    agent: dict[str, Any]
    """Fields of ``components.transfer.AgentConfig``; layout fields are filled in by the worker."""
    integrity: str = "tail"
    """Checksums: ``tail`` (last two blocks), ``full`` or ``off``."""
    wait_bytes: int = 16 << 20
    """Copies up to this size finish within the step that needs them; larger ones run beside the steps."""
    copy_deadline_s: float = 30.0
    lease_s: float = 60.0
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters: name and PEFT folder."""


class VLLMEngine:
    """``components.engine.protocol.Engine`` on vLLM."""

    def __init__(self, options: VLLMOptions) -> None:
        self._options = options
        self._llm: Any = None
        self._info: EngineInfo | None = None
        self._live: dict[RequestId, _Live] = {}
        self._leases_expired = 0

    @property
    def info(self) -> EngineInfo:
        """Known from ``start`` on."""
        if self._info is None:
            raise WorkerLost("the engine has not been started")
        return self._info

    async def start(self) -> EngineInfo:
        """Start vLLM. Raises ``ConfigError`` with vLLM's own reason when it refuses the arguments."""
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._options.engine_args.get("enforce_eager"):
            # vLLM compiles a helper of its log-probabilities even then: 20 s at the first request that asks.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        transfer = KVTransferConfig(
            kv_connector="MigrationConnector",
            kv_connector_module_path="components.engine.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "agent": self._options.agent,
                "migration": {
                    "integrity": self._options.integrity,
                    "wait_bytes": self._options.wait_bytes,
                    "copy_deadline_s": self._options.copy_deadline_s,
                    "adapters": adapters.digest(self._options.lora_modules),
                },
            },
        )
        try:
            args = AsyncEngineArgs(
                distributed_executor_backend=executor(self._options.engine_args),
                kv_transfer_config=transfer,
                worker_extension_cls="components.engine.vllm.runner_state.WorkerExtension",
                **self._options.engine_args,
            )
            config = args.create_engine_config()
            asynchronous = bool(config.scheduler_config.async_scheduling)
            kind = "AsyncMigrationScheduler" if asynchronous else "MigrationScheduler"
            config.scheduler_config.scheduler_cls = f"components.engine.vllm.scheduler.{kind}"
            self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise ConfigError(f"vLLM did not start: {error}") from error
        reply = await self._call(Call(Op.INFO))
        model = config.model_config
        self._info = EngineInfo(
            model=str(model.served_model_name or model.model),
            fingerprint=reply.fingerprint,
            block_size=config.cache_config.block_size,
            num_blocks=reply.num_blocks,
            max_model_len=model.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            agents=reply.agents,
            lanes=reply.lanes,
            kv_bytes_per_token=reply.kv_bytes_per_token,
            lease_s=self._options.lease_s,
        )
        return self._info

    async def stop(self) -> None:
        """End the engine core. Idempotent."""
        llm, self._llm = self._llm, None
        if llm is not None:
            # It takes the end of its core, which is about to be asked for, for a failure and prints where it was.
            logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
            # vLLM's five seconds are too short where several engines share few cores.
            await asyncio.get_running_loop().run_in_executor(None, llm.shutdown, 20.0)

    async def check_health(self) -> None:
        """Raise ``WorkerLost`` when the engine core has died."""
        if self._llm is None:
            raise WorkerLost("the engine has been stopped")
        try:
            await self._llm.check_health()
        except Exception as error:
            raise WorkerLost(f"vLLM's engine core is dead: {error}") from error

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        """See the protocol. Raises ``InvalidRequest`` before anything was started."""
        if request.request_id in self._live:
            raise SessionError(f"request id {request.request_id} is in use in this engine")
        adapter = self._adapter(request.lora_name)
        params = to_vllm(request, self.info.max_model_len)
        prompt: dict[str, Any] = {"prompt_token_ids": [*request.prompt_token_ids, *request.output_token_ids]}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        live = self._live[request.request_id] = _Live(delivered=len(request.output_token_ids))
        if request.landing is not None:
            self._renew_lease(request.request_id)
        stream = self._llm.generate(prompt, params, request.request_id, lora_request=adapter, priority=request.priority)
        try:
            async for item in stream:
                if item.finished and live.ended is not None:
                    # vLLM may have joined the last tokens with the end that we asked for.
                    for output in self._outputs(request.request_id, live, item):
                        if output.token_ids:
                            yield msgspec.structs.replace(output, finish_reason=None, stop_reason=None)
                    break
                for output in self._outputs(request.request_id, live, item):
                    yield output
            if live.ended is not None:
                yield msgspec.structs.replace(live.ended, index=live.delivered)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(str(error)) from error
        except MigrateError:
            raise
        except Exception as error:
            if type(error).__name__ not in ("EngineDeadError", "EngineGenerateError"):
                raise
            yield GenerateOutput(live.delivered, finish_reason=FinishReason.ERROR, error=(WorkerLost.code, str(error)))
        finally:
            self._drop(request.request_id)
            await stream.aclose()

    def _adapter(self, name: str | None) -> Any:
        if name is None:
            return None
        from vllm.lora.request import LoRARequest

        names = sorted(self._options.lora_modules)
        if name not in names:
            known = ", ".join(names) or "none"
            raise InvalidRequest(f"no LoRA adapter {name!r} is loaded in this engine; loaded: {known}")
        return LoRARequest(name, names.index(name) + 1, self._options.lora_modules[name])

    def _outputs(self, request_id: RequestId, live: _Live, item: Any) -> list[GenerateOutput]:
        sample = item.outputs[0]
        tokens = tuple(sample.token_ids)
        index = live.delivered
        live.delivered += len(tokens)
        reason = finish_reason(sample.finish_reason) if item.finished else None
        frozen = None
        if item.kv_transfer_params and MARKER in item.kv_transfer_params:
            frozen = decode_frozen(item.kv_transfer_params[MARKER])
            self._renew_lease(request_id)
        if not tokens and reason is None and frozen is None:
            return []
        return [
            GenerateOutput(
                index=index,
                token_ids=tokens,
                logprobs=logprobs_of(sample.logprobs, tokens),
                finish_reason=reason,
                stop_reason=sample.stop_reason,
                frozen=frozen,
                cached_tokens=item.num_cached_tokens or 0,
            )
        ]

    async def abort(self, request_id: RequestId) -> None:
        """End a request in any phase; unknown ids are ignored."""
        await self._end(request_id, FinishReason.CANCELLED, None)

    async def release(self, request_id: RequestId) -> None:
        """Another engine goes on with the request: free its blocks here."""
        await self._end(request_id, FinishReason.FROZEN, None)

    async def _end(self, request_id: RequestId, reason: FinishReason, error: tuple[str, str] | None) -> None:
        live = self._live.get(request_id)
        if live is None:
            return
        live.ended = GenerateOutput(live.delivered, finish_reason=reason, error=error)
        await self._llm.abort(request_id)

    async def offer(self, request_id: RequestId) -> KVOffer:
        """The full, computed blocks of a request."""
        return _given((await self._call(Call(Op.OFFER, request_id))).offer)

    async def freeze(self, request_id: RequestId) -> Frozen:
        """Stop generating and return the state."""
        frozen = _given((await self._call(Call(Op.FREEZE, request_id))).frozen)
        self._renew_lease(request_id)
        return frozen

    async def resume(self, request_id: RequestId) -> None:
        """Go on generating."""
        await self._call(Call(Op.RESUME, request_id))
        self._stop_lease(request_id)

    async def landing_status(self, request_id: RequestId) -> LandingStatus:
        """Progress of a landing request."""
        self._renew_lease(request_id)
        return _given((await self._call(Call(Op.LANDING, request_id))).landing)

    async def extend(self, request_id: RequestId, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another pre-copy round."""
        self._renew_lease(request_id)
        await self._call(Call(Op.EXTEND, request_id, offer=offer, tokens=tokens))
        self._count_from(request_id, tokens)

    async def expect_commit(self, request_id: RequestId, hold_s: float) -> None:
        """Begin no step before the commit, or for ``hold_s`` at most."""
        await self._call(Call(Op.EXPECT_COMMIT, request_id, hold_s=hold_s))

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        """Copy what is missing and run."""
        self._stop_lease(request_id)
        # Set first: the first token may overtake the answer to this call.
        self._count_from(request_id, frozen.output_token_ids)
        try:
            await self._call(Call(Op.COMMIT, request_id, frozen=frozen))
        except MigrateError:
            self._renew_lease(request_id)
            raise

    def _count_from(self, request_id: RequestId, tokens: tuple[int, ...]) -> None:
        live = self._live.get(request_id)
        if live is not None:
            live.delivered = max(live.delivered, len(tokens))

    async def requests(self) -> list[RequestInfo]:
        """The per-request table."""
        return (await self.report())[1]

    async def stats(self) -> EngineStats:
        """Load at this moment."""
        return (await self.report())[0]

    async def report(self) -> tuple[EngineStats, list[RequestInfo]]:
        """Both of them, in one call."""
        reply = await self._call(Call(Op.REPORT))
        stats = msgspec.structs.replace(_given(reply.stats), leases_expired_total=self._leases_expired)
        return stats, list(reply.requests)

    async def check_integrity(self) -> None:
        """Raise ``SessionError`` when blocks and requests do not add up."""
        await self._call(Call(Op.CHECK))

    async def _call(self, call: Call) -> Reply:
        if self._llm is None:
            raise WorkerLost("the engine has been stopped")
        try:
            data = await self._llm.engine_core.call_utility_async("kv_control", encode(call))
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise WorkerLost(f"vLLM's engine core is dead: {error}") from error
            raise MigrateError(f"{call.op} failed inside vLLM: {error}") from error
        return decode_reply(data)

    # Leases

    def _renew_lease(self, request_id: RequestId) -> None:
        live = self._live.get(request_id)
        if live is None:
            return
        self._stop_lease(request_id)
        loop = asyncio.get_running_loop()
        live.lease = loop.call_later(self._options.lease_s, self._lease_over, request_id)

    def _stop_lease(self, request_id: RequestId) -> None:
        live = self._live.get(request_id)
        if live is not None and live.lease is not None:
            live.lease.cancel()
            live.lease = None

    def _lease_over(self, request_id: RequestId) -> None:
        message = f"its owner was silent for {self._options.lease_s:g} s while the request was on the move"
        logger.warning("request %s ended: %s", request_id, message)
        self._leases_expired += 1
        error = (DeadlineExceeded.code, message)
        task = asyncio.ensure_future(self._end(request_id, FinishReason.ERROR, error))
        task.add_done_callback(lambda done: done.exception())

    def _drop(self, request_id: RequestId) -> None:
        self._stop_lease(request_id)
        self._live.pop(request_id, None)


def executor(engine_args: dict[str, Any]) -> str | None:
    """Where the model runs. On CPUs vLLM starts a process of its own and spins on two cores to talk to it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and engine_args.get("tensor_parallel_size", 1) == 1:
        return "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return None


def _given(value: T | None) -> T:
    if value is None:
        raise RequestNotFound("the engine answered without the value that was asked for")
    return value

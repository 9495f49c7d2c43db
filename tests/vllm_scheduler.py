# SPDX-License-Identifier: Apache-2.0
"""A real vLLM scheduler with migration, without an engine: the test plays steps and answers copies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.vllm.control import MARKER, Call, Marker, Op, Reply, encode
from components.engine.vllm.ranks import RankInfo, Snapshot
from components.engine.vllm.records import Job, JobResult, StepMetadata, StepResults
from components.transfer.ids import AgentName, AgentRef, Epoch

BLOCK = 16
PEER = AgentRef(AgentName("peer"), Epoch("1"))
_numbers = itertools.count()


class FakeExecutor:
    """Workers of an engine; ``copied`` decides how each rank answers a commit's copy."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.jobs: list[Job] = []
        self.calls: list[int] = []
        """Number of jobs of each call that copies."""
        self.frozen: list[int] = []
        """Number of requests of each call that freezes."""
        self.copied: Callable[[Job, float], JobResult | None] = lambda job, _: JobResult(job.job_id, ok=True)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "dm_attach":
            info = RankInfo(AgentRef(AgentName("here"), Epoch("1")), ("tcp",), "fingerprint", 1000, "weights")
            return [info] * self.ranks
        if method == "dm_snapshots":
            self.frozen.append(len(args[0]))
            return [[Snapshot(b"", [0] * len(blocks)) for _, blocks in args[0]]] * self.ranks
        jobs, budget_s = args
        self.jobs += jobs
        self.calls.append(len(jobs))
        return [[self.copied(job, budget_s) for job in jobs] for _ in range(self.ranks)]


class Played:
    """One scheduler with a clock of steps."""

    def __init__(
        self,
        model: str,
        cls: str = "MigrationScheduler",
        v2: bool = False,
        blocks: int = 64,
        windows: tuple[int | str | None, ...] = (None,),
        **more: Any,
    ) -> None:
        """``windows`` of each group of layers; None: it sees everything; a text: it has a state, kept in that mode."""
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            MambaSpec,
            SlidingWindowSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        from components.engine.vllm import scheduler

        self.config = config(model, **more)
        self.config.cache_config.num_gpu_blocks = blocks
        modes = [window for window in windows if isinstance(window, str)]
        if modes:
            self.config.cache_config.mamba_cache_mode = modes[0]
        sizes: Any = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}

        def spec(window: int | str | None) -> Any:
            if isinstance(window, str):
                shapes = {"shapes": ((2, 8),), "dtypes": (torch.float32,), "mamba_cache_mode": window}
                return MambaSpec(block_size=BLOCK if window == "align" else 512, **shapes)
            return SlidingWindowSpec(sliding_window=window, **sizes) if window else FullAttentionSpec(**sizes)

        groups = [KVCacheGroupSpec([f"layer{number}"], spec(window)) for number, window in enumerate(windows)]
        plan = KVCacheConfig(blocks, [], groups)
        self.scheduler: Any = getattr(scheduler, cls)(
            vllm_config=self.config,
            kv_cache_config=plan,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=512 if "none" in modes else BLOCK,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = v2
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._samples: dict[int, list[str]] = {}
        self.token = 7
        """What the model gives as each next token."""
        self.executor = FakeExecutor()
        self.call(Op.INFO)

    def add(self, prompt: list[int], marker: Marker | None = None, name: str = "", **sampling: Any) -> Any:
        """A request as the engine core would add it."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        extra = {"kv_transfer_params": {MARKER: encode(marker)}} if marker else None
        params = SamplingParams(**{"max_tokens": 64, "ignore_eos": True, "extra_args": extra} | sampling)
        number = next(_numbers)
        request = Request(f"{name or f'r{number}'}-{number:08x}", list(prompt), params, None, block_hasher=self._hasher)
        if request.use_structured_output:
            self.scheduler.structured_output_manager.grammar_init(request)
        self.scheduler.add_request(request)
        return request

    def land(self, name: str, tokens: int, generated: int = 1, offer: KVOffer | None = None) -> Any:
        """A request that comes from elsewhere with ``tokens`` tokens, the last of them not computed there."""
        offer = offer or offer_of(name, tokens - 1)
        marker = Marker(RequestId(name), tokens - generated, landing=offer)
        return self.add(list(range(1, tokens + 1)), marker, name)

    def call(self, op: Op, request: Any = "", **fields: Any) -> Reply | Future[Reply]:
        name = request if isinstance(request, str) else RequestId(request.request_id)
        result: Reply | Future[Reply] = self.scheduler.migration.control(
            Call(op, RequestId(name), **fields), self.executor
        )
        return result

    def commit(self, request: Any, tokens: int | None = None) -> None:
        """Commit a landed request whose source has computed all of its tokens but the last."""
        computed = request.num_tokens - 1 if tokens is None else tokens
        offer = offer_of(self.scheduler.migration.record(request.request_id).request_id, computed)
        self.call(Op.COMMIT, request, frozen=Frozen(offer, tuple(request.output_token_ids)))

    def schedule(self) -> Any:
        """Begin a step. None may read blocks that a copy of the same step fills."""
        output = self.scheduler.schedule()
        read = {b for i in output.num_scheduled_tokens for b in self.blocks(self.scheduler.requests[i])}
        written = {block for job in self.jobs(output) for block in job.local_blocks}
        assert not read & written and not output.has_sync_kv_loads
        requests = self.scheduler.requests
        self._samples[id(output)] = [i for i in output.num_scheduled_tokens if not requests[i].is_prefill_chunk]
        return output

    def blocks(self, request: Any) -> list[int]:
        """Of all groups."""
        return [block for ids in self.scheduler.migration.port.tables(request) for block in ids if block]

    def finish_step(self, output: Any, results: StepResults | None = None) -> Any:
        """The model has run: each request that is not within its prompt gets one token."""
        from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        samples = self._samples.pop(id(output))
        sampled = [[self.token] if i in samples else [] for i in ids]
        result = ModelRunnerOutput(ids, {i: n for n, i in enumerate(ids)}, sampled)
        if results is not None:
            meta: Any = MultiKVConnectorWorkerMetadata((results, None)) if self._shared(output) else results
            result.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=meta)
        return self.scheduler.update_from_output(output, result)

    def step(self, results: StepResults | None = None) -> Any:
        """One whole step; what was scheduled."""
        output = self.schedule()
        self.finish_step(output, results)
        return output

    def jobs(self, output: Any) -> list[Job]:
        meta = output.kv_connector_metadata
        if self._shared(output):
            meta = meta.metadata[0]
        assert isinstance(meta, StepMetadata)
        return meta.jobs

    @staticmethod
    def _shared(output: Any) -> bool:
        """Is there another connector beside ours?"""
        return hasattr(output.kv_connector_metadata, "metadata")

    def done(self, *jobs: Job) -> StepResults:
        return StepResults([JobResult(job.job_id, ok=True) for job in jobs])

    def check(self) -> None:
        """Every block is accounted for."""
        self.call(Op.CHECK)

    @property
    def free(self) -> int:
        return int(self.scheduler.migration.port.free_blocks)


def offer_of(name: str, tokens: int, first: int = 100, generation: int = 0) -> KVOffer:
    """Blocks of a source that counts them from ``first``."""
    blocks = tuple(range(first, first + -(-tokens // BLOCK)))
    return KVOffer(RequestId(name), (PEER,), BLOCK, blocks, tokens, generation)


@functools.cache
def config(model: str, wait_bytes: int = 1 << 24, **more: Any) -> Any:
    """vLLM's configuration of an engine that can migrate requests."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from components.engine.vllm import arguments

    fields = {"max_model_len": 512, "block_size": BLOCK, "enforce_eager": True, "max_num_seqs": 4, "seed": 0}
    args = AsyncEngineArgs(model=model, **fields | more)
    arguments.configure(args, {"name": "here"}, {"wait_bytes": wait_bytes})
    return args.create_engine_config()

# SPDX-License-Identifier: Apache-2.0
"""The engine of ``steps``: answers ``[requests at once, tokens]`` on its input with the steps of each request.

Lines that begin with ``answer`` are ours; vLLM may print others. The first steps of a request are left out: the prompts
of its neighbours are computed in them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import time
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

_PROMPT, _SKIPPED = 96, 8
_numbers = itertools.count()


async def _engine(kind: str, model: str, more: dict[str, Any]) -> Any:
    arguments = {"model": model, "max_model_len": 4096, "block_size": 32, "max_num_seqs": 16, "seed": 0}
    arguments |= {"enable_prefix_caching": False, "kv_cache_memory_bytes": 1 << 30, **more}
    from benchmarks.migration.sampled import SampledEngine
    from components.engine.vllm.arguments import executor

    if kind == "without":
        where = executor(arguments.get("tensor_parallel_size", 1))
        config = AsyncEngineArgs(distributed_executor_backend=where, **arguments).create_engine_config()
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    etcd, nats = os.environ["ETCD_ENDPOINTS"], os.environ["NATS_SERVER"]
    agent = {"name": "steps", "etcd_endpoints": etcd.split(","), "nats_url": nats, "namespace": "steps"}
    engine = SampledEngine.of(arguments, agent)
    await engine.start()
    return engine.llm


async def _request(llm: Any, tokens: int) -> list[float]:
    number = next(_numbers)
    chooser = random.Random(number)
    prompt = {"prompt_token_ids": [chooser.randrange(100, 30_000) for _ in range(_PROMPT)]}
    params = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    times: list[float] = []
    async for output in llm.generate(prompt, params, str(number)):
        times += [time.perf_counter()] * len(output.outputs[0].token_ids)
    return [after - before for before, after in itertools.pairwise(times[_SKIPPED:])]


async def _main(kind: str, model: str, more: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    llm = await _engine(kind, model, more)
    print("answer", json.dumps("ready"), file=answers, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        at_once, tokens = json.loads(line)
        steps = await asyncio.gather(*(_request(llm, tokens) for _ in range(at_once)))
        print("answer", json.dumps(steps), file=answers, flush=True)
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))

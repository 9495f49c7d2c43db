# SPDX-License-Identifier: Apache-2.0
"""Live migration in a plain vLLM service, without Dynamo: two engines in one program, one request, one move.

    python -m examples.migrate_in_vllm --model smollm2

The calls are those that a source's worker makes (``components/engine/protocol.py``): reserve and pre-copy while the
source decodes, freeze, commit, release. The agents find each other in an etcd, which is started here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from contextlib import aclosing

import msgspec
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from components.engine.kv import Frozen, RequestId
from components.engine.protocol import GenerateRequest
from components.engine.vllm import native
from components.engine.vllm.arguments import configure
from components.engine.vllm.engine import VLLMEngine
from components.errors import RequestNotFound
from components.models import resolve
from components.serve.servers import Servers

PROMPT, OUTPUT, MOVE_AFTER = 300, 48, 16


def engine(name: str, model: str, etcd: str) -> VLLMEngine:
    """A small engine whose agent is called ``name``."""
    args = {"model": model, "max_model_len": 1024, "block_size": 32, "enforce_eager": True, "max_num_seqs": 4}
    arguments = AsyncEngineArgs(**args, num_gpu_blocks_override=100)
    configure(arguments, {"name": name, "etcd_endpoints": [etcd], "namespace": "example"})
    return VLLMEngine(AsyncLLM.from_engine_args(arguments))


async def plain(source: VLLMEngine, request: GenerateRequest) -> list[int]:
    """The request on one engine from beginning to end."""
    tokens: list[int] = []
    async for output in source.generate(request):
        tokens += output.token_ids
    return tokens


async def landed(target: VLLMEngine, request_id: RequestId) -> None:
    """Wait until the whole blocks of the offer have arrived."""
    while True:
        try:
            status = await target.landing_status(request_id)
            if status.reserved and not status.in_flight:
                return
        except RequestNotFound:
            pass  # It enters the target with the first pull of its stream.
        await asyncio.sleep(0.005)


async def migrate(source: VLLMEngine, target: VLLMEngine, request: GenerateRequest) -> tuple[list[int], float]:
    """The same request, moved after some tokens. Gives its tokens and the downtime in seconds."""
    tokens: list[int] = []
    async with aclosing(source.generate(request)) as stream:
        async for output in stream:
            tokens += output.token_ids
            if len(tokens) >= MOVE_AFTER:
                break
        offer = await source.offer(request.request_id)
        there = target.generate(msgspec.structs.replace(request, landing=offer))
        first = asyncio.ensure_future(anext(there))
        await landed(target, request.request_id)
        frozen: Frozen = await source.freeze(request.request_id)
        stopped = time.perf_counter()
        await target.commit(request.request_id, frozen)
        output = await first
        downtime = time.perf_counter() - stopped
        await source.release(request.request_id)
        # What the source made up to the freeze is in the frozen state: nothing is lost between the two.
        tokens = [*frozen.output_token_ids, *output.token_ids]
        async for output in there:
            tokens += output.token_ids
    return tokens, downtime


async def main(model: str) -> None:
    """Run both ways and compare."""
    servers = Servers()
    etcd = servers.start(os.environ)["ETCD_ENDPOINTS"]
    a, b = engine("a", model, etcd), engine("b", model, etcd)
    try:
        await a.start()
        await b.start()
        params = SamplingParams(temperature=0.8, seed=7, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
        params.output_kind = RequestOutputKind.DELTA
        given, prompt = native.encode(native.Native(params)), tuple(range(1000, 1000 + PROMPT))
        expected = await plain(a, GenerateRequest(RequestId("plain"), prompt, native=given))
        tokens, downtime = await migrate(a, b, GenerateRequest(RequestId("moved"), prompt, native=given))
        print(f"{len(tokens)} tokens, moved after {MOVE_AFTER} or more, downtime {downtime * 1e3:.0f} ms")
        if tokens != expected:
            raise SystemExit("the moved request gave other tokens")
        print("the moved request gave exactly the tokens of the unmoved one")
    finally:
        a.llm.shutdown()
        b.llm.shutdown()
        servers.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2", help="folder or name, or smollm2, tiny-llama")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    asyncio.run(main(resolve(parser.parse_args().model)))

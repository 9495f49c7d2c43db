# SPDX-License-Identifier: Apache-2.0
"""Answers of one plain vLLM engine, the reference for a graph.

Reads {"model", "dtype", "prompts": [...], "chats": [...], "max_tokens"} as JSON; writes the texts, prompts
first, to the file that is its argument. All of it is one process: another would outlive the end of this one, and keep
the pipes that its caller reads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Generate greedily, one request at a time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    llm = LLM(
        task["model"],
        dtype=task["dtype"],
        max_model_len=4096,
        block_size=32,
        enforce_eager=True,
        max_num_seqs=1,
        seed=0,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )
    greedy = SamplingParams(temperature=0, max_tokens=task["max_tokens"])
    texts = [output.outputs[0].text for output in llm.generate(task["prompts"], greedy, use_tqdm=False)]
    chats = [[{"role": "user", "content": text}] for text in task["chats"]]
    texts += [output.outputs[0].text for output in llm.chat(chats, greedy, use_tqdm=False)]
    Path(sys.argv[1]).write_text(json.dumps(texts))


if __name__ == "__main__":
    main()
    os._exit(0)

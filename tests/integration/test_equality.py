# SPDX-License-Identifier: Apache-2.0
"""The disaggregated graph gives what one aggregated vLLM engine gives, and stock clients work on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from components.models import resolve
from tests.integration.graphs import DTYPE, MODEL, ROOT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
COUNT = 24
WORDS = [1, 2, 3, 7, 16, 31, 32, 33, 64, 100, 127, 128, 250, 400, 500, 640, 800, 1000, 1200, 1300]
PROMPTS = [" ".join(["tell"] + [f"me{n % 7}" if n % 3 else "more" for n in range(words - 1)]) for words in WORDS]
CHATS = ["Hello", "Count from 1 to 20.", "Name a colour. " * 30, "Why is the sea salt? " * 100]


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    answer = tmp_path_factory.mktemp("aggregated") / "texts.json"
    task = {"model": resolve(MODEL), "dtype": DTYPE, "prompts": PROMPTS, "chats": CHATS, "max_tokens": COUNT}
    environment = dict(os.environ) | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.aggregated", str(answer)],
        cwd=ROOT,
        env=environment,
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts: list[str] = json.loads(answer.read_text())
    return texts


def ask(graph: Graph, number: int) -> str:
    if number < len(PROMPTS):
        reply = graph.client.completions.create(model=MODEL, prompt=PROMPTS[number], max_tokens=COUNT, temperature=0)
        return reply.choices[0].text
    message = {"role": "user", "content": CHATS[number - len(PROMPTS)]}
    answer = graph.client.chat.completions.create(
        model=MODEL,
        messages=[message],  # type: ignore[list-item]
        max_tokens=COUNT,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("concurrency", [1, 8])
def test_texts_equal_those_of_one_engine(aggregated: list[str], graph: Graph, concurrency: int) -> None:
    with ThreadPoolExecutor(concurrency) as pool:
        texts = list(pool.map(lambda number: ask(graph, number), range(len(PROMPTS) + len(CHATS))))
    assert texts == aggregated


def test_vllm_bench_serve_runs_against_it(graph: Graph) -> None:
    # The command `vllm` itself asks for a distribution of that name, which the CPU build has not.
    code = (
        "from vllm.benchmarks.serve import add_cli_args, main;"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
        "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
    )
    command = [sys.executable, "-c", code, "--backend", "openai"]
    command += ["--base-url", f"http://127.0.0.1:{graph.port}", "--model", MODEL, "--tokenizer", resolve(MODEL)]
    command += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"]
    command += ["--num-prompts", "8", "--max-concurrency", "4", "--ignore-eos"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = {
        line.split(":")[0].strip(): line.split(":")[1].split() for line in done.stdout.splitlines() if ":" in line
    }
    assert figures["Successful requests"] == ["8"]
    assert figures["Total generated tokens"] == ["128"]

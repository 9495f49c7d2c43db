# SPDX-License-Identifier: Apache-2.0
"""The served graph as a user sees it: OpenAI's client, migration under a running stream, an orderly end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest

from tests.conftest import free_port

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PROMPT = "Once upon a time, in a small house by the sea, there lived an old clock maker. " * 12


class Graph:
    """A running ``dynamo serve`` and a client of it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.log = folder / "serve.log"
        self.environment = dict(os.environ) | {"XDG_RUNTIME_DIR": str(folder), "VLLM_SLEEP_WHEN_IDLE": "1", "ETCD_LEASE_TTL": "60"}
        command = [sys.executable, "-m", "components.cli", "serve", "graphs.disagg:Frontend"]
        command += ["-f", "configs/disagg.yaml", "--port", str(self.port), "--Common.model=tiny-llama"]
        self._output = self.log.open("wb")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=self._output, stderr=subprocess.STDOUT
        )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def wait(self, timeout_s: float = 280) -> None:
        end = time.monotonic() + timeout_s
        while b"serving tiny-llama" not in self.log.read_bytes():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the graph did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "components.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120)

    @contextmanager
    def mover(self, mode: str) -> Iterator[subprocess.Popen[str]]:
        """A process that waits for the next request on a decode worker and moves it to the other one."""
        command = [sys.executable, "-m", "tests.integration.move_next", mode]
        process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.wait()

    def complete(self, prompt: str, count: int, **more: object) -> str:
        reply = self.client.completions.create(
            model="tiny-llama", prompt=prompt, max_tokens=count, extra_body={"ignore_eos": True}, **more
        )
        assert reply.usage is not None and reply.usage.completion_tokens == count
        assert reply.choices[0].finish_reason == "length"
        return reply.choices[0].text

    def stop(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self._output.close()
        return [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Iterator[Graph]:
    graph = Graph(tmp_path_factory.mktemp("graph"))
    try:
        graph.wait()
        yield graph
        assert graph.stop() == []
        assert graph.process.returncode == 0
    finally:
        if graph.process.poll() is None:
            graph.stop()


def test_chat_streams_and_answers_alike(graph: Graph) -> None:
    body = {"model": "tiny-llama", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    whole = graph.client.chat.completions.create(**body, temperature=0)
    parts = list(graph.client.chat.completions.create(**body, temperature=0, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 20


def test_seeded_requests_repeat(graph: Graph) -> None:
    first = graph.complete("Tell me", 30, temperature=0.9, seed=5)
    assert graph.complete("Tell me", 30, temperature=0.9, seed=5) == first
    assert graph.complete("Tell me", 30, temperature=0.9, seed=6) != first


@pytest.mark.parametrize("mode", ["live", "stop-and-copy", "replay"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "seeded"])
def test_a_migrated_stream_gives_the_text_of_an_unmigrated_one(
    graph: Graph, mode: str, sampling: dict[str, float]
) -> None:
    prompt = f"{mode} {sampling} {PROMPT}"
    with graph.mover(mode) as mover:
        moved = graph.complete(prompt, 1500, **sampling)
        output, _ = mover.communicate(timeout=60)
    move = json.loads(output)
    assert move["ok"] and move["mode"] == mode, output
    assert 0 < move["tokens"] < 1500
    assert moved == graph.complete(prompt, 1500, **sampling)


def test_wrong_requests_get_openai_errors(graph: Graph) -> None:
    with pytest.raises(openai.NotFoundError):
        graph.client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError, match="token"):
        graph.client.completions.create(model="tiny-llama", prompt="word " * 6000, max_tokens=5)


def test_commands_name_what_is_wrong(graph: Graph) -> None:
    done = graph.command("migrate", "no-such-request", "--to", "0")
    assert done.returncode == 2
    assert "error: no request 'no-such-request' is running" in done.stderr


def test_nothing_is_left_on_the_workers(graph: Graph) -> None:
    status = json.loads(graph.command("status", "--json").stdout)
    assert status["streams"] == []
    for worker in status["workers"]:
        assert worker["stats"]["free_blocks"] == worker["stats"]["total_blocks"]

# SPDX-License-Identifier: Apache-2.0
"""docs/adding.md on stock Dynamo: its commands, two frontends, three workers, unchanged events and overload."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.serve.servers import free_port

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
COMMANDS = {
    name: command
    for name, command in re.findall(r"```sh\n# ([\w ]+)\n(.+)\n```", (ROOT / "docs" / "adding.md").read_text())
}
WORKERS = 3
START_S = 240
LENGTH = 3500
"""The commands that are run meanwhile take seconds to start."""


class Deployment:
    """Processes started by the page's commands, each with its output in a file."""

    def __init__(self, folder: Path, model: str, etcd_url: str, nats_url: str) -> None:
        self.model = model
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "ETCD_ENDPOINTS": etcd_url,
            "NATS_SERVER": nats_url,
            "DYN_NAMESPACE": "adding",
            "MODEL": model,
            # Of this machine, and the same for stock workers.
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_SLEEP_WHEN_IDLE": "1",
            "ETCD_LEASE_TTL": "60",
        }

    def start(self, name: str, command: str, **more: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=ROOT,
                env=self.environment | more,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def wait(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_S
        while not ready():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} has ended:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < end, {name: self.log(name)[-1500:] for name in self._processes}
            time.sleep(0.5)

    def dynamo(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["python", "-m", "components.cli", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )

    def running(self) -> list[dict[str, Any]]:
        """Requests that decode somewhere, each with its worker."""
        told = self.dynamo("status", "-o", "json")
        assert told.returncode == 0, told.stderr
        return [
            row | {"worker": worker["worker"]}
            for worker in json.loads(told.stdout)["workers"]
            for row in worker.get("requests", [])
            if row["phase"] == "decode" and not row.get("relayed_from")
        ]

    def stop(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Frontend:
    """A client of one frontend."""

    def __init__(self, port: int, model: str) -> None:
        self.port = port
        self._model = model
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=240, trust_env=False)

    def serves(self) -> bool:
        try:
            return len(self._client.get("/models").json()["data"]) == 1 and self.ask("x", 1).status_code == 200
        except (httpx.HTTPError, KeyError):
            return False

    def ask(self, prompt: str, tokens: int, **more: Any) -> httpx.Response:
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return self._client.post("/completions", json=body | more)

    def text(self, prompt: str, tokens: int) -> str:
        reply = self.ask(prompt, tokens)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, etcd_url: str, nats_url: str
) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("adding"), tiny_llama, etcd_url, nats_url)
    try:
        for number in range(WORKERS):
            # Two answers are compared to the letter, which bfloat16 does not promise.
            command = f"{COMMANDS['worker after']} --dtype float32"
            deployment.start(f"worker{number}", command, EVENTS=str(free_port()))
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def frontends(deployment: Deployment) -> list[Frontend]:
    """Two of them, and one that rejects early."""
    found = []
    for name, more in (("one", ""), ("two", ""), ("strict", " --active-decode-blocks-threshold 0.001")):
        port = free_port()
        deployment.start(name, COMMANDS["frontend"] + more, PORT=str(port))
        found.append(Frontend(port, deployment.model))
    deployment.wait(lambda: all("migrates over" in deployment.log(f"worker{n}") for n in range(WORKERS)))
    deployment.wait(lambda: all(frontend.serves() for frontend in found))
    return found


def test_only_the_module_of_the_workers_command_changes() -> None:
    assert COMMANDS["worker before"].replace("dynamo.vllm", "components.worker") == COMMANDS["worker after"]
    assert COMMANDS["worker before"] != COMMANDS["worker after"]


def test_a_request_moves_behind_each_of_two_frontends(deployment: Deployment, frontends: list[Frontend]) -> None:
    for number, frontend in enumerate(frontends[:2]):
        prompt = f"{number} once upon a time " * 20
        with ThreadPoolExecutor(1) as pool:
            moved = pool.submit(frontend.text, prompt, LENGTH)
            while not (rows := deployment.running()):
                assert not moved.done(), "it has ended before it was seen"
            done = deployment.dynamo("migrate", rows[0]["request_id"])
            assert done.returncode == 0, done.stdout + done.stderr
            assert moved.result() == frontend.text(prompt, LENGTH)


def test_events_of_the_workers_reach_every_frontend(frontends: list[Frontend]) -> None:
    # The second frontend has not seen these prompts: it can only know from the events who has them.
    prompts = [f"{number} " + "a river beside the old mountain road " * 30 for number in range(6)]
    for prompt in prompts:
        frontends[0].text(prompt, 2)
    time.sleep(2.0)
    for prompt in prompts:
        usage = frontends[1].ask(prompt + "and then", 2).json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached >= usage["prompt_tokens"] - 64, usage


def test_thresholds_of_the_frontend_still_reject(frontends: list[Frontend]) -> None:
    strict = frontends[2]
    with ThreadPoolExecutor(2 * WORKERS) as pool:
        busy = [pool.submit(strict.ask, f"{n} a long way to go " * 150, 1000) for n in range(2 * WORKERS)]
        codes = set()
        while not all(answer.done() for answer in busy) and not codes & {503, 529}:
            codes.add(strict.ask("x", 1).status_code)
            time.sleep(0.1)
        assert codes & {503, 529}, codes
        # Those without a threshold go on.
        assert frontends[0].ask("x", 1).status_code == 200
        assert {answer.result().status_code for answer in busy} <= {200, 503, 529}
    assert strict.ask("x", 1).status_code == 200

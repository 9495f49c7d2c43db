# SPDX-License-Identifier: Apache-2.0
"""A running ``dynamo serve`` for tests.

``DYNAMO_MIGRATE_TEST_MODEL`` chooses the model (default ``tiny-llama``; ``smollm2`` is a real one, and slower).
``DYNAMO_MIGRATE_TEST_DTYPE`` is float32: in bfloat16 a real model's best two tokens are often one rounding apart, and
then vLLM's own answer depends on what else was in the batch and in the prefix cache.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from benchmarks.models import resolve
from components.serve.servers import free_port

ROOT = Path(__file__).parents[2]
PROMPT = "Once upon a time, in a small house by the sea, there lived an old clock maker. " * 12
MODEL = os.environ.get("DYNAMO_MIGRATE_TEST_MODEL", "tiny-llama")
DTYPE = os.environ.get("DYNAMO_MIGRATE_TEST_DTYPE", "float32")

PAGED = (
    "--Common.engine=paged",
    "--PrefillWorker.engine-args={step_s: 0.002}",
    "--DecodeWorker.engine-args={step_s: 0.004}",
    "--DecodeWorker.lease-s=20",
)
EAGER_POLICY = """
limits: {cooldown-s: 0, no-return-s: 600}
cost: {min-gain: 0}
policies:
  balance: {high: 0.1, start-gap: 0.15, stop-gap: 0.05}
"""
"""Of a planner that moves requests early."""


class Graph:
    """A running ``dynamo serve`` and a client of it. ``PAGED`` overrides start it in seconds, without a model."""

    def __init__(
        self,
        folder: Path,
        name: str = "disagg",
        overrides: tuple[str, ...] = (),
        model: str = MODEL,
        **environment: str,
    ) -> None:
        self.model = model
        self.port = free_port()
        self.log = folder / "serve.log"
        self.environment = dict(os.environ) | {
            "XDG_RUNTIME_DIR": str(folder),
            "VLLM_SLEEP_WHEN_IDLE": "1",
            "ETCD_LEASE_TTL": "60",
            **environment,
        }
        command = [sys.executable, "-m", "components.cli", "serve", f"graphs.{name}:Frontend"]
        command += ["-f", f"configs/{name}.yaml", "--port", str(self.port), f"--Common.model={resolve(model)}"]
        command += [f"--Common.served-model-name={model}", f"--Common.dtype={DTYPE}", *overrides]
        self._output = self.log.open("wb")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=self._output, stderr=subprocess.STDOUT
        )
        self._remote: subprocess.Popen[Any] | None = None
        own = openai.DefaultHttpxClient(trust_env=False)
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=own)

    @contextmanager
    def served(self, timeout_s: float = 280) -> Iterator[Graph]:
        """From its start, within this time, to its regular end, which leaves no process."""
        try:
            self.wait(timeout_s)
            yield self
            assert self.stop() == []
            assert self.process.returncode == 0
        finally:
            if self.process.poll() is None:
                self.stop()

    def wait(self, timeout_s: float = 280) -> None:
        end = time.monotonic() + timeout_s
        while f"serving {self.model}".encode() not in self.log.read_bytes():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the graph did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        # The asking process takes seconds to start: start it before requests run.
        self.status()

    def command(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "components.cli", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )

    def ask(self, *call: str) -> Any:
        """A call to the workers; see ``remote.py``."""
        if self._remote is None:
            self._remote = self._asking_process(text=True)
        assert self._remote.stdin is not None and self._remote.stdout is not None
        self._remote.stdin.write(json.dumps(call) + "\n")
        self._remote.stdin.flush()
        return json.loads(self._remote.stdout.readline())

    def _asking_process(self, **how: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.integration.remote"],
            cwd=ROOT,
            env=self.environment | {"DYNAMO_SKIP_PYTHON_LOG_INIT": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **how,
        )

    def under_way(
        self, prompts: list[str], length: int, act: Callable[[dict[str, str]], None], **more: Any
    ) -> list[str]:
        """Texts of requests during which ``act`` was called with {request id: worker}, once all of them decode."""
        # Tables are up to a second old: these requests may have ended.
        before = self.running()
        with ThreadPoolExecutor(len(prompts)) as pool:
            texts = [pool.submit(self.complete, prompt, length, **more) for prompt in prompts]
            while True:
                rows = self.running()
                running = {r: s["worker"] for r, s in rows.items() if s["output_tokens"] > 5 and r not in before}
                if len(running) == len(prompts):
                    act(running)
                    break
                assert not any(text.done() for text in texts), [text.result() for text in texts if text.done()]
            return [text.result(240) for text in texts]

    def disturbed(self, prompts: list[str], length: int, act: Callable[[dict[str, str]], None], **more: Any) -> None:
        """``under_way``, whose texts must be those of undisturbed requests.

        These run afterwards: earlier ones would leave all blocks in the workers' prefix caches, and nothing would move.
        """
        assert self.under_way(prompts, length, act, **more) == self.complete_all(prompts, length, **more)

    def complete(self, prompt: str, count: int, **more: Any) -> str:
        reply = self.client.completions.create(
            prompt=prompt, max_tokens=count, extra_body={"ignore_eos": True}, **({"model": self.model} | more)
        )
        assert reply.usage is not None and reply.usage.completion_tokens == count
        assert reply.choices[0].finish_reason == "length"
        return reply.choices[0].text

    def complete_all(self, prompts: list[str], count: int, **more: object) -> list[str]:
        """``complete`` of all prompts at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, count, **more), prompts))

    def leave_early(self, prompt: str, after: int) -> None:
        """A client that closes its connection in the middle of an answer."""
        stream = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        for number, _ in enumerate(stream):
            if number == after:
                stream.close()
                break

    def stop(self) -> list[psutil.Process]:
        if self._remote is not None:
            self._remote.kill()
            self._remote.wait()
        if self.process.poll() is not None:
            self._output.close()
            return []
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self._output.close()
        # A killed engine takes a moment to free its memory.
        _, left = psutil.wait_procs(family, timeout=10)
        return [member for member in left if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("status")
        return status

    def decoding(self) -> list[str]:
        """Workers that requests can move between."""
        return [w["worker"] for w in self.status()["workers"] if w["role"] in ("decode", "agg")]

    def running(self) -> dict[str, dict[str, Any]]:
        """Requests by their id, where they decode; each with its worker."""
        return {
            row["request_id"]: {"output_tokens": 0, **row, "worker": worker["worker"]}
            for worker in self.status()["workers"]
            if worker["role"] in ("decode", "agg")
            for row in worker["requests"]
            if not row.get("relayed_from") and row["phase"] == "decode"
        }

    def another(self, worker: str) -> str:
        """One that a request can move to from this one."""
        return next(other for other in self.decoding() if other != worker)

    @property
    def page(self) -> str:
        """URL of the launcher's web page, which starts shortly after the graph."""
        end = time.monotonic() + 30
        while not (found := re.search(r"watch it on (http://\S+)", self.log.read_text(errors="replace"))):
            assert time.monotonic() < end, self.log.read_text(errors="replace")[-2000:]
            time.sleep(0.2)
        return found[1]

    def on_page(self, path: str) -> Any:
        """The web page's answer to a program."""
        page = httpx.URL(self.page)
        bearer = {"Authorization": f"Bearer {page.params.get('token')}"}
        return httpx.get(page.copy_with(path=path, query=None), headers=bearer, trust_env=False).json()

    def metrics(self, component: str) -> str:
        """All metrics of a component, found as Prometheus finds them."""
        groups = self.on_page("/targets")
        places = [group["targets"][0] for group in groups if group["labels"]["component"] == component]
        return "\n".join(httpx.get(f"http://{place}/metrics", trust_env=False).text for place in places)

    def processes(self, component: str, replica: int | None = None) -> list[psutil.Process]:
        """The component's processes, without their children."""
        found = []
        for process in psutil.Process(self.process.pid).children():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            fits = environment.get("DYN_MIGRATE_COMPONENT") == component
            if fits and replica in (None, int(environment["DYN_MIGRATE_REPLICA"])):
                found.append(process)
        return found

    def worker_process(self, replica: int, component: str = "DecodeWorker") -> psutil.Process:
        """The process of a worker, not those of its engine."""
        [process] = self.processes(component, replica)
        return process

    def replica_of(self, worker: str) -> int:
        """Number of a worker in the plan, from its name in ``dynamo status``."""
        agents = next(w["info"]["agents"] for w in self.status()["workers"] if w["worker"] == worker)
        return int(agents[0]["name"].split("-tp")[0].rpartition("-")[2])

    def tell_threads(self) -> None:
        """Let the workers log the stacks of their threads, and print the end of the log."""
        for component in ("AggWorker", "DecodeWorker", "PrefillWorker"):
            for process in self.processes(component):
                process.send_signal(signal.SIGUSR1)
        time.sleep(2)
        print(self.log.read_text(errors="replace")[-30_000:])

    def wait_until_idle(self, workers: int = 3, timeout_s: float = 90) -> None:
        """Wait until all workers are there and hold no block. Fails with what is left."""
        end = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if "workers" in status:  # A NATS server that has just come back carries no calls yet.
                left = [w for w in status["workers"] if not (s := w["stats"]) or s["free_blocks"] != s["total_blocks"]]
                # A dead one stays listed for its lease.
                left += [w for w in status["workers"] if w["missing"] or w["requests"]]
                if not left and len(status["workers"]) == workers:
                    break
            if time.monotonic() > end:
                self.tell_threads()
                pytest.fail(f"not idle: {status}")
            time.sleep(0.5)
        for worker in status["workers"]:
            assert self.ask("check", worker["worker"]) is None

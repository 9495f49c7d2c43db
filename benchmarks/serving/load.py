# SPDX-License-Identifier: Apache-2.0
"""Load by ``vllm bench serve``, and questions to workers, each through a child process that lives as long as the run.

Raises ``MigrateError`` when a child fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from benchmarks.serving.metrics import Sample
from benchmarks.serving.systems import System
from benchmarks.serving.workloads import CHUNK, Request, write
from components import models
from components.errors import MigrateError
from components.migration.messages import MoveRecord
from components.status import Status


class Child:
    """A process that answers each line with one."""

    def __init__(self, module: str, environment: dict[str, str], log: Path) -> None:
        self._lock = threading.Lock()
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=dict(os.environ) | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def read(self) -> str:
        if self._process.stdout is None or not (line := self._process.stdout.readline()):
            raise MigrateError(f"{self._process.args!r} has ended; its output is in {self._log.name}")
        return line.strip()

    def ask(self, message: Any) -> str:
        with self._lock:
            if self._process.stdin is None:
                raise MigrateError("the child has no input")
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            return self.read()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Load(Child):
    """The benchmark client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        self._ready = False
        environment = {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        super().__init__("benchmarks.serving.client", environment, folder / "client.log")

    def run(self, system: System, requests: list[Request], seed: int, at_once: int = 0) -> list[Sample]:
        """Send the requests at their times, ``at_once`` at most; returns what came of each."""
        if not self._ready and (word := self.read()) != "ready":
            raise MigrateError(f"vllm bench serve did not start: {word}")
        self._ready = True
        self._runs += 1
        trace, result = self._folder / "trace.jsonl", self._folder / "result.json"
        write(requests, trace, first_id=self._runs * 1_000_000)
        result.unlink(missing_ok=True)
        arguments = ["--backend", "openai", "--base-url", system.url, "--model", system.model]
        arguments += ["--tokenizer", models.resolve(system.model), "--dataset-name", "timed_trace"]
        arguments += ["--dataset-path", str(trace), "--timed-trace-chunk-hash-size", str(CHUNK)]
        arguments += ["--timed-trace-sec-multiplier", "0.001", "--num-prompts", str(len(requests))]
        arguments += ["--seed", str(seed), "--temperature", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0"]
        arguments += ["--max-concurrency", str(at_once)] if at_once else []
        arguments += ["--save-result", "--save-detailed", "--result-dir", str(self._folder)]
        arguments += ["--result-filename", result.name]
        answer = self.ask(arguments)
        if answer != "done":
            raise MigrateError(f"vllm bench serve {answer}")
        found = json.loads(result.read_text())
        columns = (found[key] for key in ("start_times", "ttfts", "itls", "output_lens", "errors"))
        return [
            Sample(
                start_s=start,
                ttft_s=ttft,
                itls_s=tuple(round(gap, 6) for gap in itls),
                tokens=tokens,
                wanted=request.output_tokens,
                prompt_tokens=request.prompt_tokens,
                error=(error or "").strip().splitlines()[-1] if (error or "").strip() else "",
            )
            for request, start, ttft, itls, tokens, error in zip(requests, *columns, strict=True)
        ]


class Control(Child):
    """The workers of one system."""

    def __init__(self, system: System) -> None:
        environment = system.servers | {"DYN_LOG": "error", "ETCD_LEASE_TTL": "60"}
        super().__init__("benchmarks.serving.control", environment, system.folder / "control.log")

    def status(self) -> Status:
        """Workers, their requests, and the last moves."""
        return msgspec.json.decode(self.ask(["status"]), type=Status)

    def migrate(self, request_id: str, worker: str) -> MoveRecord | None:
        """Move a request; None when it had ended."""
        answer = self.ask(["migrate", request_id, worker])
        return None if answer.startswith('{"error"') else msgspec.json.decode(answer, type=MoveRecord)

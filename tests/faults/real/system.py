# SPDX-License-Identifier: Apache-2.0
"""A served graph with its own etcd and NATS, and clients that compare answers with undisturbed ones.

Life cycle: any number of runs, then ``close``. Threading: one thread drives, another may ``ask`` beside it; each client
has a thread.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from tests.faults.real.servers import Server
from tests.integration.graphs import MODEL, PAGED, PROMPT, Graph

LEASE_S = 10
_ASK_S = 10.0
_MOST_OWED = 3
"""Answers that the asking process may owe before it is started anew."""
_DECODES = {"paged": 3, "vllm": 2}
"""With three decode workers the frontend repeats a request that has moved once; with two the first one relays it."""


@dataclass
class Answer:
    """A client's result; ``error`` for a broken stream or one that ended with an error."""

    text: str = ""
    finish: str = ""
    error: str = ""


class System(Graph):
    """See the module docstring."""

    def __init__(self, folder: Path, engine: str, lease_s: int = LEASE_S) -> None:
        self.etcd, self.nats = Server("etcd", folder), Server("nats", folder)
        decodes = _DECODES[engine]
        self._workers = 1 + decodes
        planner = (
            "--Planner.interval-s=1",
            f"--Planner.decode-workers=[{decodes},{decodes}]",
            f"--DecodeWorker.replicas={decodes}",
        )
        overrides = (*planner, *(PAGED if engine == "paged" else ("--Common.max-model-len=2048",)))
        where = {"ETCD_ENDPOINTS": self.etcd.url, "NATS_SERVER": self.nats.url, "ETCD_LEASE_TTL": str(lease_s)}
        super().__init__(folder, "planner", overrides, **where)
        self._asking = threading.Lock()
        self._owed = 0
        self.cut_off: list[psutil.Process] = []
        """Processes without their leases, which must end before the end of the run."""
        self.length = 600 if engine == "paged" else 150

    def close(self) -> list[psutil.Process]:
        """End everything; processes that are left."""
        try:
            return self.stop()
        finally:
            self.etcd.kill(empty=True)
            self.nats.kill(empty=True)

    def ask(self, *call: str) -> Any:
        """``Graph.ask`` with a time-out, after which it raises."""
        with self._asking:
            return self._answer_to(call)

    def _answer_to(self, call: tuple[str, ...]) -> Any:
        if self._remote is None or self._remote.poll() is not None or self._owed > _MOST_OWED:
            if self._remote is not None:
                self._remote.kill()
                self._remote.wait()
            # Unbuffered: what has been read must be all that ``select`` does not see any more.
            self._remote = self._asking_process(stderr=subprocess.DEVNULL, bufsize=0)
            self._owed = 0
        answer = self._one_answer(self._remote, call)
        if isinstance(answer, dict) and answer.get("error") == "worker_lost":
            # Its own runtime may have ended with its lease in etcd, as it does in every process.
            self._remote.kill()
        return answer

    def _one_answer(self, remote: subprocess.Popen[Any], call: tuple[str, ...]) -> Any:
        assert remote.stdin is not None and remote.stdout is not None
        try:
            remote.stdin.write(json.dumps(call).encode() + b"\n")
            remote.stdin.flush()
            self._owed += 1
            end = time.monotonic() + _ASK_S
            while select.select([remote.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                line = remote.stdout.readline()
                self._owed -= 1
                if not self._owed:
                    return json.loads(line)
        except (OSError, ValueError):
            remote.kill()
        return {"error": "no answer"}

    def follow(self, number: int, answer: Answer) -> None:
        """One streaming client, to the end of its answer or its first error."""
        client = self._client(250)
        try:
            stream = client.completions.create(
                model=MODEL,
                prompt=f"{number} {PROMPT}",
                max_tokens=self.length,
                # What is computed again after the loss of a worker is equal where sampling has no state.
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                for choice in chunk.choices:
                    answer.text += choice.text or ""
                    answer.finish = choice.finish_reason or answer.finish
        except Exception as error:
            answer.error = f"{type(error).__name__}: {error}"
        else:
            if answer.finish != "length":
                answer.error = f"the stream ended as {answer.finish or 'nothing'}"
        finally:
            client.close()

    def rest(self, timeout_s: float) -> str:
        """Wait until every worker is there and holds no block. Returns what is left, or nothing."""
        end = time.monotonic() + timeout_s
        while True:
            status = self.ask("status")
            left = self._left(status)
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.3)

    def _left(self, status: Any) -> str:
        if not isinstance(status, dict) or "workers" not in status:
            return f"no worker answers: {status}"
        workers = status["workers"]
        held = [w for w in workers if not w["stats"] or w["stats"]["free_blocks"] != w["stats"]["total_blocks"]]
        if len(workers) != self._workers:
            return f"{len(workers)} workers: {[(w['worker'], w['role'], w['info']) for w in workers]}"
        silent = [(w["worker"], w["role"], w["missing"]) for w in workers if w["missing"]]
        if silent:
            # A dead one stays listed for its lease.
            return f"no reports from {silent}"
        held += [w for w in workers if w["requests"]]
        if held:
            return f"requests or blocks on {[(w['worker'], w['role'], w['requests']) for w in held]}"
        if cut_off := [p.pid for p in self.cut_off if p.is_running()]:
            return f"processes {cut_off} still run without their lease in etcd"
        return "" if self._serves() else "the frontend does not answer"

    def _client(self, timeout_s: float) -> openai.OpenAI:
        own = openai.DefaultHttpxClient(trust_env=False)
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout_s, http_client=own)

    def _serves(self) -> bool:
        # Until its lease ends, the frontend may give a dead worker its share of the requests.
        try:
            with self._client(5) as client:
                for _ in range(4):
                    client.completions.create(model=MODEL, prompt="hello", max_tokens=2)
        except openai.OpenAIError:
            return False
        return True


def kill(process: psutil.Process) -> None:
    """Kill a process and its children, like the OOM killer or a lost node."""
    for member in [*process.children(recursive=True), process]:
        try:
            os.kill(member.pid, 9)
        except ProcessLookupError:
            continue

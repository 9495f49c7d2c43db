# SPDX-License-Identifier: Apache-2.0
"""Dynamo's frontend and ``components.worker`` processes, started like by a user, and a client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from components.client import Workers
from components.process import connect
from components.serve.servers import free_port

MODEL = "tiny"
_START_S = 240.0


@dataclass
class Answer:
    """A client's answer."""

    text: str = ""
    tokens: int = 0
    finish: str = ""
    logprobs: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def same(self) -> tuple[Any, ...]:
        """The part that must not depend on the worker."""
        logprobs = [round(value, 3) for value in self.logprobs]
        return self.text, self.finish, self.usage.get("completion_tokens"), self.usage.get("prompt_tokens"), logprobs


class Served:
    """One frontend and a worker for each role of ``roles``: ``prefill``, ``decode`` or ``agg``.

    ``ranks``: tensor-parallel sizes by role, where they are not 1.
    """

    def __init__(
        self, folder: Path, model: str, etcd_url: str, roles: list[str], ranks: Mapping[str, int] | None = None
    ) -> None:
        self._ranks = ranks or {}
        self.namespace = f"apart-{uuid.uuid4().hex[:8]}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._folder = folder
        self._environment = os.environ | {
            "ETCD_ENDPOINTS": etcd_url,
            "DYN_NAMESPACE": self.namespace,
            "DYN_DISCOVERY_BACKEND": "etcd",
            "DYN_EVENT_PLANE": "zmq",
            "PYTHONHASHSEED": "0",
            "HF_HUB_OFFLINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        front = ["dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.port)]
        front += ["--router-mode", "kv", "--migration-limit", "8"]
        self._processes = {"front": self._start("front", front)}
        self.workers: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.metrics: list[tuple[str, str]] = []
        """Role and address of each worker's."""
        for role in roles:
            self.add(role, model)

    def add(self, role: str, model: str) -> None:
        """Start one more worker, for ``model`` under the same name."""
        command = ["components.worker", "--model", model, "--served-model-name", MODEL, "--max-model-len", "4096"]
        command += ["--block-size", "32", "--enforce-eager", "--max-num-seqs", "16", "--dtype", "float32"]
        command += ["--kv-cache-memory-bytes", str(256 << 20)]
        events = {"publisher": "zmq", "topic": "kv-events", "endpoint": f"tcp://*:{free_port()}"}
        command += ["--kv-events-config", json.dumps(events | {"enable_kv_cache_events": True})]
        command += ["--disaggregation-mode", role] if role != "agg" else []
        command += ["--tensor-parallel-size", str(self._ranks.get(role, 1))]
        system = free_port()
        self.metrics.append((role, f"http://127.0.0.1:{system}/metrics"))
        self.workers.append((role, self._start(f"worker{len(self.workers)}", command, DYN_SYSTEM_PORT=str(system))))

    def _start(self, name: str, module: list[str], **more: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env=self._environment | more,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        """Output of one process."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    async def workers_client(self) -> Workers:
        """The workers' own client, once they serve. One in a process: Dynamo's runtime cannot be made twice."""
        os.environ.update({key: self._environment[key] for key in ("ETCD_ENDPOINTS", "DYN_NAMESPACE")})
        os.environ["DYN_DISCOVERY_BACKEND"] = "etcd"
        return await Workers.connect(connect(), self.namespace)

    async def ready(self) -> None:
        """Wait until every worker serves and the frontend answers."""
        end = time.monotonic() + _START_S
        while not all("migrates over" in self.log(f"worker{n}") for n in range(len(self.workers))):
            await self._go_on(end)
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    if (await ask(session, self, prompt=[5, 6, 7], max_tokens=2)).text:
                        break
                except aiohttp.ClientError:
                    pass
                await self._go_on(end)

    async def _go_on(self, end: float) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} has ended:\n{self.log(name)[-2000:]}")
        for number, (_, process) in enumerate(self.workers):
            if process.poll() is not None:
                raise RuntimeError(f"worker{number} has ended:\n{self.log(f'worker{number}')[-2000:]}")
        if time.monotonic() > end:
            raise TimeoutError(f"not served after {_START_S:g} s:\n{self.log('front')[-2000:]}")
        await asyncio.sleep(0.5)

    def kill(self, role: str) -> None:
        """``kill -9`` of the first living worker of a role, with its engine."""
        process = next(process for name, process in self.workers if name == role and process.poll() is None)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End everything."""
        for process in [*self._processes.values(), *(process for _, process in self.workers)]:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


async def ask(session: aiohttp.ClientSession, served: Served, **more: Any) -> Answer:
    """One streamed completion, read to its end."""
    answer = Answer()
    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0, **more}
    async with session.post(f"{served.url}/completions", json=body) as response:
        async for line in response.content:
            if not line.startswith(b"data: {"):
                if line.strip() and line.strip() != b"data: [DONE]":
                    answer.errors.append(line.decode())
                continue
            chunk = json.loads(line[6:])
            answer.usage = chunk.get("usage") or answer.usage
            for choice in chunk.get("choices", []):
                answer.text += choice["text"]
                answer.tokens += 1
                answer.finish = choice.get("finish_reason") or answer.finish
                answer.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
    return answer

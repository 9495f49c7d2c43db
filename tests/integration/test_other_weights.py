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

from components.errors import NoRoom
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


async def test_requests_move_again_when_both_workers_have_loaded_the_same_new_weights(
    tiny_llama: str, tmp_path: Path, etcd_url: str
) -> None:
    served = Served(tmp_path, tiny_llama, etcd_url, ["agg", "agg"])
    new = fine_tuned(tiny_llama, tmp_path / "new")
    try:
        await served.ready()
        workers = await served.workers_client()
        async with aiohttp.ClientSession() as session:

            async def control(worker: int, name: str, **body: object) -> None:
                url = served.metrics[worker][1].replace("/metrics", f"/engine/{name}")
                async with session.post(url, json=body) as reply:
                    said = await reply.json(content_type=None)
                    assert reply.status == 200 and said["status"] == "ok", said

            async def moved() -> bool:
                """Of a long answer, to the other worker."""
                asking = asyncio.ensure_future(
                    ask(session, served, prompt="The tea is", max_tokens=2000, ignore_eos=True)
                )
                while True:
                    await workers.refresh()
                    rows = [row for _, row in workers.status().requests() if row.output_tokens > 4]
                    if rows:
                        break
                    assert not asking.done()
                    await asyncio.sleep(0.05)
                try:
                    ok = (await workers.move(rows[0].request_id)).ok
                except NoRoom:
                    ok = False
                answer = await asking
                assert not answer.errors and answer.usage["completion_tokens"] == 2000
                return ok

            assert await moved()
            for worker in (0, 1):
                await control(worker, "pause_generation", mode="keep", clear_cache=True)
                await workers.refresh()
                assert sum(each.cordoned for each in workers.status().workers) == 1, "the paused one"
                await control(worker, "update_weights_from_disk", model_path=new)
                await control(worker, "resume_generation")
                assert await moved() == bool(worker)
            texts = {
                (await ask(session, served, prompt="The tea is", max_tokens=9, ignore_eos=True)).text for _ in "abcd"
            }
            assert len(texts) == 1
    finally:
        served.stop()

# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that are loaded at run time: a request moves only to the same contents under the same name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from components.engine.vllm.loras import Loras
from components.errors import InvalidRequest
from tests.adapters import make_adapter


class Llm:
    """An ``AsyncLLM`` that loads adapters."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        self.loaded.append(lora_request.lora_name)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return True


async def loaded(name: str, path: str, number: int = 1) -> tuple[Loras, LoRARequest]:
    """A worker on which an adapter has been loaded."""
    llm: Any = Llm()
    loras, lora = Loras(), LoRARequest(name, number, path)
    loras.watch(llm)
    assert await llm.add_lora(lora) is True and llm.loaded == [name]
    return loras, lora


async def test_the_same_adapter_is_found_wherever_it_lies_on_the_other_host(tiny_llama: str, tmp_path: Path) -> None:
    here, mine = await loaded("red", make_adapter(tmp_path / "a", tiny_llama, 1), 1)
    there, its_own = await loaded("red", make_adapter(tmp_path / "b", tiny_llama, 1), 2)
    assert there.here(mine, here.digest(mine)) == its_own


async def test_another_adapter_of_the_same_name_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    here, mine = await loaded("red", make_adapter(tmp_path / "a", tiny_llama, 1))
    there, _ = await loaded("red", make_adapter(tmp_path / "b", tiny_llama, 2))
    with pytest.raises(InvalidRequest, match="'red' has other contents"):
        there.here(mine, here.digest(mine))
    with pytest.raises(InvalidRequest, match="'red' is not loaded"):
        Loras().here(mine, here.digest(mine))


async def test_what_lies_in_the_folder_of_a_removed_adapter_is_read_again(tiny_llama: str, tmp_path: Path) -> None:
    llm: Any = Llm()
    loras, lora = Loras(), LoRARequest("red", 1, make_adapter(tmp_path / "a", tiny_llama, 1))
    loras.watch(llm)
    await loras.learn(lora)
    before = loras.digest(lora)
    shutil.rmtree(tmp_path / "a")
    make_adapter(tmp_path / "a", tiny_llama, 2)
    await loras.learn(lora)
    assert loras.digest(lora) == before != ""
    assert await llm.remove_lora(1) and loras.digest(lora) == ""
    await loras.learn(lora)
    assert loras.digest(lora) not in (before, "")


async def test_an_adapter_of_unknown_contents_has_no_digest(tiny_llama: str, tmp_path: Path) -> None:
    loras, gone = await loaded("gone", str(tmp_path / "nothing"))
    assert loras.digest(gone) == ""
    loras, old = await loaded("red", make_adapter(tmp_path / "a", tiny_llama, 1))
    assert loras.digest(LoRARequest("red", 1, "/another/folder")) == "" != loras.digest(old)
    with pytest.raises(InvalidRequest):
        loras.here(old, "")

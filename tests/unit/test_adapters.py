# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: refusals before the start, and equality for shared KV."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import ConfigError
from components.models import adapters
from tests.adapters import make_adapter


@pytest.fixture
def made(tmp_path: Path, tiny_llama: str) -> dict[str, str]:
    return {"red": make_adapter(tmp_path / "red", tiny_llama, 1, rank=4)}


def test_the_rank_is_one_that_vllm_has(made: dict[str, str], tmp_path: Path, tiny_llama: str) -> None:
    assert adapters.max_rank(made) == 8
    more = made | {"wide": make_adapter(tmp_path / "wide", tiny_llama, 2, rank=20)}
    assert adapters.max_rank(more) == 32


def test_kv_is_shared_by_equal_adapters_alone(made: dict[str, str], tmp_path: Path, tiny_llama: str) -> None:
    same = {"red": make_adapter(tmp_path / "copy", tiny_llama, 1, rank=4)}
    other = {"red": make_adapter(tmp_path / "other", tiny_llama, 2, rank=4)}
    assert adapters.digest(same) == adapters.digest(made)
    assert len({adapters.digest(found) for found in (made, other, {})}) == 3


def test_wrong_adapters_are_named(made: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own name"):
        adapters.check({"llama": made["red"]}, ("llama",))
    with pytest.raises(ConfigError, match=r"adapter 'blue' has no adapter_config\.json"):
        adapters.check({"blue": str(tmp_path / "nowhere")})
    (Path(made["red"]) / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        adapters.check(made)

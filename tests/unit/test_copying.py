# SPDX-License-Identifier: Apache-2.0
"""``transfer_kv_cache``: blocks of one process on another device, complete and in order, with one callback."""

from __future__ import annotations

import threading

import pytest
import torch

from components.errors import ConfigError, TransferError
from components.transfer import TransferHandle, transfer_kv_cache

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))


def blocks(device: str, count: int = 5) -> list[torch.Tensor]:
    cache = torch.arange(12 * 2 * 64, dtype=torch.float32).reshape(12, 2, 64).to(device)
    return [cache[(7 * number) % 12] for number in range(count)]


@pytest.mark.parametrize("source", ["cpu", GPU])
@pytest.mark.parametrize("target", ["cpu", GPU])
async def test_blocks_arrive_whole_and_in_their_order(source: str, target: str) -> None:
    given = blocks(source)
    copy = transfer_kv_cache(source, target, given)
    result = await copy.handle
    assert result.bytes == 5 * 2 * 64 * 4 and result.lane == f"memcpy/{source}-{target}"
    assert all(got.device.type == target for got in copy.blocks)
    assert all(torch.equal(got.cpu(), block.cpu()) for got, block in zip(copy.blocks, given, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_copies_follow_what_the_stream_has_queued() -> None:
    stream, cache = torch.cuda.Stream(), torch.zeros(4, 1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        cache.fill_(7.0)
    copy = transfer_kv_cache("cuda", "cpu", list(cache), stream)
    copy.handle.wait(30)
    assert all(bool((block == 7.0).all()) for block in copy.blocks)


def test_a_callback_is_called_once_with_the_handle() -> None:
    called: list[TransferHandle] = []
    over = threading.Event()

    def done(handle: TransferHandle) -> None:
        called.append(handle)
        over.set()

    copy = transfer_kv_cache("cpu", "cpu", blocks("cpu"), on_done=done)
    assert over.wait(10) and copy.handle.done() and called == [copy.handle]
    nothing = transfer_kv_cache("cpu", "cpu", [], on_done=done)
    assert nothing.blocks == () and nothing.handle.wait(0).bytes == 0 and called == [copy.handle, nothing.handle]


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="not all blocks are on cuda"):
        transfer_kv_cache("cuda", "cpu", blocks("cpu"))
    with pytest.raises(ConfigError, match="one shape and dtype"):
        transfer_kv_cache("cpu", "cpu", [torch.zeros(2), torch.zeros(3)])


def test_an_error_of_the_copy_comes_through_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch, "stack", broken)
    copy = transfer_kv_cache("cpu", "cpu", blocks("cpu"))
    with pytest.raises(TransferError, match="no memory"):
        copy.handle.wait(10)

# SPDX-License-Identifier: Apache-2.0
"""The KV of the paged engine on a device of torch is that of the host, byte for byte, and so are the tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.engine.paged.device import DeviceKV
from components.engine.paged.model import PagedKV

SIZES = (8, 4, 3, 5, 1000)


@given(st.lists(st.integers(0, 2**17), min_size=1, max_size=16), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_same_bytes_and_tokens(tokens: list[int], salt: int, generator: int) -> None:
    host, device = PagedKV(*SIZES), DeviceKV("cpu", *SIZES)
    blocks = [3, 1, 6, 0]
    for position, token in enumerate(tokens):
        host.write(token, position, blocks)
        device.write(token, position, blocks)
    for ours, theirs in zip(host.pools(), device.pools(), strict=True):
        assert torch.equal(ours.tensor, theirs.tensor)
    count = len(tokens)
    assert host.next_token(count, blocks, salt, generator) == device.next_token(count, blocks, salt, generator)
    assert host.bytes_per_token == device.bytes_per_token

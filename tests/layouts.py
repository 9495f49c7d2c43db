# SPDX-License-Identifier: Apache-2.0
"""KV pools as vLLM lays them out: views of one storage, whose axes L, B, H, N, C lie in any of its orders.

L counts layers, B blocks, H KV heads, N tokens of a block, and C is the content of a token and head, K and V together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from components.transfer import KVPool

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 4, 12, 2, 8, 32
PAGE = HEADS * TOKENS * CONTENT
ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
Make = Callable[[torch.device], list[KVPool]]


def storage(size: int, device: torch.device) -> torch.Tensor:
    """Bytes that differ everywhere."""
    return torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)


def views(raw: torch.Tensor, order: str, layers: int = LAYERS, heads: int = HEADS) -> list[torch.Tensor]:
    """One bfloat16 view (B, H, N, C) for each layer."""
    sizes = {"L": layers, "B": BLOCKS, "H": heads, "N": TOKENS, "C": CONTENT}
    strides, step = {}, 1
    for axis in reversed(order):
        strides[axis] = step
        step *= sizes[axis]
    whole = torch.as_strided(raw, [sizes[a] for a in "LBHNC"], [strides[a] for a in "LBHNC"])
    return [layer.view(torch.bfloat16) for layer in whole]


def pools(tensors: list[torch.Tensor]) -> list[KVPool]:
    """Pools of blocks first."""
    return [KVPool(f"layer.{n}", tensor, BLOCKS, 0) for n, tensor in enumerate(tensors)]


def ordered(order: str) -> Make:
    """All layers of a model in one storage."""
    return lambda device: pools(views(storage(LAYERS * BLOCKS * PAGE, device), order))


def kernel_blocks(device: torch.device) -> list[KVPool]:
    """The kernel's blocks are half of the manager's."""
    raw = storage(LAYERS * BLOCKS * PAGE, device).view(LAYERS, 2 * BLOCKS, TOKENS // 2, HEADS, CONTENT)
    return pools([layer.transpose(1, 2).unflatten(0, (BLOCKS, 2)) for layer in raw])


def padded(device: torch.device) -> list[KVPool]:
    """Pages longer than what is in them."""
    raw = storage(LAYERS * BLOCKS * (PAGE + 64), device).view(LAYERS, BLOCKS, PAGE + 64)
    return pools([layer[:, :PAGE].unflatten(1, (HEADS, TOKENS, CONTENT)) for layer in raw])


def latent(device: torch.device) -> list[KVPool]:
    """MLA: one head."""
    return pools(views(storage(LAYERS * BLOCKS * TOKENS * CONTENT, device), "LBNHC", heads=1))


def planes(device: torch.device) -> list[KVPool]:
    """A storage for each layer, K and V planes first."""
    made = (storage(BLOCKS * PAGE, device).view(2, BLOCKS, TOKENS, HEADS, CONTENT // 2) for _ in range(LAYERS))
    return [KVPool(f"layer.{n}", tensor, BLOCKS, 1) for n, tensor in enumerate(made)]


def given_twice(device: torch.device) -> list[KVPool]:
    """The last layers use the cache of others."""
    own = views(storage(LAYERS * BLOCKS * PAGE, device), "LBNHC")
    return pools([*own, own[2], own[3]])


def overlaid(device: torch.device) -> list[KVPool]:
    """Two cache groups over the same bytes: attention, and pages of state that are a little shorter."""
    raw = storage(LAYERS * BLOCKS * PAGE, device)
    state = raw.view(LAYERS, BLOCKS, PAGE)[:, :, : PAGE - 128]
    return pools([*views(raw, "LBNHC"), *state.unflatten(2, (1, 1, -1))])


def packed(device: torch.device) -> list[KVPool]:
    """Two cache groups over the same blocks, which hold three pages of one or two larger ones of the other."""
    raw = storage(BLOCKS * 3 * PAGE, device).view(BLOCKS, 3 * PAGE)
    large = 3 * PAGE // 2 - 64
    return pools([raw[:, i * size : (i + 1) * size] for count, size in ((3, PAGE), (2, large)) for i in range(count)])


LAYOUTS: dict[str, Make] = {
    **{order: ordered(order) for order in ORDERS},
    "kernel blocks": kernel_blocks,
    "padded": padded,
    "latent": latent,
    "planes": planes,
    "given twice": given_twice,
    "overlaid": overlaid,
    "packed": packed,
}
PIECES = {
    **dict.fromkeys(("LBHNC", "LBNHC", "kernel blocks", "padded", "given twice", "overlaid"), (LAYERS, PAGE)),
    "LHBNC": (LAYERS * HEADS, TOKENS * CONTENT),
    **dict.fromkeys(("BLHNC", "BLNHC", "BHLNC"), (1, LAYERS * PAGE)),
    "latent": (LAYERS, TOKENS * CONTENT),
    "planes": (2 * LAYERS, PAGE // 2),
    "packed": (1, 3 * PAGE),
}
"""Pieces of a block, and their bytes."""

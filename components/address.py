# SPDX-License-Identifier: Apache-2.0
"""Addresses as users write them. Pure, and light: every process imports it."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def parts_of(url: str) -> SplitResult:
    """Of ``scheme://host:port`` or ``host:port``. Raises ``ValueError``."""
    return urlsplit(url if "://" in url else f"//{url}")


def dialled(host: str) -> str:
    """Where to reach on this machine what listens on ``host``."""
    return "127.0.0.1" if host == "0.0.0.0" else host

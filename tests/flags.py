# SPDX-License-Identifier: Apache-2.0
"""What a planned process is told on its command line."""

from __future__ import annotations

from collections.abc import Sequence


def flag(command: Sequence[str], name: str) -> str:
    """The value that is joined to ``--name``."""
    [found] = [part.partition("=")[2] for part in command if part.startswith(f"--{name}=")]
    return found

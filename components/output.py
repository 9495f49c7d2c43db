# SPDX-License-Identifier: Apache-2.0
"""Output that no text can break: what the terminal's or pipe's encoding lacks is written as an escape."""

from __future__ import annotations

import io
import sys


def take_any_text() -> None:
    """For standard output and error of this process, before anything is written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

# SPDX-License-Identifier: Apache-2.0
"""Output of any text: characters outside the terminal's or pipe's encoding are written as escapes."""

from __future__ import annotations

import io
import sys


def take_any_text() -> None:
    """Set up standard output and error of this process, before the first output."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

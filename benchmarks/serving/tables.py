# SPDX-License-Identifier: Apache-2.0
"""Tables of the report."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table, figures to the right, and an empty one."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]

# SPDX-License-Identifier: Apache-2.0
"""Output formats of commands: tables for people, JSON for programs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
import typer


class Format(StrEnum):
    """Format of a command's output."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("-o", "--output", help="tables for people or JSON for programs")]


def print_json(value: object) -> None:
    """Print a value to standard output."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())

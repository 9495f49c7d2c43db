# SPDX-License-Identifier: Apache-2.0
"""How commands write their answers: tables for people, JSON for programs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
import typer


class Format(StrEnum):
    """Of what a command prints."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("-o", "--output", help="tables for people or JSON for programs")]


def print_json(value: object) -> None:
    """To standard output."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())

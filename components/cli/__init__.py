# SPDX-License-Identifier: Apache-2.0
"""The ``dynamo`` command."""

from __future__ import annotations

import os
import sys

import typer

from components.cli import calibrate, doctor, move, policy, serve, top
from components.errors import MigrateError

app = typer.Typer(
    help="Serve LLMs on Dynamo, and move running requests between workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.register(app)
move.register(app)
policy.register(app)
doctor.register(app)
calibrate.register(app)
top.register(app)


def main() -> None:
    """Entry point: errors of this package become one line and exit code 2."""
    # As with ``python -m``: graphs and policies of the user's own folder can be named.
    sys.path.insert(0, os.getcwd())
    try:
        app()
    except MigrateError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error

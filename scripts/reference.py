# SPDX-License-Identifier: Apache-2.0
"""Writes docs/reference.md from the code: ``python -m scripts.reference``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from components import env
from components.cli import app
from components.config import ComponentConfig, FrontendConfig, PlannerConfig, WorkerConfig
from components.errors import MigrateError
from components.metrics import names
from planner_hooks.rules import Limits

TARGET = Path(__file__).parents[1] / "docs" / "reference.md"


_SETTINGS = (
    "Keys of a file for `dynamo serve -f`, or `--Component.key=value`. What is written in several places is taken",
    "from the first of: `--Component.key=value`, `--Common.key=value`, the component's own block in the file,",
    "`Common` in the file, the default. `--port` is `--Frontend.port`. A value on the command line is YAML, but text",
    "where the key holds text: `--Frontend.host=::` needs no quotes.",
)


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _commands(group: Any, prefix: str) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
            continue
        yield f"### `{prefix} {name}`\n\n{(command.help or '').strip().splitlines()[0]}\n"
        examples = [line.strip() for line in (command.help or "").splitlines() if line.startswith("dynamo ")]
        if examples:
            yield "```sh\n" + "\n".join(examples) + "\n```\n"
        yield "| argument | meaning | default |\n|---|---|---|"
        for given in command.params:
            option = given.param_type_name == "option"
            shown = ", ".join(f"`{o}`" for o in given.opts) if option else f"`{given.name}`"
            default = "" if given.default in (None, False, "") else f"`{_default(given.default)}`"
            default = "required" if given.required else default
            yield f"| {shown} | {_cell(getattr(given, 'help', '') or '')} | {default} |"
        yield ""


def _default(value: object) -> str:
    return str(getattr(value, "value", value))


def _fields(title: str, model: type[ComponentConfig] | type[Limits]) -> Iterator[str]:
    yield f"### {title}\n\n{(model.__doc__ or '').strip().splitlines()[0]}\n"
    yield "| key | default | meaning |\n|---|---|---|"
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else f"`{_cell(field.get_default(call_default_factory=True))}`"
        yield f"| `{name.replace('_', '-')}` | {default} | {_cell(field.description or '')} |"
    yield ""


def _variables() -> Iterator[str]:
    yield "## Environment variables\n"
    yield "An empty one counts as not set. A wrong value ends the start with its name.\n"
    for title, internal in (("Set by users", False), ("Set by `dynamo serve` for its processes", True)):
        yield f"### {title}\n\n| variable | default | meaning |\n|---|---|---|"
        for each in env.ALL:
            if each.internal is internal:
                default = f"`{_cell(each.default)}`" if each.default else ""
                yield f"| `{each.name}` | {default} | {_cell(each.meaning)} |"
        yield ""


def _errors(kind: type[MigrateError]) -> Iterator[str]:
    what = (kind.__doc__ or "").strip().splitlines()[0]
    yield f"| `{kind.code}` | `{kind.__name__}` | {'yes' if kind.retryable else 'no'} | {_cell(what)} |"
    for child in kind.__subclasses__():
        if child.__module__ == MigrateError.__module__:
            yield from _errors(child)


def text() -> str:
    """The whole page."""
    command = typer.main.get_command(app)
    lines = ["# Reference", "", "Written from the code by `python -m scripts.reference`; a test keeps it current.", ""]
    lines += ["## Commands", ""]
    lines += _commands(command, "dynamo")
    lines += ["## Configuration", "", *_SETTINGS, ""]
    for title, model in (
        ("Frontend", FrontendConfig),
        ("PrefillWorker, DecodeWorker, AggWorker", WorkerConfig),
        ("Planner", PlannerConfig),
        ("limits of a policy file", Limits),
    ):
        lines += _fields(title, model)
    lines += [*_variables()]
    lines += [
        "## Metrics",
        "",
        "Dynamo adds `dynamo_namespace`, `dynamo_component`, `dynamo_endpoint`, `worker_id`.",
        "",
    ]
    lines += ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in names.WORKER:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.full_name}` | {metric.kind} | {labels} | {metric.help} |")
    lines += [
        "",
        "## Errors",
        "",
        "| code | class | retryable | meaning |",
        "|---|---|---|---|",
        *_errors(MigrateError),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())

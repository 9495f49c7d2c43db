# SPDX-License-Identifier: Apache-2.0
"""The documentation: links lead somewhere, code blocks are right, the reference is current."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from components.cli import app
from scripts.reference import TARGET, text
from tests.documents import PAGES, ROOT, commands, modules, options

FENCE = re.compile(r"^[ ]*```(\w+)\n(.*?)^[ ]*```", re.M | re.S)
IDS = [page.name for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
        # The site has no files of other folders: mkdocs would refuse them.
        assert page.parent == ROOT or target.startswith("http") or "/" not in target.removeprefix("images/"), target


def anchors(page: Path) -> set[str]:
    """Of headings, as the site's and GitHub's generators make them, and those that a page sets."""
    text = page.read_text()
    titles = [re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    made = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    return made | set(re.findall(r'id="(\S+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_headings_that_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text()):
        assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_and_yaml_blocks_are_right(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec", flags=0x2000)  # Top-level await, as in a notebook.
    for code in blocks(page, "yaml"):
        yaml.safe_load(code)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        {"dynamo": check_dynamo, "pytest": check_pytest, "make": check_make}.get(words[0], check_module)(words)


def check_dynamo(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, words
        command = command.commands[name]
    known = {option for given in command.params for option in given.opts}
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("-") and "." not in option:
            assert option in known, f"{command.name} has no {option}"
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word


def check_pytest(words: list[str]) -> None:
    for word in words[1:]:
        assert not word.startswith("tests/") or (ROOT / word).exists(), words


def check_make(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words


def check_module(words: list[str]) -> None:
    """Its options are in its source; ``--help`` itself, which takes seconds, is asked in the slow group."""
    name = words[2]
    assert importlib.util.find_spec(name), words
    if name not in modules():
        return  # Of Dynamo or vLLM.
    path = ROOT / name.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert "__main__" in source or path.is_dir(), words
    if name == "components.worker":
        return  # Its arguments are those of dynamo.vllm.
    for option in options(words[3:]):
        parameter = option.removeprefix("--").replace("-", "_")
        assert f'"{option}"' in source or re.search(rf"\b{parameter}\b", source), f"{name} has no {option}"


def test_the_policy_of_the_tutorial_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner_hooks.config import parse
    from planner_hooks.snapshot import Snapshot
    from tests.unit.planner_hooks.clusters import cluster, request

    page = ROOT / "docs" / "tutorial-policy.md"
    [code], [settings] = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "my_policies").mkdir()
    (tmp_path / "my_policies" / "relieve.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = parse(yaml.safe_load(settings)).build("relieve")
    crowded = cluster([request(f"r{i}", "w0", 2900) for i in range(3)])
    assert policy.plan(Snapshot.of(crowded)).moves
    assert not policy.plan(Snapshot.of(cluster([request("r", "w0", 100)]))).moves


def test_the_reference_is_what_the_code_says() -> None:
    assert TARGET.read_text() == text(), "run: python -m scripts.reference"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.name for page in PAGES[1:]}


def test_the_performance_page_is_short() -> None:
    words = (ROOT / "docs" / "performance.md").read_text().split()
    assert len([word for word in words if not set(word) <= set("|-:")]) <= 900


def test_raw_files_that_pages_name_exist() -> None:
    kinds = "chat|crowd|faults|migration|policy|serving|steps|streams|transfer"
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(rf"`(?:benchmarks/results/)?((?:{kinds})-[\w-]+\.json)`", text))
    missing = named - {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert missing <= {"serving-cpu.json"}, "the file that `make bench` writes"


def test_tests_that_pages_name_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in sources, f"{page.name}: {name}"
        for path in re.findall(r"`((?:tests|benchmarks|components|planner_hooks)/[\w/]+\.py)`", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"

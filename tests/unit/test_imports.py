# SPDX-License-Identifier: Apache-2.0
"""Each name that a file imports from this repository exists, also in files that only a GPU machine runs; nothing heavy
is imported where it is not used.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOPS = ("components", "planner_hooks", "graphs", "benchmarks", "scripts", "tests")
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for top in TOPS
    for path in sorted((ROOT / top).rglob("*.py"))
}
PACKAGES = {module.rpartition(".")[0] for module in TREES} | set(TOPS)


def bound(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines, imports or gives a value to, wherever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def missing(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
            yield from (name for name in named if name.partition(".")[0] in TOPS and name not in TREES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in TOPS:
            source = str(node.module)
            names = NAMES.get(source)
            for name in (alias.name for alias in node.names):
                if f"{source}.{name}" in TREES or f"{source}.{name}" in PACKAGES:
                    continue
                # A package may give its names only when they are asked for.
                if names is None or (name not in names and "__getattr__" not in names):
                    yield f"{module}: {source}.{name}"


NAMES = {module: set(bound(tree)) for module, tree in TREES.items()}


def test_every_imported_name_of_ours_exists() -> None:
    assert [fault for module, tree in TREES.items() for fault in missing(module, tree)] == []


def test_a_worker_without_a_model_starts_without_vllm() -> None:
    code = "import sys, components.worker.mocker; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False"]

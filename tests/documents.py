# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, and the commands that they name: in code blocks and in the text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAM = r"(?:python[\d.]* -m|dynamo|pytest|make) \S"
_INLINE = re.compile(rf"`((?:\w+=\S+ )*{_PROGRAM}[^`]*)`")
_LINE = re.compile(rf"^ *(?:\$ )?((?:\w+=\S+ )*{_PROGRAM}.*)$", re.M)
_FENCE = re.compile(r"^[ ]*```\w*\n(.*?)^[ ]*```", re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Words of each command of a page, without variables in front of it."""
    text = page.read_text().replace("\\\n", " ")
    indented = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    blocks = "\n".join([*_FENCE.findall(text), indented])
    found = [*_LINE.findall(blocks), *_INLINE.findall(_FENCE.sub("", text))]
    split = [shlex.split(command.replace("\n", " "), comments=True) for command in found]
    return [
        [word for at, word in enumerate(words) if "=" not in word or any("=" not in w for w in words[:at])]
        for words in split
    ]


def modules() -> dict[str, set[str]]:
    """Modules of this repository that pages run with ``python -m``, each with the options that they name."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for words in commands(page):
            if words[0].startswith("python") and (ROOT / words[2].split(".")[0]).is_dir():
                found.setdefault(words[2], set()).update(options(words[3:]))
    return found


def options(words: list[str]) -> set[str]:
    """The long options among the words of a command, without those of a component."""
    names = {word.partition("=")[0] for word in words if word.startswith("--")}
    return {name for name in names if "." not in name}

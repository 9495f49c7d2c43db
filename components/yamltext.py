# SPDX-License-Identifier: Apache-2.0
"""YAML from people, in files and arguments. Bounded: the parser takes minutes for some kilobytes of brackets.

No state. Raises ``ConfigError`` with the origin of the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from components.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64


def read(path: Path) -> Any:
    """The contents of a file. The caller explains a ``FileNotFoundError``."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes: is it the right file?")
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def parse(text: str, where: str) -> Any:
    """The value of a text."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where} is not YAML: more than {MAX_DEPTH} brackets inside each other")
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where} is not YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {error or type(error).__name__}") from error

# SPDX-License-Identifier: Apache-2.0
"""Folders that can be written: asked by writing, because users, mounts and quotas all have a say. Light."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from components.errors import ConfigError


def usable(folder: Path) -> bool:
    """Can a file be made there? The folder is made when it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temporary() -> Path:
    """The folder for temporary files. Raises ``ConfigError`` when none can be written."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ConfigError(
            "no folder for temporary files can be written: set TMPDIR to one that can (in a container, an emptyDir)"
        ) from error


def own(name: str) -> Path:
    """A folder of this user where everybody may make one, with nobody else to write in it. Raises ``ConfigError``."""
    folder = temporary() / f"{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"no folder can be made: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{folder} is not this user's own: remove it, or set TMPDIR to another folder")
    return folder

# SPDX-License-Identifier: Apache-2.0
"""Writable folders, tested by writing, because users, mounts and quotas all matter. Cheap to import."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from components.errors import ConfigError


def usable(folder: Path) -> bool:
    """True when a file can be made there. Makes a missing folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temporary() -> Path:
    """The folder for temporary files. Raises ``ConfigError`` when none is writable."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ConfigError(
            "no folder for temporary files can be written: set TMPDIR to one that can (in a container, an emptyDir)"
        ) from error


def own(name: str) -> Path:
    """A private folder of this user among the temporary files. Raises ``ConfigError``."""
    folder = temporary() / f"{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"no folder can be made: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{folder} is not this user's own: remove it, or set TMPDIR to another folder")
    return folder

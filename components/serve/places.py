# SPDX-License-Identifier: Apache-2.0
"""Folders that a graph's processes need, with replacements for unusable ones.

    HOME     Dynamo keeps model cards only in ``.cache/dynamo/mdc`` below it, and waits without end when it cannot
             write there. The processes get a temporary one.
    TMPDIR   vLLM puts sockets there, with paths of at most 107 characters. A long one gets a short folder beside it.
    USER     torch names a folder after the user, who may have no name in a container: the number becomes the name.

``Places`` makes the replacements and removes them in ``close``. ``said`` has messages for the user. Raises
``ConfigError`` when no folder is writable.
"""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from components import env
from components.errors import ConfigError
from components.folders import temporary, usable
from components.serve.warden import Warden

SOCKETS = env.SOCKETS.name
LONGEST = 107 - len("/01234567-89ab-cdef-0123-456789abcdef")
"""Most characters of a folder for vLLM's sockets."""
CARDS = Path(".cache/dynamo/mdc")


def home_is_usable(environment: Mapping[str, str]) -> bool:
    """True when Dynamo can keep model cards."""
    home = env.HOME.read(environment)
    return bool(home) and usable(Path(home) / CARDS)


def sockets_fit(folder: Path) -> bool:
    """True when its path is short enough for vLLM's sockets."""
    return len(os.fsencode(folder)) <= LONGEST


def nameless() -> bool:
    """True when this process's user has no name."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return True
    return False


class Places:
    """See the module docstring. ``variables`` are for the processes' environment."""

    def __init__(self, environment: Mapping[str, str], warden: Warden | None = None) -> None:
        self.variables: dict[str, str] = {}
        self.said: list[str] = []
        self._made: list[Path] = []
        self._warden = warden
        self._sockets(environment)
        self._home(environment)
        if nameless() and not environment.get("USER"):
            self.variables["USER"] = f"user{os.getuid()}"

    def _sockets(self, environment: Mapping[str, str]) -> None:
        given = env.SOCKETS.read(environment)
        if given:
            if not sockets_fit(Path(given)) or not usable(Path(given)):
                raise ConfigError(f"{SOCKETS} = {given}: name a folder that can be written, {LONGEST} characters long")
            return
        bases = [temporary(), *map(Path, filter(None, (env.RUNTIME_FOLDER.read(environment), "/tmp", "/dev/shm")))]
        for base in bases:
            # Files of a killed vLLM go with the folder.
            if sockets_fit(base / "dynamo-migrate-12345678") and base.is_dir() and usable(base):
                self.variables[SOCKETS] = str(self._make(base))
                return
        raise ConfigError(
            f"TMPDIR = {temporary()} is too long for vLLM's sockets, and no shorter folder can be written: "
            f"set {SOCKETS} to one of at most {LONGEST} characters"
        )

    def _home(self, environment: Mapping[str, str]) -> None:
        if home_is_usable(environment):
            return
        home = self._make(temporary())
        if not usable(home / CARDS):
            raise ConfigError(f"neither HOME nor {home} can be written: set HOME to a folder that can")
        before = env.HOME.read(environment)
        self.variables["HOME"] = str(home)
        models = Path(before) / ".cache" / "huggingface"
        if before and "HF_HOME" not in environment and models.is_dir():
            self.variables["HF_HOME"] = str(models)
        trouble = f"HOME = {before} cannot be written" if before else "HOME is not set"
        self.said.append(f"{trouble}: the processes get {home} until the graph ends")

    def _make(self, base: Path) -> Path:
        try:
            folder = Path(tempfile.mkdtemp(prefix="dynamo-migrate-", dir=base))
        except OSError as error:
            raise ConfigError(f"no folder can be made in {base}: {error.strerror}; set TMPDIR to another") from error
        self._made.append(folder)
        if self._warden is not None:
            self._warden.keep_clean(folder)
        return folder

    def close(self) -> None:
        """Remove the replacements. Idempotent."""
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)

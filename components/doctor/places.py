# SPDX-License-Identifier: Apache-2.0
"""Checks folders and names that the processes of a graph need, as this user. Raises and leaves nothing.

``dynamo serve`` replaces unusable ones for its processes (``components.serve.places``); processes without it, as in
Kubernetes, need them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from components import env
from components.doctor.check import Check, State, checked
from components.errors import ConfigError
from components.folders import temporary, usable
from components.models import cache_folder
from components.serve.places import LONGEST, home_is_usable, nameless, sockets_fit

_GIB = 1 << 30


def places(environment: Mapping[str, str]) -> list[Check]:
    """All lines about them."""
    return [_home(environment), _temporary(), _cache(), *_user(environment)]


def _home(environment: Mapping[str, str]) -> Check:
    home = env.HOME.read(environment)
    good = home_is_usable(environment)
    found = home if good else f"{home} cannot be written" if home else "HOME is not set"
    fix = "dynamo serve takes another one; elsewhere set HOME to one that can be written, or Dynamo waits for ever"
    return checked("home folder", good, found, fix)


def _temporary() -> Check:
    try:
        folder = temporary()
        free = shutil.disk_usage(folder).free
    except (ConfigError, OSError) as error:
        return Check("temporary files", State.FAIL, str(error), "set TMPDIR to a folder that can be written")
    if not usable(folder):
        return Check("temporary files", State.FAIL, f"{folder} cannot be written", "set TMPDIR to a folder that can be")
    found = f"{folder}, {free / _GIB:.1f} GiB free"
    if not sockets_fit(folder):
        fix = f"dynamo serve puts vLLM's sockets elsewhere; else set {env.SOCKETS.name} to at most {LONGEST} characters"
        return Check("temporary files", State.WARN, f"{found}: too long a path for vLLM's sockets", fix)
    return checked("temporary files", free >= _GIB, found, "make room, or set TMPDIR to a larger folder")


def _cache() -> Check:
    try:
        return Check("cache", State.OK, str(cache_folder()))
    except ConfigError as error:
        return Check("cache", State.FAIL, str(error), f"set {env.CACHE.name} to a folder that can be written")


def _user(environment: Mapping[str, str]) -> list[Check]:
    if not nameless() or environment.get("USER"):
        return []
    fix = "dynamo serve sets USER for its processes; elsewhere set it, or torch finds no folder for what it compiles"
    return [Check("user", State.WARN, f"number {os.getuid()} has no name", fix)]

# SPDX-License-Identifier: Apache-2.0
"""Makes Dynamo's planner importable without ``aisimulate_core``, its model of engines' speed.

Dynamo 1.6 imports two names of that package wherever the planner is imported, and uses them for the optimization
target ``sla`` alone. The package is not on the public index, and this product's planner decides by load. ``stand_in``
must run before anything of ``dynamo.planner`` is imported; where the package is installed it does nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

_PACKAGE = "aisimulate_core"


def installed() -> bool:
    """Is the real package there?"""
    found = sys.modules.get(_PACKAGE)
    return not hasattr(found, "stand_in") and (found is not None or importlib.util.find_spec(_PACKAGE) is not None)


class _Missing:
    """Fails when it is used; the planner then goes on without estimates."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError(f"{_PACKAGE} is not installed")


def stand_in() -> None:
    """See the module docstring. May be called again."""
    if installed() or _PACKAGE in sys.modules:
        return
    package, sdk = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.sdk")
    package.__dict__.update(stand_in=True, sdk=sdk)
    sdk.__dict__.update(ForwardPassPerfModelConfig=_Missing, RustForwardPassPerfModel=_Missing)
    sys.modules.update({_PACKAGE: package, f"{_PACKAGE}.sdk": sdk})

# SPDX-License-Identifier: Apache-2.0
"""Makes Dynamo's planner importable without ``aisimulate_core``, its model of engine speed.

Dynamo 1.6's planner imports two names of that package and uses them only for the optimization target ``sla``. The
package is not on the public index, and this package's planner decides by load. ``stand_in`` must run before the import
of ``dynamo.planner``; with the package installed it does nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

_PACKAGE = "aisimulate_core"


def installed() -> bool:
    """True when the real package is installed."""
    found = sys.modules.get(_PACKAGE)
    return not hasattr(found, "stand_in") and (found is not None or importlib.util.find_spec(_PACKAGE) is not None)


class _Missing:
    """Raises when used; the planner then goes on without estimates."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError(f"{_PACKAGE} is not installed")


def stand_in() -> None:
    """See the module docstring. Idempotent."""
    if installed() or _PACKAGE in sys.modules:
        return
    package, sdk = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.sdk")
    package.__dict__.update(stand_in=True, sdk=sdk)
    sdk.__dict__.update(ForwardPassPerfModelConfig=_Missing, RustForwardPassPerfModel=_Missing)
    sys.modules.update({_PACKAGE: package, f"{_PACKAGE}.sdk": sdk})

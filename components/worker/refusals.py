# SPDX-License-Identifier: Apache-2.0
"""What vLLM refuses is told to the client in vLLM's words.

Dynamo's frontend keeps the text of a worker's exception to itself unless it is Dynamo's own ``InvalidArgument``. Its
handlers make an ``HttpError`` of what vLLM refuses, so that a client reads "Bad Request" and no more.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_NAME = "vllm_client_error_to_http_error"


def install() -> None:
    """Dynamo's handlers look their translation up at each error."""
    errors = vars(importlib.import_module("dynamo.vllm.errors"))
    errors[_NAME] = functools.partial(_told, errors[_NAME])


def _told(translate: Callable[[Any], Any], error: Exception) -> Exception:
    from dynamo.llm.exceptions import InvalidArgument

    translated: Any = translate(error)
    # What is not found, or not to be processed, keeps its own status.
    return InvalidArgument(str(error)) if translated.code == 400 else translated

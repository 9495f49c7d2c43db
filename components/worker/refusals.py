# SPDX-License-Identifier: Apache-2.0
"""Passes vLLM's reason for a refused request to the client.

Dynamo's frontend shows the text of a worker's exception only for Dynamo's ``InvalidArgument``. Its handlers turn
vLLM's refusals into an ``HttpError``, of which the client reads "Bad Request" and no more.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_NAME = "vllm_client_error_to_http_error"


def install() -> None:
    """Replace the translation that Dynamo's handlers look up at each error."""
    errors = vars(importlib.import_module("dynamo.vllm.errors"))
    errors[_NAME] = functools.partial(_told, errors[_NAME])


def _told(translate: Callable[[Any], Any], error: Exception) -> Exception:
    from dynamo.llm.exceptions import InvalidArgument

    translated: Any = translate(error)
    # Other statuses (404, 422) stay.
    return InvalidArgument(str(error)) if translated.code == 400 else translated

# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchvision where there is none.

``dynamo.vllm`` imports one image function of transformers, for multimodal models, and that import needs torchvision, of
which PyPI has no build for CPU torch. Text models never call it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

_IMAGES = "transformers.models.qwen2_vl.image_processing_qwen2_vl"


def install() -> None:
    """Idempotent; does nothing where torchvision is installed."""
    if importlib.util.find_spec("torchvision") is None and _IMAGES not in sys.modules:
        module = types.ModuleType(_IMAGES)
        module.__spec__ = importlib.machinery.ModuleSpec(_IMAGES, None)
        module.__dict__["smart_resize"] = None
        sys.modules[_IMAGES] = module

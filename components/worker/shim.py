# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a missing torchvision.

``dynamo.vllm`` imports one image function of transformers, for multimodal models. That import needs torchvision, which
has no build for CPU torch on PyPI. Text models never call the function.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

_IMAGES = "transformers.models.qwen2_vl.image_processing_qwen2_vl"


def install() -> None:
    """Install the stand-in unless torchvision is there. Idempotent."""
    if importlib.util.find_spec("torchvision") is None and _IMAGES not in sys.modules:
        module = types.ModuleType(_IMAGES)
        module.__spec__ = importlib.machinery.ModuleSpec(_IMAGES, None)
        module.__dict__["smart_resize"] = None
        sys.modules[_IMAGES] = module

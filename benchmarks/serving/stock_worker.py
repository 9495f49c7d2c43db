# SPDX-License-Identifier: Apache-2.0
"""Runs the unchanged ``dynamo.vllm`` where torchvision is missing: ``python -m benchmarks.serving.stock_worker ARGS``.

Dynamo 1.6's vLLM worker imports one image function of transformers, for multimodal models, and that import needs
torchvision, of which PyPI has no build for CPU torch. A placeholder stands in for that one module; text models
never call it. The placeholder is set at import time, so that vLLM's spawned engine process has it too.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import runpy
import sys
import types

_IMAGES = "transformers.models.qwen2_vl.image_processing_qwen2_vl"


def _placeholder() -> None:
    if importlib.util.find_spec("torchvision") is None and _IMAGES not in sys.modules:
        module = types.ModuleType(_IMAGES)
        module.__spec__ = importlib.machinery.ModuleSpec(_IMAGES, None)
        module.__dict__["smart_resize"] = None
        sys.modules[_IMAGES] = module


_placeholder()

if __name__ == "__main__":
    sys.argv[0] = "dynamo.vllm"
    runpy.run_module("dynamo.vllm", run_name="__main__")

# SPDX-License-Identifier: Apache-2.0
"""Runs the unchanged ``dynamo.vllm`` where torchvision is missing: ``python -m benchmarks.serving.stock_worker ARGS``.

The placeholder is set at import time, so that vLLM's spawned engine process has it too.
"""

from __future__ import annotations

import runpy
import sys

from components.worker import shim

shim.install()

if __name__ == "__main__":
    sys.argv[0] = "dynamo.vllm"
    runpy.run_module("dynamo.vllm", run_name="__main__")

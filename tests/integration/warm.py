# SPDX-License-Identifier: Apache-2.0
"""Engine cores that start from a process that has imported vLLM: its spawned ones take 10 s of a core for that.

Such a process is forked from one without threads and gets arguments and environment as a spawned one does.
"""

from __future__ import annotations

import os
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_PRELOADED = [
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "components.engine.vllm.scheduler",
    "tests.pillow.sitecustomize",
]


class _Process(ForkServerProcess):
    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Process


def engines() -> None:
    """Start the engine cores of this process so. Idempotent."""
    from vllm.v1.engine import utils

    context: Any = _Context()
    context.set_forkserver_preload(_PRELOADED)
    vars(utils)["get_mp_context"] = lambda: context

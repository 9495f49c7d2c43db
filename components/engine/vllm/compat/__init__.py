# SPDX-License-Identifier: Apache-2.0
"""Everything that touches a private name of vLLM, for the release series of ``components.versions.TESTED``.

    scheduler.py   SchedulerPort: queues, seats, blocks and request states of a vLLM scheduler
    runners.py     RunnerPort: what a model runner keeps of a request; one port for V1, one for V2
    core.py        the call that this package adds to vLLM's engine core
    requests.py    ids of requests, and why one of them cannot move

The rest of ``components.engine.vllm`` uses what vLLM documents: ``scheduler_cls``, the connector's interface,
``worker_extension_cls``, public methods of ``Scheduler`` and ``AsyncLLM``. ``tests/unit/test_vllm_names.py`` touches
each private name on the installed vLLM, and mypy reads this folder against vLLM's own annotations.

A release that moves one of the names gets its own branch here, chosen by the installed version; a series that nobody
has tested is one ``ConfigError`` where an engine starts, which names those that were.
"""

from __future__ import annotations

from components import versions


def require_tested_vllm() -> str:
    """The installed version; raises ``ConfigError`` for a release series that was never tested."""
    version = versions.installed("vllm")
    versions.require("vllm", version)
    return version

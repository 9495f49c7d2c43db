# SPDX-License-Identifier: Apache-2.0
"""All code that uses private names of vLLM, for the release series of ``components.versions.TESTED``.

    scheduler.py   SchedulerPort: queues, blocks and request states of a vLLM scheduler
    seats.py       seats in its batch for requests that do not run
    resumed.py     requests with output tokens of another engine
    runners.py     RunnerPort: a model runner's state of a request, for V1 and V2
    core.py        the call that this package adds to vLLM's engine core
    connectors.py  this package's connector among others of an engine
    requests.py    ids of requests, and reasons why a request cannot move

The rest of ``components.engine.vllm`` uses documented interfaces: ``scheduler_cls``, the connector's interface,
``worker_extension_cls``, public methods of ``Scheduler`` and ``AsyncLLM``. ``tests/unit/test_vllm_names.py`` touches
each private name on the installed vLLM, and mypy checks this folder against vLLM's annotations.

A release that moves one of the names gets its own branch here, chosen by the installed version. An engine does not
start on an untested series: one ``ConfigError`` names the tested ones.
"""

from __future__ import annotations

from components import versions


def require_tested_vllm() -> str:
    """The installed version; raises ``ConfigError`` for an untested release series."""
    version = versions.installed("vllm")
    versions.require("vllm", version)
    return version

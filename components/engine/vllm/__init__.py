# SPDX-License-Identifier: Apache-2.0
"""vLLM behind the engine protocol.

    engine.py       VLLMEngine: the protocol, in the worker's own process, around ``AsyncLLM``
    control.py      the structs that travel between it and the engine core, and how they get there
    scheduler.py    freeze, land, commit: a vLLM scheduler that can hand requests over
    records.py      what that scheduler remembers of each request on the move
    connector.py    the KV connector that vLLM loads; delegates to the two sides
    loader.py       worker side: runs copy jobs on the transfer component
    runner_state.py worker side: puts a migrated request into the model runner

No file of vLLM is changed. The scheduler is loaded by ``scheduler_cls``, the connector by
``kv_connector_module_path``, the worker calls by ``worker_extension_cls``.
"""

from components.engine.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]

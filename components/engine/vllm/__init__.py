# SPDX-License-Identifier: Apache-2.0
"""vLLM behind the engine protocol.

    engine.py       VLLMEngine: the protocol, in the worker's process, around ``AsyncLLM``
    arguments.py    arguments that every ``AsyncLLM`` needs
    control.py      the structs that travel between the two

In the engine core's process:
    scheduler.py    vLLM's schedulers with a ``Migration``
    migration.py    records of all requests, and the calls; ``tables.py`` its views
    migrate_out.py  the source: offer, freeze, resume
    migrate_in.py   the destination: reserve, rounds, commit; ``claims.py`` what a source says
    copies.py       its copy jobs
    ranks.py        calls to the workers
    connector.py    the KV connector that vLLM loads

In the worker's:
    loader.py       the transfer agent and its copy jobs
    worker.py       what ``ranks.py`` calls

``compat/`` has every private name of vLLM. No file of vLLM is changed. The scheduler is loaded by ``scheduler_cls``,
the connector by ``kv_connector_module_path``, the worker's methods by ``worker_extension_cls``.
"""

# SPDX-License-Identifier: Apache-2.0
"""A stock ``dynamo.vllm`` worker with migration: ``python -m components.worker`` takes its arguments.

Life cycle: Dynamo's entry point runs. A subclass replaces its ``WorkerFactory``: it gives the engine this package's
scheduler and connector, wraps two of its calls (``engine_client``), and serves one more endpoint, ``migrate``, before
the model is registered. Once Dynamo serves, it loads the configured adapters and notifies the launcher. On SIGTERM
the worker drains for at most ``DYN_MIGRATE_DRAIN_S`` before Dynamo ends it.

Errors: those of this package end the process with one line and exit code 2.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm import envs

from components import process, versions
from components.engine.vllm.arguments import STOCK_CONNECTOR, configure
from components.errors import ConfigError, MigrateError
from components.metrics.export import address, expose
from components.migration.options import Options
from components.migration.peers import Peers, short
from components.migration.requests import Requests
from components.models import adapters
from components.worker import refusals, shim, weights
from components.worker.control import Control
from components.worker.engine_client import EngineClient
from components.worker.handoff import Handoffs
from components.worker.settings import WorkerSettings
from components.worker.state import WorkerStatus
from components.worker.unrepeated import Unrepeated, handler_class

logger = logging.getLogger(__name__)
_CONNECTOR = "--kv-transfer-config"
_SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_DRAIN_TIMEOUT = "_DEFAULT_DRAIN_TIMEOUT_SECS"
_LOAD_S = 120.0
_MARGIN_S = 5.0
"""Time for moves of a drain that have begun by then."""


class Migration:
    """Migration in Dynamo's worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.runtime: Any = None
        self.unrepeated = Unrepeated()
        self.client: EngineClient | None = None
        self.status: WorkerStatus | None = None
        self.handoffs: Handoffs | None = None
        self._tasks: list[asyncio.Future[Any]] = []

    def setup(self, original: Any, config: Any, *args: Any, **keywords: Any) -> Any:
        """Wraps Dynamo's ``setup_vllm_engine``."""
        prepare(config, self.settings)
        result = original(config, *args, **keywords)
        self.client = EngineClient(result[0], self.unrepeated, self.settings.lease_s)
        return result

    async def register(self, original: Any, *args: Any, **keywords: Any) -> Any:
        """Wraps Dynamo's ``register_vllm_model``: peers can call this worker before clients can."""
        names = ("model_input", "model_type", "generate_endpoint", "config", "engine_client", "vllm_config")
        given = dict(zip(names, args, strict=False)) | keywords
        config, endpoint = given["config"], given["generate_endpoint"]
        if self.client is not None and self.status is None:
            self.status = await self._serve(config, endpoint, self.client)
            await weights.until_alone(*self.status.kin)
            self._tasks.append(asyncio.ensure_future(self.open(config, endpoint, self.status)))
        return await original(*args, **keywords)

    async def _serve(self, config: Any, endpoint: Any, client: EngineClient) -> WorkerStatus:
        engine = client.engine
        info = await engine.start()
        role = str(getattr(config.disaggregation_mode, "value", config.disaggregation_mode))
        peers = await Peers.of_worker(
            self.runtime, config.namespace, config.component, endpoint, self.settings.components, role
        )
        options = Options(
            repeats=self.settings.repeats,
            steps_ahead=info.steps_ahead,
            kv_bytes_per_token=info.kv_bytes_per_token,
        )
        requests = Requests(engine, peers, int(endpoint.connection_id()), info.fingerprint, options)
        name = short(requests.instance)
        status = WorkerStatus(requests, name, role, info, endpoint, address(self.settings.agent["advertise_host"]))
        expose(status.metrics(), endpoint, config.namespace, config.component)
        self.handoffs = Handoffs(requests, engine.free_lent, self.settings.lease_s, info.max_model_len)
        control = Control(requests, status, self.handoffs.release, self.settings.agent["advertise_host"])
        path = f"{config.namespace}.{config.component}.migrate"
        self._tasks += [
            asyncio.ensure_future(self.runtime.endpoint(path).serve_endpoint(control.serve)),
            asyncio.ensure_future(requests.sweep()),
        ]
        client.serve(requests, self.handoffs)
        client.controls.follow(info.fingerprint, status)
        logger.info("worker %s on %s migrates over %s", name, socket.gethostname(), ", ".join(info.lanes))
        return status

    async def open(self, config: Any, endpoint: Any, status: WorkerStatus) -> None:
        """Runs once Dynamo serves."""
        try:
            await _known(endpoint)
            await status.give_way()
            if self.settings.lora_modules:
                load = self.runtime.endpoint(f"{config.namespace}.{config.component}.load_lora")
                await load_adapters(load, self.settings.lora_modules)
        except MigrateError as error:
            _fail(error)
        # vLLM looks one up for each token: a quarter of what the outputs of 64 requests cost this process.
        envs.enable_envs_cache()
        process.ready()

    async def drain(self) -> None:
        """Dynamo's drain callback."""
        end = time.monotonic() + self.settings.drain_s
        if self.status is not None:
            await self.status.leave(self.settings.drain_s)
        while self.handoffs is not None and self.handoffs.num_lent and time.monotonic() < end:
            await asyncio.sleep(0.05)


def prepare(config: Any, settings: WorkerSettings) -> None:
    """Set scheduler, connector and worker extension in Dynamo's ``Config``. Raises ``ConfigError`` on a conflict."""
    from dynamo.vllm.kv_connector_protocols import KV_CONNECTOR_PROTOCOLS, NixlConnectorProtocol

    # Dynamo's registry of prefill protocols; this connector's is NixlConnector's.
    KV_CONNECTOR_PROTOCOLS.setdefault("MigrationConnector", NixlConnectorProtocol)
    configure(
        config.engine_args,
        settings.agent,
        {"integrity": settings.integrity, "adapters": adapters.digest(settings.lora_modules)},
    )


async def _known(endpoint: Any) -> Any:
    """Wait until Dynamo's discovery has this process's instance of the endpoint. Returns a client."""
    client = await endpoint.client()
    while int(endpoint.connection_id()) not in client.instance_ids():
        await asyncio.sleep(0.05)
    return client


async def load_adapters(endpoint: Any, adapters: Mapping[str, str]) -> None:
    """Load adapters through Dynamo's endpoint, so that frontends list them too."""
    client = await _known(endpoint)
    for name, folder in adapters.items():
        source = {"uri": Path(folder).expanduser().resolve().as_uri()}
        call = {"lora_name": name, "source": source}
        try:
            async with asyncio.timeout(_LOAD_S):
                async for reply in await client.direct(call, int(endpoint.connection_id()), annotated=False):
                    if reply.get("status") != "success":
                        raise ConfigError(f"lora-modules: {name!r} was not loaded: {reply.get('message', reply)}")
        except TimeoutError as error:
            raise ConfigError(f"lora-modules: {name!r} was not loaded within {_LOAD_S:g} s") from error


def _fail(error: MigrateError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(2)


def install(settings: WorkerSettings) -> Migration:
    """Put migration into ``dynamo.vllm.main``. Returns it, for tests."""
    from dynamo.common.utils.graceful_shutdown import install_signal_handlers
    from dynamo.vllm.worker_factory import WorkerFactory

    migration = Migration(settings)

    class Factory(WorkerFactory):
        """Dynamo's factory with migration."""

        def __init__(self, *, setup_vllm_engine_fn: Any, register_vllm_model_fn: Any, **functions: Any) -> None:
            super().__init__(
                setup_vllm_engine_fn=functools.partial(migration.setup, setup_vllm_engine_fn),
                register_vllm_model_fn=functools.partial(migration.register, register_vllm_model_fn),
                **functions,
            )

        async def create(self, runtime: Any, *args: Any, **keywords: Any) -> None:
            migration.runtime = runtime
            await super().create(runtime, *args, **keywords)

    refusals.install()
    # Names in Dynamo's entry point.
    factory = vars(importlib.import_module("dynamo.vllm.worker_factory"))
    factory["DecodeWorkerHandler"] = handler_class(factory["DecodeWorkerHandler"], migration.unrepeated)
    stock = importlib.import_module("dynamo.vllm.main")
    vars(stock)["WorkerFactory"] = Factory
    vars(stock)["install_signal_handlers"] = functools.partial(install_signal_handlers, drain_callback=migration.drain)
    # Dynamo ends a drain after 30 s.
    shutdown = vars(importlib.import_module("dynamo.common.utils.graceful_shutdown"))
    shutdown[_DRAIN_TIMEOUT] = max(shutdown[_DRAIN_TIMEOUT], settings.drain_s + _MARGIN_S)
    return migration


def main(argv: list[str] | None = None) -> None:
    """``python -m components.worker``."""
    os.environ.setdefault("PYTHONHASHSEED", "0")
    shim.install()
    if argv is not None:
        sys.argv[1:] = argv
    try:
        versions.require_served()
    except ConfigError as error:
        _fail(error)
    from dynamo.vllm.main import main as stock_main

    if not any(arg.split("=")[0] == _CONNECTOR for arg in sys.argv):
        # Dynamo requires a prefill worker to name a connector, which ``prepare`` replaces.
        sys.argv += [_CONNECTOR, json.dumps({"kv_connector": STOCK_CONNECTOR, "kv_role": "kv_both"})]
    sys.argv[0] = "dynamo.vllm"
    try:
        settings = WorkerSettings.from_environment()
        # Dynamo looks for an address for that connector, and ends on a host without a route to other networks.
        os.environ.setdefault(_SIDE_CHANNEL_HOST, settings.agent["advertise_host"])
        install(settings)
        stock_main()
    except MigrateError as error:
        _fail(error)
    # Everything is closed. Dynamo's native runtime may abort in the interpreter's finalisation.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

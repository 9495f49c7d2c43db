# SPDX-License-Identifier: Apache-2.0
"""The plugins in a separate process, over gRPC: ``python -m planner_hooks.server --listen 127.0.0.1:7070``.

The planner's file has the address; one address serves both stages (docs/planner.md):

    scheduling:
      external_plugins:
        - {plugin_id: migration, plugin_type: propose, priority: 5, endpoint: "grpc://127.0.0.1:7070",
           needs: [observations.fpm, observations.workers]}
        - {plugin_id: scale-down, plugin_type: constrain, priority: 5, endpoint: "grpc://127.0.0.1:7070",
           needs: [observations.fpm, observations.workers]}
    plugin_registration: {transport: {allow_insecure_grpc: true}}

Dynamo uses plain gRPC to plugins: listen on loopback or inside a pod. Prints ``listening on ADDRESS`` when it
serves, ends on SIGTERM. Raises ``ConfigError`` for a wrong policy file or an unusable address.
"""

from __future__ import annotations

import argparse
from typing import Any

import grpc

from components import process
from components.errors import ConfigError
from planner_hooks.perf_model import stand_in
from planner_hooks.plugin import MigrationPlugin, ScaleDownPlugin

stand_in()

from dynamo.planner.plugins._proto_bridge import proto_to_pydantic, pydantic_to_proto  # noqa: E402
from dynamo.planner.plugins.proto.v1 import plugin_pb2_grpc as rpc  # noqa: E402


class Service(rpc.ProposePluginServicer, rpc.ConstrainPluginServicer):
    """Both stages. Turns messages into the classes of in-process plugins."""

    def __init__(self, migration: MigrationPlugin, scale_down: ScaleDownPlugin) -> None:
        self._migration = migration
        self._scale_down = scale_down

    async def Propose(self, request: Any, context: Any) -> Any:  # noqa: N802 (name in Dynamo's protocol)
        """One decision about migrations."""
        return pydantic_to_proto(await self._migration.Propose(proto_to_pydantic(request)))

    async def Constrain(self, request: Any, context: Any) -> Any:  # noqa: N802 (name in Dynamo's protocol)
        """Bounds for the proposal."""
        return pydantic_to_proto(await self._scale_down.Constrain(proto_to_pydantic(request)))


async def start(listen: str, service: Service) -> tuple[grpc.aio.Server, str]:
    """A running server and its listening address."""
    server = grpc.aio.server()
    rpc.add_ProposePluginServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    rpc.add_ConstrainPluginServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(f"--listen {listen}: {error}; choose another address") from error
    await server.start()
    return server, f"{listen.rpartition(':')[0]}:{port}"


async def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="The planner's plugins over gRPC.")
    parser.add_argument("--listen", default="127.0.0.1:7070", help="address and port; port 0 takes a free one")
    parser.add_argument("--policy-file", default="configs/policy.yaml")
    for role in ("decode", "prefill"):
        parser.add_argument(
            f"--{role}-workers", type=int, nargs=2, metavar=("FEWEST", "MOST"), help="without it their number stays"
        )
    given = parser.parse_args()
    stop = process.on_stop()
    scale_down = ScaleDownPlugin(given.policy_file, given.decode_workers, given.prefill_workers)
    server, address = await start(given.listen, Service(MigrationPlugin(given.policy_file), scale_down))
    print(f"listening on {address}", flush=True)
    await stop.wait()
    await server.stop(grace=1.0)


if __name__ == "__main__":
    process.run(main)

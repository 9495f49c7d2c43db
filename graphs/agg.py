# SPDX-License-Identifier: Apache-2.0
"""Workers that prefill and decode, behind a router that can move requests between them."""

from components.serve.config import FrontendConfig, RouterConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
Router = Service("Router", "components.router", RouterConfig)
AggWorker = Service("AggWorker", "components.worker.agg", WorkerConfig)

Frontend.link(Router).link(AggWorker)

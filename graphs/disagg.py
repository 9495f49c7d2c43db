# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on workers of their own, behind a router that can move requests between the latter."""

from components.serve.config import FrontendConfig, RouterConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
Router = Service("Router", "components.router", RouterConfig)
PrefillWorker = Service("PrefillWorker", "components.worker.prefill", WorkerConfig)
DecodeWorker = Service("DecodeWorker", "components.worker.decode", WorkerConfig)

Frontend.link(Router).link(PrefillWorker, DecodeWorker)

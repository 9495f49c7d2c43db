# SPDX-License-Identifier: Apache-2.0
"""The disaggregated graph with Dynamo's planner, whose plugin moves running requests between decode workers."""

from components.serve.config import FrontendConfig, PlannerConfig, RouterConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
Planner = Service("Planner", "components.planner", PlannerConfig)
Router = Service("Router", "components.router", RouterConfig)
PrefillWorker = Service("PrefillWorker", "components.worker.prefill", WorkerConfig)
DecodeWorker = Service("DecodeWorker", "components.worker.decode", WorkerConfig)

Frontend.link(Planner).link(Router).link(PrefillWorker, DecodeWorker)

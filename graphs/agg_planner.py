# SPDX-License-Identifier: Apache-2.0
"""The graph of ``graphs.agg`` with Dynamo's planner. Its plugin moves running requests between workers."""

from components.config import FrontendConfig, PlannerConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
Planner = Service("Planner", "components.planner", PlannerConfig)
AggWorker = Service("AggWorker", "components.worker", WorkerConfig, mode="agg")

Frontend.link(Planner).link(AggWorker)

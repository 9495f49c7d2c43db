# SPDX-License-Identifier: Apache-2.0
"""The disaggregated graph with Dynamo's planner. Its plugin moves running requests between decode workers."""

from components.config import FrontendConfig, PlannerConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
Planner = Service("Planner", "components.planner", PlannerConfig)
PrefillWorker = Service("PrefillWorker", "components.worker", WorkerConfig, mode="prefill")
DecodeWorker = Service("DecodeWorker", "components.worker", WorkerConfig, mode="decode")

Frontend.link(Planner).link(PrefillWorker, DecodeWorker)

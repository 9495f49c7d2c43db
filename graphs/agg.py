# SPDX-License-Identifier: Apache-2.0
"""Workers that prefill and decode, behind Dynamo's frontend. Running requests move between them."""

from components.config import FrontendConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
AggWorker = Service("AggWorker", "components.worker", WorkerConfig, mode="agg")

Frontend.link(AggWorker)

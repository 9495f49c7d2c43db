# SPDX-License-Identifier: Apache-2.0
"""Separate prefill and decode workers, behind Dynamo's frontend. Running requests move between decode workers."""

from components.config import FrontendConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
PrefillWorker = Service("PrefillWorker", "components.worker", WorkerConfig, mode="prefill")
DecodeWorker = Service("DecodeWorker", "components.worker", WorkerConfig, mode="decode")

Frontend.link(PrefillWorker, DecodeWorker)

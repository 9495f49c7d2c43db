# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on workers of their own, behind Dynamo's frontend. Running requests move between the latter."""

from components.config import FrontendConfig, WorkerConfig
from components.serve.graph import Service

Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
PrefillWorker = Service("PrefillWorker", "components.worker", WorkerConfig, mode="prefill")
DecodeWorker = Service("DecodeWorker", "components.worker", WorkerConfig, mode="decode")

Frontend.link(PrefillWorker, DecodeWorker)

# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics and traces, under Dynamo's names and labels.

names.py    all metrics, with labels and help; source of the documentation
export.py   makes them and adds them to a component's ``/metrics`` (``DYN_SYSTEM_PORT``)
worker.py   metrics of a worker
spans.py    OpenTelemetry spans of moves in the traces of their requests, if switched on
"""

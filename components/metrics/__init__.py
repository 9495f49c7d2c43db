# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics and traces, under Dynamo's names and labels.

names.py    every metric of ours, with labels and help; the documentation is written from it
export.py   makes them and adds them to a component's ``/metrics`` (``DYN_SYSTEM_PORT``)
worker.py   what a worker shows
spans.py    a part of a request's OpenTelemetry trace for each of its moves, when that is switched on
"""

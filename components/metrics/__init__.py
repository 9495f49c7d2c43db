# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics and traces, under Dynamo's names and labels.

names.py    every metric of ours, with labels and help; the documentation is written from it
export.py   makes them and adds them to a component's ``/metrics`` (``DYN_SYSTEM_PORT``)
router.py   what the router counts
worker.py   what a worker shows
traces.py   one OpenTelemetry trace for each request, when it is switched on
"""

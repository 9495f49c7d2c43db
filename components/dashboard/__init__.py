# SPDX-License-Identifier: Apache-2.0
"""``dynamo top`` and the web page of ``dynamo serve``, both from the workers' status.

sample.py    asks the workers once a second, keeps the last minutes, computes rates
tables.py    workers, requests and moves as tables, for commands too
top.py       the terminal's view of a sample
access.py    who may see the web page
server.py    the web page, its data, and Prometheus' list of targets
static/      the page: plain modules and one chart library, nothing from other hosts
"""

# SPDX-License-Identifier: Apache-2.0
"""What people watch: ``dynamo top`` and the web page of ``dynamo serve``, both fed by the routers' status.

sample.py    asks the routers once a second, keeps the last minutes, computes rates
top.py       the terminal's view of a sample
access.py    who may see the web page
server.py    the web page, its data, and Prometheus' list of targets
launch.py    starts the web page beside a graph
static/      the page: plain modules and one chart library, nothing from other hosts
"""

# SPDX-License-Identifier: Apache-2.0
"""Decode workers in simulated time, with the live system's policy objects.

model.py      step time, KV capacity, transfer time, SLO: the measured on H200
traces.py     Azure, BurstGPT and Mooncake trace files; load with BurstGPT's statistics
worker.py     one worker: lock-step decoding, chunked prefill, admission, preemption
columns.py    the workers as input of policies
scaling.py    the simulated planner: number of workers
dispatch.py   the worker of a new request
events.py     simulated time
moves.py      migrations
upkeep.py     workers that end
cluster.py    arrivals, planner ticks, workers that come and go
report.py     results
scenario.py   one cluster under a part of a trace
"""

# SPDX-License-Identifier: Apache-2.0
"""Decode workers in simulated time, driven by the same policy objects as the live system.

model.py      step time, KV capacity, transfer time, SLO: the numbers that a calibration gives
traces.py     synthetic load; Azure, BurstGPT and Mooncake trace files
worker.py     one worker: lock-step decoding, chunked prefill, admission, preemption
columns.py    what policies see of the workers
scaling.py    the simulated planner: how many workers
cluster.py    events, dispatch, migrations, planner ticks, workers that come and go
report.py     what came of it
"""

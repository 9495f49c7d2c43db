# SPDX-License-Identifier: Apache-2.0
"""Seeded faults on a served graph: real processes, NIXL, etcd and NATS; Dynamo's frontend, workers, planner.

servers.py  etcd and NATS that can be killed, emptied and stopped
system.py   the graph, its processes, its clients
run.py      a run from a seed, and what must hold at its end

``python -m tests.faults.real --runs N`` does N runs on the paged engine, with ``--engine vllm`` on vLLM.
"""

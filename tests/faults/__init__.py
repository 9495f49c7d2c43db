# SPDX-License-Identifier: Apache-2.0
"""Seeded faults on in-memory doubles: the real router, migration, worker service and paged engine on a virtual network.

clock.py     an asyncio loop whose time jumps from timer to timer
agent.py     the transfer agent's double: bytes travel piece by piece, and may fail
network.py   hosts and what happens to their messages
cluster.py   one router, some workers
scenario.py  a run from a seed, and what must hold at its end

``python -m tests.faults --seed N`` runs one again, ``--runs N`` many.
"""

# SPDX-License-Identifier: Apache-2.0
"""Doubles for runs in virtual time with failing copies, and faults on a served graph.

deaths.py  seeded deaths in every state of a session, on the doubles of ``tests/streams.py``
clock.py   an asyncio loop whose time jumps from timer to timer
agent.py   the transfer agent's double: bytes travel piece by piece, and may fail
model.py   the undisturbed answers of the paged engine
real       seeded faults on real processes

Faults between workers, and of a frontend, are in ``tests/streams.py``.
"""

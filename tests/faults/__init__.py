# SPDX-License-Identifier: Apache-2.0
"""Doubles for runs in virtual time, in which copies of KV blocks fail, and a served graph whose parts are harmed.

deaths.py  seeded deaths in every state of a session, on the doubles of ``tests/streams.py``
clock.py   an asyncio loop whose time jumps from timer to timer
agent.py   the transfer agent's double: bytes travel piece by piece, and may fail
model.py   what the paged engine answers when nobody disturbs it
real       seeded faults on real processes

Faults between workers, and of a frontend, are in ``tests/streams.py``.
"""

# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of every decoder of bytes from the wire and of every parser of a file or argument.

inputs.py    bytes from a corpus: changed bytewise, changed in their structure, or noise
samples.py   valid inputs, made by the code itself
wire.py      decoders of bytes from other processes
services.py  whole endpoints with arbitrary input: a worker and a transfer session
files.py     configurations, policy files, snapshots, traces
corpus/      valid inputs and former failures, by target

A target may raise ``MigrateError`` and nothing else. ``python -m tests.fuzz --minutes N`` gives each target N minutes.
"""

# SPDX-License-Identifier: Apache-2.0
"""Mixed load for half an hour with migrations and restarts all the time: ``python -m benchmarks.soak``."""

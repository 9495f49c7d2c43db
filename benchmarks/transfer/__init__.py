# SPDX-License-Identifier: Apache-2.0
"""Speed of KV transfers between two processes: ``python -m benchmarks.transfer``."""

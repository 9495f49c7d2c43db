# SPDX-License-Identifier: Apache-2.0
"""Dynamo components around engines: ``prefill``, ``decode`` and ``agg``."""

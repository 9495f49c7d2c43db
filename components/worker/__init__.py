# SPDX-License-Identifier: Apache-2.0
"""Workers: engines as Dynamo components (``prefill``, ``decode`` and ``agg``)."""

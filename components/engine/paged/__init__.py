# SPDX-License-Identifier: Apache-2.0
"""An engine in one process without a model: real paged KV blocks, real transfers, tokens that follow from the bytes.

``blocks`` gives blocks out, ``model`` writes and reads KV, ``request`` is one request's state, ``scheduler`` runs
steps and freezes, ``tables`` shows load and blocks, ``landing`` takes requests in, ``engine`` is the protocol over
them.
"""

from components.engine.paged.engine import PagedEngine
from components.engine.paged.options import PagedOptions

__all__ = ["PagedEngine", "PagedOptions"]

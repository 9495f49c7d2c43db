# SPDX-License-Identifier: Apache-2.0
"""One served graph for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.graphs import Graph


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    # One decode worker has room for all requests of a drained one.
    graph = Graph(tmp_path_factory.mktemp("graph"), overrides=("--DecodeWorker.max-num-seqs=32",))
    with graph.served():
        yield graph

"""The vLLM servers that all engine tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "multiproc"))  # harness.py

from tiny_servers import serve


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory):
    """Two servers of an untied model."""
    with serve(tmp_path_factory.mktemp("untied"), tied=False, servers=2) as result:
        yield result


@pytest.fixture(scope="session")
def served_tied(tmp_path_factory: pytest.TempPathFactory):
    """One server of a tied model. Its engine, which is forked, has two threads, as on a machine with more cores."""
    with serve(tmp_path_factory.mktemp("tied"), tied=True, servers=1, threads=2) as result:
        yield result

"""Submissions leave frozen configurations in the repository's runs/; those of the tests go."""

from pathlib import Path

import pytest

from rlad_megatron.launch.frozen import SUBMITTED

FOLDER = Path(__file__).parents[2] / SUBMITTED


@pytest.fixture(scope="session", autouse=True)
def no_configurations_left():
    before = set(FOLDER.glob("*"))
    yield
    for file in set(FOLDER.glob("*")) - before:
        file.unlink()

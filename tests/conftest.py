"""What tests of several folders share."""

from pathlib import Path

import pytest

from pretrain.data import build_tiny_shards
from tests.slurm.cluster import slurm, slurm_session

__all__ = ["slurm", "slurm_session", "tiny_shards"]


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of a few hundred KB of real text, and its tokenizer."""
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    build_tiny_shards(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands first: they take minutes, in which the other worker would have nothing left to do."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")

"""A small store of each kind, to be read; and copies, to be damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .stores import EVERY, build_documents, write


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each kind; nothing may be written into them."""
    return {
        kind: write(tmp_path_factory.mktemp(kind) / "store", config, build_documents(config))
        for kind, config in EVERY.items()
    }


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them, to be damaged."""

    def make(kind: str = "head_and_sample") -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / kind))

    return make

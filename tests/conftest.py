"""Fixtures shared by the tests of several packages: a tiny model, exported once a session."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    """The model that the tiny artifacts are made of."""
    from tests import tiny

    return tiny.tiny_checkpoint()


@pytest.fixture(scope="session")
def tiny_checkpoint_file(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a file."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    tiny_checkpoint.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV file of 500 made-up sentences."""
    from tests import tiny

    return tiny.write_sentences(tmp_path_factory.mktemp("sentences") / "sentences.tsv")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint_file: Path, tiny_sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 artifact with a CUDA variant. Tests must not write to it; copy it to change it."""
    from export.exporter import ExportRequest, export_artifact

    path = tmp_path_factory.mktemp("artifacts") / "tiny-int8"
    export_artifact(ExportRequest(tiny_checkpoint_file, path, "int8", tiny_sentences))
    return path


@pytest.fixture(scope="session")
def tiny_fp32_artifact(
    tiny_checkpoint_file: Path, tiny_sentences: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An fp32 artifact for the CPU alone. Tests must not write to it; copy it to change it."""
    from export.exporter import ExportRequest, export_artifact

    path = tmp_path_factory.mktemp("artifacts") / "tiny-fp32"
    export_artifact(ExportRequest(tiny_checkpoint_file, path, "fp32", tiny_sentences, cuda=False))
    return path

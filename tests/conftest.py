"""Fixtures shared by the tests of several packages: a tiny model and its artifacts.

An export takes seconds that most tests do not ask about, so the artifacts are kept in pytest's cache until the code
that makes them changes (`pytest --cache-clear` removes them).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from export.profile import Precision
    from model.checkpoint import Checkpoint

_ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Commands that are called in a test send the log to the standard error of that test, which is closed after it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


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
def tiny_artifact(request: pytest.FixtureRequest) -> Path:
    """An int8 artifact with a CUDA variant. Tests must not write to it; copy it to change it."""
    return _exported(request, "int8", cuda=True)


@pytest.fixture(scope="session")
def tiny_fp32_artifact(request: pytest.FixtureRequest) -> Path:
    """An fp32 artifact for the CPU alone. Tests must not write to it; copy it to change it."""
    return _exported(request, "fp32", cuda=False)


@pytest.fixture(scope="session")
def tiny_post_norm_checkpoint() -> Checkpoint:
    """Another model, whose layers normalise their sums."""
    from tests import tiny

    return tiny.tiny_checkpoint(seed=2, pre_norm=False)


@pytest.fixture(scope="session")
def tiny_post_norm_artifact(
    request: pytest.FixtureRequest, tiny_post_norm_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its fp32 artifact for the CPU alone. Tests must not write to it."""
    path = tmp_path_factory.mktemp("checkpoint") / "post-norm.pt"
    tiny_post_norm_checkpoint.save(path)
    return _exported(request, "fp32", cuda=False, checkpoint=path)


@pytest.fixture(scope="session")
def tiny_window_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 artifact whose state is rings, of rotated keys that all heads share; one layer stands for two."""
    changes = {
        "encoder_attention": "window", "encoder_window": 8, "global_tokens": 2, "decoder_attention": "window",
        "decoder_window": 8, "positions": "rotary", "num_kv_heads": 1, "share_layers": "all",
    }  # fmt: skip
    return _variation(request, tmp_path_factory, "window", "int8", changes)


@pytest.fixture(scope="session")
def tiny_linear_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 artifact whose state is sums, behind an encoder of random features."""
    changes = {"encoder_attention": "performer", "decoder_attention": "linear"}
    return _variation(request, tmp_path_factory, "linear", "fp32", changes)


@pytest.fixture(scope="session")
def tiny_classifier_checkpoint() -> Checkpoint:
    """An encoder alone, with three labels."""
    from tests import tiny

    return tiny.tiny_checkpoint(decoder_layers=0, labels=("calm", "glad", "sad"))


@pytest.fixture(scope="session")
def tiny_classifier_artifact(
    request: pytest.FixtureRequest, tiny_classifier_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its fp32 artifact for the CPU alone. Tests must not write to it."""
    path = tmp_path_factory.mktemp("checkpoint") / "classifier.pt"
    tiny_classifier_checkpoint.save(path)
    return _exported(request, "fp32", cuda=False, checkpoint=path)


def _variation(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    precision: Precision,
    changes: dict[str, object],
) -> Path:
    from tests import tiny

    path = tmp_path_factory.mktemp("checkpoint") / f"{name}.pt"
    tiny.tiny_checkpoint(**changes).save(path)
    return _exported(request, precision, cuda=False, checkpoint=path)


def _exported(request: pytest.FixtureRequest, precision: Precision, cuda: bool, checkpoint: Path | None = None) -> Path:
    """The artifact of a tiny model, from pytest's cache if nothing that makes it has changed."""
    cache = request.config.cache
    assert cache is not None
    name = precision if checkpoint is None else f"{checkpoint.stem}-{precision}"
    kept = cache.mkdir("tiny-artifacts") / f"{name}-{_fingerprint()}"
    if not (kept / "manifest.json").exists():
        from export.exporter import ExportRequest, export_artifact

        if checkpoint is None:
            checkpoint = request.getfixturevalue("tiny_checkpoint_file")
        sentences: Path = request.getfixturevalue("tiny_sentences")
        fresh = Path(tempfile.mkdtemp(dir=kept.parent)) / "artifact"
        export_artifact(ExportRequest(checkpoint, fresh, precision, sentences, cuda=cuda))
        try:
            os.rename(fresh, kept)
            fresh.parent.rmdir()
        except OSError:  # another test process was quicker
            return fresh
    return kept


def _fingerprint() -> str:
    """Changes with the code that decides what an exported artifact holds."""
    digest = hashlib.sha256()
    for name in ("torch", "onnx", "onnxruntime", "onnxscript", "tokenizers"):
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    sources = [path for path in (_ROOT / "export").glob("*.py") if path.name not in ("cli.py", "benchmark.py")]
    sources += [
        _ROOT / "model" / f"{name}.py" for name in ("attention", "config", "positions", "transformer", "tokenizer")
    ]
    sources.append(_ROOT / "tests" / "tiny.py")
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

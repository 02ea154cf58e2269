"""A broken artifact is refused at start-up, with a message that names what is wrong and what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.artifact import Artifact
from service.errors import ArtifactError
from tests.service.fakes import MANIFEST

FILES = {"tokenizer.json": b"{}", "cpu/encoder.onnx": b"encoder", "cpu/decoder.onnx": b"decoder"}
Change = Callable[[Path, dict[str, Any]], None]


def _manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(MANIFEST.model_dump_json(exclude_none=True))
    manifest["variants"] = {"cpu": {"precision": "fp32", "encoder": "cpu/encoder.onnx", "decoder": "cpu/decoder.onnx"}}
    manifest["self_test"] = [{"source": "a", "source_ids": [5, 2], "target_ids": {"cpu": [6, 2]}}]
    manifest["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    return manifest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole artifact, as far as can be known without running its graphs."""
    path = tmp_path / "artifact"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "manifest.json").write_text(json.dumps(_manifest()))
    return path


def test_a_whole_artifact_is_read(path: Path) -> None:
    """Its name is the manifest's, unless the setting gives another."""
    artifact = Artifact.load(path)
    assert artifact.manifest.variants["cpu"].graphs == ["cpu/encoder.onnx", "cpu/decoder.onnx"]
    assert artifact.name == "fake"
    assert artifact.graph("cpu/encoder.onnx").read_bytes() == b"encoder"
    assert repr(Artifact.load(str(path), name="de")) == f"<Artifact de version 1 at {path}>"


def test_a_path_that_is_not_there(path: Path) -> None:
    """The flag is named."""
    with pytest.raises(ArtifactError, match=r"does not exist. Give the directory of an artifact: --model PATH"):
        Artifact.load(path / "nothing")


def test_a_file_instead_of_a_directory(path: Path) -> None:
    """Pointing at the manifest or a graph is an easy mistake."""
    with pytest.raises(ArtifactError, match=r"not a directory. Give the directory that holds manifest.json"):
        Artifact.load(path / "manifest.json")


def _edit(key: str, value: object) -> Change:
    def change(path: Path, manifest: dict[str, Any]) -> None:
        manifest[key] = value

    return change


def _put(name: str, content: bytes) -> Change:
    def change(path: Path, manifest: dict[str, Any]) -> None:
        (path / name).write_bytes(content)

    return change


def _state(**changes: object) -> Change:
    def change(path: Path, manifest: dict[str, Any]) -> None:
        manifest["state"][1].update(changes)

    return change


def _link_out(path: Path, manifest: dict[str, Any]) -> None:
    outside = path.parent / "outside.onnx"
    outside.write_bytes(FILES["cpu/decoder.onnx"])
    (path / "cpu/decoder.onnx").unlink()
    (path / "cpu/decoder.onnx").symlink_to(outside)


def _directory(path: Path, manifest: dict[str, Any]) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").mkdir()


def _list_outside(path: Path, manifest: dict[str, Any]) -> None:
    manifest["files"]["../outside"] = "0" * 64


def _unlist(path: Path, manifest: dict[str, Any]) -> None:
    del manifest["files"]["cpu/decoder.onnx"]


def _only_cuda(path: Path, manifest: dict[str, Any]) -> None:
    manifest["variants"]["cuda"] = manifest["variants"].pop("cpu")


BROKEN: dict[str, tuple[Change, str, str]] = {
    "missing file": (
        lambda path, _: (path / "cpu/decoder.onnx").unlink(),
        r"cpu/decoder.onnx is missing, manifest.json lists it",
        "Copy the artifact again, whole",
    ),
    "wrong checksum": (
        _put("cpu/encoder.onnx", b"other"),
        r"cpu/encoder.onnx has SHA-256 .* damaged",
        "Copy the artifact",
    ),
    "unknown format version": (_edit("format_version", 2), "has format version 2, this program reads 1", "upgrade"),
    "no format version": (lambda _, manifest: manifest.pop("format_version"), "has format version None", "Export"),
    "unknown field": (_edit("surprise", 1), "surprise: Extra inputs", "Export the model again"),
    "field missing": (lambda _, manifest: manifest.pop("vocab_size"), "vocab_size: Field required", "Export"),
    "wrong type": (_edit("max_source_tokens", "many"), "max_source_tokens: Input should be", "Export"),
    "unknown kind of state": (_state(kind="magic"), "state.1.kind", "Export"),
    "rows not on axis 0": (_state(shape=[3, "rows", "target_capacity"]), "rows on axis 0", "Export"),
    "two capacities": (
        _state(shape=["rows", "target_capacity", "target_capacity"]),
        "kind cache has the symbolic axis",
        "Export",
    ),
    "a foreign capacity": (_state(shape=["rows", "source_capacity"]), "kind cache has the symbolic axis", "Export"),
    "unknown symbol": (_state(shape=["rows", "heads"]), "state.1.shape", "Export"),
    "state named twice": (_state(name="source"), "two state tensors have the same name", "Export"),
    "no variant for the CPU": (_only_cuda, "cpu is missing", "Export"),
    "a graph without a checksum": (_unlist, "no checksum for cpu/decoder.onnx", "Export"),
    "a path that leads out": (_list_outside, "leads out of the artifact", "Export"),
    "a link that leads out": (_link_out, "leads out of the artifact", "Copy the file itself"),
    "ids above the vocabulary": (_edit("vocab_size", 5), "token id 6 is not below vocab_size 5", "Export"),
    "a directory for a file": (
        _directory,
        "tokenizer.json cannot be read",
        "permissions",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_way_to_be_broken_is_named_with_its_remedy(path: Path, case: str) -> None:
    """One message: what is wrong, where, and what to do."""
    change, message, remedy = BROKEN[case]
    manifest = _manifest()
    change(path, manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.load(path)
    assert remedy in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json: it is no artifact. Make one with: transduce export"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "has format version None"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not JSON"),
    ],
)
def test_a_manifest_that_is_none(path: Path, content: bytes | None, message: str) -> None:
    """Whatever stands in its place."""
    (path / "manifest.json").unlink()
    if content is not None:
        (path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)

"""`transduce check`: what it finds in a good artifact and in broken ones."""

import json
import shutil
from pathlib import Path

import pytest

from service import cli


@pytest.fixture
def copied(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def check(path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["check", str(path), "--threads", "1", "--provider", "cpu"])
    return status, capfd.readouterr().out


def test_a_good_artifact_is_status_0(tiny_artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line per check."""
    status, table = check(tiny_artifact, capfd)
    assert status == 0
    assert [line.split()[0] for line in table.splitlines()] == ["manifest", "files", "tokenizer", "graphs", "self-test"]
    assert "FAILED" not in table


@pytest.mark.parametrize("file", ["tokenizer.json", "cpu/decoder.onnx"])
def test_a_changed_file_is_found(copied: Path, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By its checksum, and named."""
    with (copied / file).open("ab") as stream:
        stream.write(b" ")
    status, table = check(copied, capfd)
    assert status == 1
    assert "FAILED" in table
    assert file in table


def test_a_missing_file_is_found(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And named."""
    (copied / "cpu" / "encoder.onnx").unlink()
    status, table = check(copied, capfd)
    assert status == 1
    assert "cpu/encoder.onnx is missing" in table


def test_an_answer_that_differs_is_found(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Graphs that load but say something else than at export fail the self-test."""
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["self_test"][0]["target_ids"]["cpu"][0] += 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    status, table = check(copied, capfd)
    assert status == 1
    assert "FAILED" in table


def test_what_is_no_artifact_is_status_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A directory without a manifest, or none at all."""
    for path in (tmp_path, tmp_path / "nothing"):
        status, table = check(path, capfd)
        assert status == 1
        assert "FAILED" in table

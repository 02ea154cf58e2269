"""What an export writes, and that it writes nothing when the graphs are not the model."""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import export.exporter
from export.artifact_decoder import ArtifactDecoder
from export.cli import register
from export.comparison import Differences
from export.parity import Figures, equal_tokens
from model.checkpoint import Checkpoint
from model.search import beam_search, greedy_search
from model.tokenizer import encode_texts
from service.artifact import Artifact
from tests import tiny


def run(*arguments: object) -> int:
    """`transduce export` with these arguments; its exit status."""
    parser = ArgumentParser()
    register(parser.add_subparsers())
    parsed = parser.parse_args(["export", *map(str, arguments)])
    status = parsed.func(parsed)
    assert isinstance(status, int)
    return status


@pytest.fixture
def ready_graphs(monkeypatch: pytest.MonkeyPatch, tiny_fp32_artifact: Path) -> None:
    """Exports take the finished fp32 graphs instead of tracing the model again, which is not what is tested here."""

    def copy(model: object, profile: object, alignment_layer: int, variant: str, directory: Path) -> dict[str, str]:
        shutil.copytree(tiny_fp32_artifact / variant, directory / variant)
        return {"precision": "fp32"} | {name: f"{variant}/{name}.onnx" for name in ("encoder", "decoder", "scorer")}

    monkeypatch.setattr(export.exporter, "_write_graphs", copy)


@pytest.fixture
def corrupt_graphs(monkeypatch: pytest.MonkeyPatch, ready_graphs: None) -> None:
    """The same, with one weight of the decoder changed."""
    copy = export.exporter._write_graphs

    def corrupt(model: object, profile: object, alignment_layer: int, variant: str, directory: Path) -> dict[str, str]:
        entry = copy(model, profile, alignment_layer, variant, directory)  # type: ignore[arg-type]  # passed on as they came
        graph = onnx.load(directory / entry["decoder"])
        tensor = next(tensor for tensor in graph.graph.initializer if tuple(tensor.dims) == (300, 32))
        values = numpy_helper.to_array(tensor).copy()
        values[7, 7] += 1.0
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(graph, directory / entry["decoder"])
        return entry

    monkeypatch.setattr(export.exporter, "_write_graphs", corrupt)


def test_the_manifest_says_what_the_files_are(tiny_artifact: Path) -> None:
    """Every file is listed with its SHA-256, and nothing else lies in the artifact."""
    manifest = json.loads((tiny_artifact / "manifest.json").read_text(encoding="utf-8"))
    files = {path.relative_to(tiny_artifact).as_posix(): path for path in tiny_artifact.rglob("*") if path.is_file()}
    assert set(files) == {*manifest["files"], "manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    assert manifest["variants"]["cpu"]["precision"] == "int8"
    assert manifest["variants"]["cuda"] == {
        "precision": "fp16",
        "encoder": "cuda/encoder.onnx",
        "decoder": "cuda/decoder.onnx",
        "scorer": "cuda/scorer.onnx",
        "reorder": "cuda/reorder.onnx",
    }


def test_the_service_reads_what_the_export_writes(tiny_artifact: Path, tiny_fp32_artifact: Path) -> None:
    """The two sides of the artifact agree on its manifest."""
    for path in (tiny_artifact, tiny_fp32_artifact):
        artifact = Artifact.load(path)
        assert artifact.name == "tiny"
        assert artifact.manifest.languages == {"source": "en", "target": "de"}
        assert artifact.manifest.max_source_tokens == 64
        assert [tensor.name for tensor in artifact.manifest.state][:4] == [
            "self_key_0",
            "self_value_0",
            "cross_key_0",
            "cross_value_0",
        ]


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_self_test_holds_the_greedy_answers(tiny_artifact: Path, variant: str) -> None:
    """Short and long sentences with the ids that this variant generates, end token included."""
    decoder = ArtifactDecoder(tiny_artifact, variant, threads=1)
    tests = decoder.manifest["self_test"]
    assert len(tests) == 8
    answers = decoder.greedy([test["source_ids"] for test in tests])
    assert [answer.ids for answer in answers] == [test["target_ids"][variant] for test in tests]


def test_the_parity_figures_are_in_the_manifest(tiny_artifact: Path, tiny_fp32_artifact: Path) -> None:
    """Each variant has its own; the int8 graphs are as independent of the batch as the fp32 ones."""
    parity = json.loads((tiny_artifact / "manifest.json").read_text(encoding="utf-8"))["parity"]
    assert set(parity) == {"cpu", "cuda"}
    assert parity["cpu"]["batch_invariant"]
    assert parity["cpu"]["padding_invariant"]
    assert parity["cuda"]["measured_on"] == "CPUExecutionProvider"
    fp32 = json.loads((tiny_fp32_artifact / "manifest.json").read_text(encoding="utf-8"))["parity"]["cpu"]
    assert fp32["sentences"] == 500
    assert 0 < fp32["largest_logit_difference"] < 1e-3
    assert 0 < fp32["largest_score_difference"] < 1e-4
    assert 0 < fp32["largest_score_difference_to_steps"] < 1e-4
    assert 0 < fp32["largest_alignment_difference"] < 1e-4
    assert fp32["equal_tokens"] >= 0.999


def test_the_artifact_decodes_as_the_model_does(tiny_checkpoint: Checkpoint, tiny_fp32_artifact: Path) -> None:
    """Greedy and beam search over the fp32 graphs find what the slow decoders in PyTorch find."""
    model, decoder = tiny_checkpoint.transformer(), ArtifactDecoder(tiny_fp32_artifact, threads=1)
    sources = [[*ids, 2] for ids in encode_texts(tiny_checkpoint.tokenizer, tiny.sentences(10, seed=9))]
    for mine, slow in zip(decoder.greedy(sources), greedy_search(model, sources), strict=True):
        assert mine.ids == slow.ids
        assert mine.log_probability == pytest.approx(slow.log_probability, abs=1e-2)
    found, expected = decoder.beam(sources, 3, 0.6), beam_search(model, sources, 3, 0.6)
    assert [[h.ids for h in hypotheses] for hypotheses in found] == [
        [h.ids for h in hypotheses] for hypotheses in expected
    ]


def test_graphs_that_are_not_the_model_are_refused_and_leave_nothing(
    corrupt_graphs: None,
    tiny_checkpoint_file: Path,
    tiny_sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One weight off by one: exit status 1, the figures on standard error, no file."""
    place = tmp_path / "models"
    arguments = ("--sentences", tiny_sentences, "--precision", "fp32", "--no-cuda")
    assert run(tiny_checkpoint_file, place / "bad", *arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("transduce export: ")
    assert "logits differ by up to" in message
    assert list(place.iterdir()) == []


def test_alignments_of_another_layer_are_refused(
    ready_graphs: None,
    tiny_checkpoint_file: Path,
    tiny_sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The parity check takes the attention of the layer that was asked for; the ready graphs give that of the last."""
    arguments = ("--sentences", tiny_sentences, "--precision", "fp32", "--no-cuda", "--alignment-layer", 0)
    assert run(tiny_checkpoint_file, tmp_path / "bad", *arguments) == 1
    assert "alignments differ by up to" in capsys.readouterr().err


def test_a_failed_export_leaves_the_old_artifact_as_it_was(
    corrupt_graphs: None, tiny_checkpoint_file: Path, tiny_sentences: Path, tmp_path: Path
) -> None:
    """--overwrite replaces only by something that works."""
    old = tmp_path / "artifact"
    old.mkdir()
    (old / "manifest.json").write_text("old")
    arguments = ("--sentences", tiny_sentences, "--precision", "fp32", "--no-cuda", "--overwrite")
    assert run(tiny_checkpoint_file, old, *arguments) == 1
    assert (old / "manifest.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_name_and_version_can_be_given_and_an_artifact_replaced(
    ready_graphs: None,
    tiny_checkpoint_file: Path,
    tiny_sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second export to a place is refused without --overwrite; with it the new one stands there, for all to read."""
    place = tmp_path / "artifact"
    arguments = (tiny_checkpoint_file, place, "--sentences", tiny_sentences, "--precision", "fp32", "--no-cuda")
    assert run(*arguments) == 0
    assert Artifact.load(place).manifest.version == "1"
    assert run(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--name", "other", "--version", "2.1") == 0
    assert (Artifact.load(place).name, Artifact.load(place).manifest.version) == ("other", "2.1")
    assert place.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_what_cannot_be_exported_is_refused_with_the_remedy(
    tiny_checkpoint_file: Path, tiny_sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few sentences, no checkpoint, no sentences, an impossible name: one line, exit status 2, nothing written."""
    few = tiny.write_sentences(tmp_path / "few.tsv", 499)
    place = tmp_path / "made" / "artifact"
    for arguments, words in (
        ((tiny_checkpoint_file, place, "--sentences", few), "499 different sentences"),
        ((tmp_path / "none.pt", place, "--sentences", tiny_sentences), "no such checkpoint"),
        ((few, place, "--sentences", tiny_sentences), "not a checkpoint"),
        ((tiny_checkpoint_file, place, "--sentences", tmp_path / "none.tsv"), "none.tsv"),
        ((tiny_checkpoint_file, place, "--sentences", tiny_sentences, "--name", "a/b"), "--name"),
        (
            (tiny_checkpoint_file, place, "--sentences", tiny_sentences, "--alignment-layer", "2"),
            "this model has 0 to 1",
        ),
    ):
        assert run(*arguments) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
        assert not place.exists()


CLOSE = Differences(logits=0.3, scores=0.3, scores_to_steps=0.03, alignments=0.02)
GOOD = Figures("int8", 500, CLOSE, 0.96, 40.0, 40.1, batch_invariant=True, padding_invariant=True)


def test_the_bounds_are_those_of_the_precision() -> None:
    """fp32: logits within 1e-3, scores and alignments within 1e-4, and 99.9 % equal tokens. fp16 and int8: within 0.2
    BLEU, and the scorer within 0.25 of the steps. All: rows for themselves.
    """
    assert GOOD.failures() == []
    assert replace(GOOD, bleu=40.19).failures() == []
    assert len(replace(GOOD, bleu=39.79).failures()) == 1
    assert len(replace(GOOD, bleu=float("nan")).failures()) == 1
    assert len(replace(GOOD, precision="fp16", bleu=40.21).failures()) == 1
    assert len(replace(GOOD, batch_invariant=False).failures()) == 1
    assert len(replace(GOOD, differences=replace(CLOSE, scores_to_steps=0.3)).failures()) == 1
    assert len(replace(GOOD, precision="fp32").failures()) == 4
    exact = replace(GOOD, precision="fp32", differences=Differences(1e-4, 2e-5, 1.0, 3e-5), equal_tokens=0.9991)
    assert exact.failures() == []
    for name in ("logits", "scores", "alignments"):
        worse = replace(exact.differences, **{name: float("nan")})
        assert len(replace(exact, differences=worse).failures()) == 1


def test_equal_tokens_counts_places() -> None:
    """A missing or an extra token is a difference; nothing at all is no difference."""
    assert equal_tokens([[5, 6, 2]], [[5, 6, 2]]) == 1.0
    assert equal_tokens([[5, 6, 2], [2]], [[5, 7, 2], [2]]) == 0.75
    assert equal_tokens([[5, 2]], [[5, 8, 9, 2]]) == 0.25
    assert np.isfinite(equal_tokens([[]], [[]]))

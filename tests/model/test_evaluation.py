"""Scores against every reference a sentence has, of a checkpoint and of the artifact made from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.checkpoint import Checkpoint
from model.evaluation import score_translations
from service.cli import main
from tests import tiny


def test_a_translation_counts_if_it_is_any_of_the_references() -> None:
    """However many references each sentence has; a wrong one lowers the score."""
    references = [["Das ist gut so.", "So ist es gut."], ["Wo ist der Bahnhof?"]]
    right = score_translations(["So ist es gut.", "Wo ist der Bahnhof?"], references)
    wrong = score_translations(["So ist es gut.", "Wer ist der Hund dort?"], references)
    assert right[:2] == (pytest.approx(100), pytest.approx(100))
    assert wrong[0] < 70
    assert "tok:13a" in right[2]
    assert "case:mixed" in right[2]


def test_a_checkpoint_and_its_artifact_score_the_same(
    tiny_checkpoint_file: Path, tiny_fp32_artifact: Path, tiny_sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy and with beams, `transduce evaluate` prints equal BLEU and chrF for both, and samples with references."""
    for beams in ("1", "3"):
        found = []
        for model in (tiny_checkpoint_file, tiny_fp32_artifact):
            options = ["--data", str(tiny_sentences), "--limit", "40", "--samples", "2", "--num-beams", beams]
            assert main(["evaluate", str(model), *options]) == 0
            printed = capsys.readouterr().out
            assert printed.count("  reference ") == 2
            found.append(re.search(r"BLEU [\d.]+  chrF [\d.]+  40 sentences  \d+ tokens", printed))
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][0] == found[1][0]


def test_translations_are_written_a_line_for_each_pair(tiny_checkpoint_file: Path, tmp_path: Path) -> None:
    """They stand beside the lines of the source file, also where a sentence comes again with another reference."""
    (tmp_path / "en").write_text("the dog sees a house\nwhere is my train\nthe dog sees a house\n")
    (tmp_path / "de").write_text("eins\nzwei\ndrei\n")
    files = ["--data", str(tmp_path / "en"), str(tmp_path / "de"), "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(tiny_checkpoint_file), *files]) == 0
    first, second, third = (tmp_path / "out").read_text().splitlines()
    assert first == third != second


def test_checkpoints_translate_together(tiny_checkpoint_file: Path, tiny_sentences: Path, tmp_path: Path) -> None:
    """One given twice gives what it gives by itself; two that differ give something else than either."""
    tiny.tiny_checkpoint(seed=2, d_model=48).save(tmp_path / "other.pt")
    found = []
    one, other = str(tiny_checkpoint_file), str(tmp_path / "other.pt")
    for models in ([one], [one, one], [other], [one, other]):
        options = ["--data", str(tiny_sentences), "--limit", "20", "--output", str(tmp_path / "out")]
        assert main(["evaluate", *models, *options]) == 0
        found.append((tmp_path / "out").read_text())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_what_cannot_translate_together_is_refused(
    tiny_checkpoint_file: Path,
    tiny_classifier_checkpoint: Checkpoint,
    tiny_fp32_artifact: Path,
    tiny_sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other, encoder = str(tiny_checkpoint_file), tmp_path / "other.pt", tmp_path / "encoder.pt"
    tiny.tiny_checkpoint(vocab_size=280).save(other)
    tiny_classifier_checkpoint.save(encoder)
    for arguments, message in (
        ([one, str(tiny_fp32_artifact)], f"{tiny_fp32_artifact} is a directory"),
        ([one, str(other)], f"{other} has another tokenizer"),
        ([one, one, "--measure", "retrieval"], "--measure retrieval"),
        ([one, str(encoder)], f"{encoder} has no decoder"),
    ):
        assert main(["evaluate", *arguments, "--data", str(tiny_sentences)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt", "--data", "missing.tsv"], "missing.tsv"),
        (["missing.pt", "--data", __file__], "no usable pair"),
        (["missing.pt", "--data", __file__, "--num-beams", "0"], "--num-beams"),
        (["missing.pt", "--data", __file__, "--threads", "-1"], "--threads"),
        (["missing.pt", "--data", __file__, "--limit", "-1"], "--limit"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_translated(
    tiny_checkpoint_file: Path, tiny_sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into no directory, and a directory itself. What is refused for another reason leaves the file as it is."""
    for output in (tmp_path / "missing" / "out", tmp_path):
        options = ["--data", str(tiny_sentences), "--output", str(output)]
        assert main(["evaluate", str(tiny_checkpoint_file), *options]) == 2
        printed = capsys.readouterr()
        assert f"--output {output}: " in printed.err
        assert "Traceback" not in printed.err
        assert printed.out == ""
    kept = tmp_path / "kept"
    kept.write_text("translations of yesterday\n")
    assert main(["evaluate", "missing.pt", "--data", str(tiny_sentences), "--output", str(kept)]) == 2
    assert kept.read_text() == "translations of yesterday\n"


def test_an_encoder_alone_is_refused_as_a_translator(
    tiny_classifier_artifact: Path, tiny_sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_classifier_artifact), "--data", str(tiny_sentences)]) == 2
    assert "no decoder" in capsys.readouterr().err


def test_a_translator_is_refused_as_a_classifier_and_measured_by_retrieval(
    tiny_checkpoint_file: Path, tiny_sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sentences that are their own translations all find themselves."""
    options = [str(tiny_checkpoint_file), "--data", str(tiny_sentences), "--measure"]
    assert main(["evaluate", *options, "accuracy"]) == 2
    assert "no classifier" in capsys.readouterr().err
    assert main(["evaluate", *options, "retrieval"]) == 0
    assert capsys.readouterr().out == "retrieval 100.00 % among 500 translations\n"


def test_a_directory_that_is_no_artifact_is_refused(
    tmp_path: Path, tiny_sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path), "--data", str(tiny_sentences)]) == 2
    assert "manifest.json" in capsys.readouterr().err

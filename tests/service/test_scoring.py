"""Scoring: targets read in one pass, on real artifacts. What is said of rows here is said of bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import service.runner
import service.scoring
from service.artifact import Artifact
from service.batch import Batch, pad
from service.errors import ArtifactError, ValidationFailed
from service.ladder import Ladder
from service.runner import Runner
from service.settings import Settings
from tests.service.fakes import Client

CPU = Settings(threads=1, provider="cpu")


@pytest.fixture(scope="module", params=["int8", "fp32"])
def runner(request: pytest.FixtureRequest) -> Runner:
    path: Path = request.getfixturevalue("tiny_artifact" if request.param == "int8" else "tiny_fp32_artifact")
    return Runner(Artifact.load(path), CPU)


@pytest.fixture(scope="module")
def fp32(tiny_fp32_artifact: Path) -> Runner:
    return Runner(Artifact.load(tiny_fp32_artifact), CPU)


def pairs(count: int, seed: int = 1) -> tuple[list[list[int]], list[list[int]]]:
    """Sources and targets of different lengths, with their end tokens."""
    rng = np.random.default_rng(seed)

    def text(most: int) -> list[int]:
        return [*rng.integers(3, 300, rng.integers(0, most)).tolist(), 2]

    return [text(16) for _ in range(count)], [text(12) for _ in range(count)]


def score(
    runner: Runner, sources: list[list[int]], targets: list[list[int]], source: int = 16, target: int = 16
) -> list[tuple[bytes, bytes]]:
    """For each row the bytes of the log-probabilities of its target and of its alignment, without padding."""
    ids, lengths = pad(sources, source, 0)
    log_probabilities, alignment = runner.score(ids, lengths, pad(targets, target, 0)[0], alignment=True)
    assert alignment is not None
    return [
        (own[: len(text)].tobytes(), weights[: len(text), : len(origin)].tobytes())
        for own, weights, text, origin in zip(log_probabilities, alignment, targets, sources, strict=True)
    ]


def step(runner: Runner, source: list[int], target: list[int]) -> list[float]:
    """The log-probabilities of a target, found by stepping through it and looking among all candidates."""
    manifest = runner.manifest
    state = runner.new_state(
        max_rows=1,
        source=Ladder.of_capacities(manifest.max_source_tokens),
        target=Ladder.of_capacities(manifest.max_target_tokens),
    )
    batch = Batch(max_rows=1, max_target_tokens=manifest.max_target_tokens, bos_id=1)
    runner.encode_into(state, *pad([source], 16, 0))
    state.append(1)
    batch.append([Client().generate(source)])
    found = []
    for id in target:
        output = runner.step(batch, state, manifest.vocab_size - 2, logits=False)
        ids, log_probabilities = output.ids, output.log_probabilities
        (place,) = np.flatnonzero(ids[0] == id)
        found.append(float(log_probabilities[0, place]))
        batch.take(np.array([id]), np.array([0], np.float32))
    return found


def test_a_score_is_what_the_steps_give(fp32: Runner) -> None:
    """The log-probability of each token of a target is that of the step that reads what stands before it."""
    sources, targets = pairs(8)
    ids, lengths = pad(sources, 16, 0)
    log_probabilities, alignment = fp32.score(ids, lengths, pad(targets, 16, 0)[0])
    assert alignment is None
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        np.testing.assert_allclose(log_probabilities[row, : len(target)], step(fp32, source, target), atol=1e-4)


def test_each_target_token_shares_its_attention_among_the_source_tokens(runner: Runner) -> None:
    """An alignment is not negative, sums to 1, and gives nothing to padding."""
    sources, targets = pairs(8)
    ids, lengths = pad(sources, 24, 0)
    _, alignment = runner.score(ids, lengths, pad(targets, 16, 0)[0], alignment=True)
    assert alignment is not None
    assert alignment.shape == (8, 16, 24)
    assert (alignment >= 0).all()
    np.testing.assert_allclose(alignment.sum(axis=2), 1, atol=1e-6)
    for weights, length in zip(alignment, lengths, strict=True):
        assert not weights[:, length:].any()


def test_the_number_of_rows_changes_no_bit(runner: Runner) -> None:
    """Scores and alignments are the same alone and among 2 to 64 rows, in any order."""
    sources, targets = pairs(64)
    together = score(runner, sources, targets)
    for row in range(0, 64, 7):
        assert score(runner, [sources[row]], [targets[row]]) == [together[row]]
    for rows in (2, 3, 5, 17, 33):
        assert score(runner, sources[:rows], targets[:rows]) == together[:rows]
    assert score(runner, sources[::-1], targets[::-1]) == together[::-1]


def test_padding_changes_no_bit(runner: Runner) -> None:
    """However far sources and targets are padded."""
    sources, targets = pairs(9)
    plain = score(runner, sources, targets)
    for source, target in ((17, 16), (16, 17), (64, 16), (16, 48), (40, 31)):
        assert score(runner, sources, targets, source, target) == plain


def test_a_large_call_is_several_small_ones(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the whole vocabulary are held for a bounded number of tokens at once; the answer is the same."""
    sources, targets = pairs(11)
    whole = score(runner, sources, targets)
    calls = []
    session = runner._scorer._scorer
    monkeypatch.setattr(runner._scorer, "_scorer", Watched(session, calls))
    monkeypatch.setattr(service.scoring, "MOST_LOGITS", 16 * 300 * 4)
    assert score(runner, sources, targets) == whole
    assert len(calls) == 3
    monkeypatch.setattr(service.scoring, "MOST_LOGITS", 1)
    assert score(runner, sources, targets) == whole
    assert len(calls) == 3 + 11


class Watched:
    """A session that counts its runs."""

    def __init__(self, session: Any, calls: list[int]) -> None:
        self.session, self.calls = session, calls

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self.calls.append(1)
        self.session.run_with_iobinding(binding)


def test_ids_may_lie_in_any_order_in_memory(fp32: Runner) -> None:
    """Arrays that are not contiguous, as slices and transposes are not, are read rightly."""
    sources, targets = pairs(6)
    ids, lengths = pad(sources, 16, 0)
    target_ids, _ = pad(targets, 16, 0)
    plain, _ = fp32.score(ids, lengths, target_ids)
    twice = np.repeat(lengths, 2)[::2]
    crossed, _ = fp32.score(np.asfortranarray(ids), twice, np.asfortranarray(target_ids))
    assert crossed.tobytes() == plain.tobytes()


def test_the_device_path_gives_the_same(tiny_artifact: Path, fp32: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA variant's graphs, run on the CPU: halves between encoder and scorer, in pieces too. Its weights were
    rounded to integers, so floats are only near."""
    monkeypatch.setattr(service.runner, "_PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    monkeypatch.setattr(service.runner, "_CUDA_OPTIONS", {})
    monkeypatch.setattr(service.runner, "products_on", lambda provider, session: [])
    monkeypatch.setattr(Runner, "device", "cpu")
    runner = Runner(Artifact.load(tiny_artifact), Settings(provider="cuda", threads=1))
    sources, targets = pairs(5)
    whole = score(runner, sources, targets)
    monkeypatch.setattr(service.scoring, "MOST_LOGITS", 16 * 300 * 2)
    assert score(runner, sources, targets) == whole
    for (half, _), (single, _) in zip(whole, score(fp32, sources, targets), strict=True):
        np.testing.assert_allclose(np.frombuffer(half, np.float32), np.frombuffer(single, np.float32), atol=0.5)


# ---- what an artifact can and cannot ----


def changed(artifact: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Artifact:
    """A copy of an artifact with another manifest."""
    path = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.load(path)


def without_scorer(manifest: dict[str, Any]) -> None:
    """The manifest of an export that knew of no scorer."""
    del manifest["alignment_layer"]
    for variant in manifest["variants"].values():
        del manifest["files"][variant.pop("scorer")]


def test_an_artifact_of_an_older_export_is_served_and_refuses_to_score(tiny_artifact: Path, tmp_path: Path) -> None:
    """All else works; the refusal says what to do."""
    runner = Runner(changed(tiny_artifact, tmp_path, without_scorer), CPU)
    assert (runner.scores, runner.aligns) == (False, False)
    ids, lengths = pad([[5, 2]], 8, 0)
    assert runner.encode(ids, lengths).shape == (1, 8, 32)
    with pytest.raises(ValidationFailed, match=r"cannot give scores: .* Export it again with: transduce export\.$"):
        runner.score(ids, lengths, ids)
    with pytest.raises(ValidationFailed, match="cannot give alignments"):
        runner.score(ids, lengths, ids, alignment=True)


def test_an_artifact_of_this_export_scores_and_aligns(tiny_artifact: Path) -> None:
    """By the last decoder layer, unless the export was told otherwise."""
    runner = Runner(Artifact.load(tiny_artifact), CPU)
    assert (runner.scores, runner.aligns) == (True, True)
    assert runner.manifest.alignment_layer == 1


DISAGREEMENTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another graph in its place": (
        lambda manifest: manifest["variants"]["cpu"].update(scorer="cpu/encoder.onnx"),
        "inputs that the manifest wants are not there",
    ),
    "an alignment that the manifest does not know": (
        lambda manifest: manifest.pop("alignment_layer"),
        "outputs that the manifest does not know: alignment",
    ),
    "another variant's, of other element types": (
        lambda manifest: manifest["variants"]["cpu"].update(scorer="cuda/scorer.onnx"),
        r"cross_key_0 is tensor\(float16\), not int8",
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_scorer_that_is_not_what_the_manifest_says_is_refused(tiny_artifact: Path, tmp_path: Path, case: str) -> None:
    """Before a single number is computed."""
    change, message = DISAGREEMENTS[case]
    artifact = changed(tiny_artifact, tmp_path, change)
    with pytest.raises(ArtifactError, match=f"the manifest disagree: {message}.*Export the model again"):
        Runner(artifact, CPU)


def test_a_scorer_without_a_checksum_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    """As every graph is."""
    with pytest.raises(ArtifactError, match=r"no checksum for cpu/scorer\.onnx"):
        changed(tiny_artifact, tmp_path, lambda manifest: manifest["files"].pop("cpu/scorer.onnx"))

"""The timing of graphs, on graphs that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import benchmark
from tests.tiny import CONFIG


def test_a_row_is_multiplied_with_every_matrix_once(tiny_artifact: Path, tiny_fp32_artifact: Path) -> None:
    """Of the int8 graphs; those in float have no products of integers."""
    width = CONFIG.d_model
    layer = 3 * width**2 + width**2 + 2 * width**2 + 2 * width * CONFIG.feed_forward_width
    whole = CONFIG.decoder_layers * layer + width * CONFIG.vocab_size
    assert benchmark.multiplications(tiny_artifact / "cpu/decoder.onnx") == whole
    assert benchmark.multiplications(tiny_fp32_artifact / "cpu/decoder.onnx") == 0


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_everything_is_timed(
    tiny_artifact: Path,
    tiny_fp32_artifact: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With any kind of state."""
    artifact = tiny_artifact if precision == "int8" else tiny_fp32_artifact
    monkeypatch.setattr("sys.argv", ["benchmark", str(artifact)])
    monkeypatch.setattr(benchmark, "SHAPES", ((1, 8), (2, 16)))
    benchmark.main()
    printed = capsys.readouterr().out
    assert all(
        what in printed for what in ("decoder step,  64 rows, k 8", "encoder,   2 rows of  16", "and alignments")
    )
    assert ("of the best rate of" in printed) == (precision == "int8")

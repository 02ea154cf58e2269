"""The scorer: what PyTorch's teacher forcing gives, in one pass, with weights that are stored once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.artifact_decoder import ArtifactDecoder, open_session
from export.comparison import differences, invariance
from export.errors import ExportError
from export.graph_file import save
from model.checkpoint import Checkpoint
from model.tokenizer import encode_texts
from tests import tiny

GRAPHS = {"int8 on the CPU": ("tiny_artifact", "cpu"), "fp32": ("tiny_fp32_artifact", "cpu"),
          "fp16 for CUDA": ("tiny_artifact", "cuda")}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tiny_checkpoint: Checkpoint) -> tuple[list[list[int]], list[list[int]]]:
    """Sources, and targets that no model would generate for them."""
    tokenizer = tiny_checkpoint.tokenizer
    sources = [[*ids, 2] for ids in encode_texts(tokenizer, tiny.sentences(40, seed=3))]
    targets = [[*ids, 2] for ids in encode_texts(tokenizer, tiny.sentences(39, seed=4))]
    return sources, [*targets, [2]]


def test_scores_and_alignments_are_those_of_the_model_reading_the_whole_target(
    tiny_checkpoint: Checkpoint, tiny_fp32_artifact: Path, texts: tuple[list[list[int]], list[list[int]]]
) -> None:
    """In fp32 within 1e-4 of PyTorch and of the steps, in batches of 1 to 33 rows, padded and not."""
    decoder = ArtifactDecoder(tiny_fp32_artifact, threads=1)
    found = differences(tiny_checkpoint.transformer(), decoder, *texts)
    assert 0 < max(found.scores, found.scores_to_steps, found.alignments) < 1e-4


@pytest.mark.parametrize("which", GRAPHS)
def test_a_row_keeps_its_bits_in_every_company_and_at_any_padding(
    request: pytest.FixtureRequest, which: str, texts: tuple[list[list[int]], list[list[int]]]
) -> None:
    """Scores and alignments as much as memory and logits; the CUDA variant's graphs are run on the CPU."""
    fixture, variant = GRAPHS[which]
    decoder = ArtifactDecoder(request.getfixturevalue(fixture), variant, threads=1)
    batch, padding = invariance(decoder, *texts)
    assert batch
    assert padding or variant == "cuda"


def test_a_score_is_over_the_whole_distribution(
    tiny_fp32_artifact: Path, texts: tuple[list[list[int]], list[list[int]]]
) -> None:
    """The probabilities of everything that can stand in a place sum to 1, padding and start token among it."""
    decoder = ArtifactDecoder(tiny_fp32_artifact, threads=1)
    rows = decoder.encode([texts[0][0]])
    every = [[7, token, 2] for token in range(300)]
    scores = decoder.score(rows.take([0] * 300), every).log_probabilities.astype(np.float64)
    assert np.exp(scores[:, 1]).sum() == pytest.approx(1, abs=1e-5)
    assert len(set(scores[:, 0].tolist())) == 1, "what stands before a token decides, not what follows"


def test_an_artifact_without_a_scorer_says_so(tiny_fp32_artifact: Path, tmp_path: Path) -> None:
    """It still translates."""
    path = Path(shutil.copytree(tiny_fp32_artifact, tmp_path / "artifact"))
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["variants"]["cpu"]["scorer"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    decoder = ArtifactDecoder(path, threads=1)
    assert decoder.greedy([[5, 2]], max_new_tokens=1)
    with pytest.raises(ExportError, match=r"variant cpu has no scorer\. Export the model again"):
        decoder.score(decoder.encode([[5, 2]]), [[2]])


# ---- the file ----


@pytest.mark.parametrize("which", GRAPHS)
def test_weights_are_stored_once(request: pytest.FixtureRequest, which: str) -> None:
    """The scorer's matrices lie in the decoder's file, at places that fit their elements.

    In int8 files for the CPU only the integers do: the positions, in float16, are stored again.
    """
    fixture, variant = GRAPHS[which]
    directory = request.getfixturevalue(fixture) / variant
    lender = (directory / "decoder.onnx").read_bytes()
    graph = onnx.load(directory / "scorer.onnx", load_external_data=False).graph
    borrowed = 0
    for tensor in graph.initializer:
        elements = int(np.prod(tensor.dims))
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if tensor.data_location != TensorProto.EXTERNAL:
            assert elements < 1024 or "positions" in tensor.name
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "decoder.onnx"
        assert int(place["length"]) == elements * size
        assert int(place["offset"]) % size == 0
        assert int(place["offset"]) + elements * size <= len(lender)
        borrowed += 1
    assert borrowed >= 12


def test_onnx_reads_the_scorer_with_its_weights(tiny_fp32_artifact: Path) -> None:
    """The file is what the standard calls a model with external data."""
    onnx.checker.check_model(tiny_fp32_artifact / "cpu/scorer.onnx")
    whole = onnx.load(tiny_fp32_artifact / "cpu/scorer.onnx")
    decoder = onnx.load(tiny_fp32_artifact / "cpu/decoder.onnx")
    theirs = {numpy_helper.to_array(tensor).tobytes() for tensor in decoder.graph.initializer}
    large = [tensor for tensor in whole.graph.initializer if np.prod(tensor.dims) >= 1024]
    assert large
    assert all(numpy_helper.to_array(tensor).tobytes() in theirs for tensor in large)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
def test_any_matrix_can_be_lent(tmp_path: Path, kind: type) -> None:
    """Names of any length before it, the first tensor of the file or the last: the borrower computes the same."""
    rng = np.random.default_rng(1)
    arrays = {
        "a" * length: (rng.normal(size=(40, 16 * length)) * 50).astype(kind) for length in (1, 2, 3, 5, 7, 26, 126, 127)
    }
    lender = a_graph({**arrays, "small": np.ones((40, 1), np.float32)})
    save(lender, tmp_path / "lender.onnx", lends=True)
    save(a_graph(arrays), tmp_path / "borrower.onnx", weights_in=tmp_path / "lender.onnx")
    assert (tmp_path / "borrower.onnx").stat().st_size < 8000
    for name in ("lender", "borrower"):
        outputs = open_session(tmp_path / f"{name}.onnx", threads=1).run(list(arrays), {"at": np.array([3, 39])})
        for output, array in zip(outputs, arrays.values(), strict=True):
            assert output.tobytes() == array[[3, 39]].tobytes()


def a_graph(arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Picks rows of each array."""
    nodes, outputs = [], []
    for name, array in arrays.items():
        nodes.append(helper.make_node("Gather", [f"{name}.weights", "at"], [name], axis=0))
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        outputs.append(helper.make_tensor_value_info(name, element, ["n", *array.shape[1:]]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("at", TensorProto.INT64, ["n"])],
        outputs,
        [numpy_helper.from_array(array, f"{name}.weights") for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)

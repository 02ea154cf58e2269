"""The exported graphs: what PyTorch computes, the same bits in any company, and nothing of what is undefined."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from export.artifact_decoder import ArtifactDecoder, Rows, open_session
from export.decoder_graph import best_tokens
from export.graph_file import Port, save, trace
from model.checkpoint import Checkpoint
from model.data import pad_rows
from model.tokenizer import encode_texts
from model.transformer import Transformer
from tests import tiny

Array = NDArray[Any]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> Transformer:
    return tiny_checkpoint.transformer()


@pytest.fixture(scope="module")
def sources(tiny_checkpoint: Checkpoint) -> list[list[int]]:
    return [[*ids, 2] for ids in encode_texts(tiny_checkpoint.tokenizer, tiny.sentences(12, seed=3))]


@pytest.fixture(scope="module", params=["int8", "fp32"])
def decoder(request: pytest.FixtureRequest) -> ArtifactDecoder:
    path: Path = request.getfixturevalue("tiny_artifact" if request.param == "int8" else "tiny_fp32_artifact")
    return ArtifactDecoder(path, threads=1)


def targets_for(sources: list[list[int]]) -> list[list[int]]:
    """Some target for each source, of other lengths than the sources."""
    return [[*source[1::2], 2] for source in sources]


def steps(decoder: ArtifactDecoder, rows: Rows, targets: list[list[int]]) -> list[bytes]:
    """For each row the bytes of its logits at every position of its target."""
    logits = list(decoder.teacher_forced(rows, targets))
    return [b"".join(step[row].tobytes() for step in logits[: len(target)]) for row, target in enumerate(targets)]


@pytest.fixture(scope="module")
def alone(decoder: ArtifactDecoder, sources: list[list[int]]) -> list[bytes]:
    """Every source decoded alone, without padding, with the capacity it needs."""
    pairs = zip(sources, targets_for(sources), strict=True)
    return [steps(decoder, decoder.encode([source]), [target])[0] for source, target in pairs]


def test_stepwise_logits_are_those_of_the_model_reading_the_whole_target(
    model: Transformer, tiny_fp32_artifact: Path, sources: list[list[int]]
) -> None:
    """The fp32 graphs, a step at a time over cached state, give the logits of PyTorch's teacher forcing within 1e-3."""
    targets = targets_for(sources)
    inputs = pad_rows([[1, *target[:-1]] for target in targets], 0)
    with torch.no_grad():
        expected = model(pad_rows(sources, 0), torch.tensor([len(s) for s in sources]), inputs).numpy()
    decoder = ArtifactDecoder(tiny_fp32_artifact, threads=1)
    for position, logits in enumerate(decoder.teacher_forced(decoder.encode(sources), targets)):
        real = [row for row, target in enumerate(targets) if len(target) > position]
        np.testing.assert_allclose(logits[real], expected[real, position], atol=1e-3)


def test_memory_is_that_of_the_model(model: Transformer, tiny_fp32_artifact: Path, sources: list[list[int]]) -> None:
    """The encoder's first output is the memory, at every valid token."""
    with torch.no_grad():
        expected = model.encode(pad_rows(sources, 0), torch.tensor([len(s) for s in sources])).numpy()
    memory = ArtifactDecoder(tiny_fp32_artifact, threads=1).encode(sources).memory
    assert memory.dtype == np.float32
    for row, source in enumerate(sources):
        np.testing.assert_allclose(memory[row, : len(source)], expected[row, : len(source)], atol=1e-4)


def test_a_row_has_the_same_bits_in_every_company(
    decoder: ArtifactDecoder, sources: list[list[int]], alone: list[bytes]
) -> None:
    """Logits are identical bit for bit alone and in batches of any size and order, at one padding."""
    targets = targets_for(sources)
    for order in (range(12), range(11, -1, -1), [3, 1, 7], [5, 5, 5, 0], [11]):
        rows = decoder.encode([sources[i] for i in order])
        assert steps(decoder, rows, [targets[i] for i in order]) == [alone[i] for i in order]


def test_what_stands_behind_a_source_means_nothing(
    decoder: ArtifactDecoder, sources: list[list[int]], alone: list[bytes]
) -> None:
    """Any padding, of any ids, gives the same memory and the same logits, bit for bit."""
    width = max(map(len, sources))
    lengths = np.array([len(source) for source in sources])
    plain = decoder.encode(sources).memory
    for more in (1, 3, 64 - width):
        noise = np.random.default_rng(more).integers(0, 300, (len(sources), width + more))
        for place, source in zip(noise, sources, strict=True):
            place[: len(source)] = source
        rows = decoder.encode_padded(noise, lengths, width + more)
        for row, length in enumerate(lengths):
            assert rows.memory[row, :length].tobytes() == plain[row, :length].tobytes()
        assert steps(decoder, rows, targets_for(sources)) == alone


@pytest.mark.parametrize("width", [*range(1, 34), 47, 48, 63, 64])
def test_sources_of_any_lengths_share_a_call(decoder: ArtifactDecoder, width: int) -> None:
    """The encoder's outputs of a source are the bits it gets alone, whichever longer source stands beside it."""
    rng = np.random.default_rng(width)
    lengths = sorted({1, 2, 5, 8, 15, 16, 17, 31, 33, 64, width} & set(range(width + 1)))
    sources = [rng.integers(3, 300, length).tolist() for length in rng.permutation(lengths)]
    together = decoder.encode(sources, capacity=width + 3)
    for row, source in enumerate(sources):
        alone = decoder.encode([source])
        assert together.memory[row, : len(source)].tobytes() == alone.memory[0].tobytes()
        for name in (name for name in alone.state if name.startswith("cross")):
            assert together.state[name][row, :, : len(source)].tobytes() == alone.state[name][0].tobytes()


def test_a_source_that_went_wrong_spoils_no_other(decoder: ArtifactDecoder, sources: list[list[int]]) -> None:
    """Padding is filled up with a source's own values: no number of one row gets into another, however it is masked."""
    rows = decoder.encode(sources, capacity=70)
    for name in (name for name in rows.state if name.startswith("cross")):
        for row, length in enumerate(rows.lengths):
            last = rows.state[name][row, :, length - 1 : length]
            assert (rows.state[name][row, :, length:] == last).all()


def test_capacities_change_no_bit_and_the_encoder_pads_to_the_one_it_is_told(
    decoder: ArtifactDecoder, sources: list[list[int]], alone: list[bytes]
) -> None:
    """A source capacity above the need gives tensors of exactly that capacity, and the same logits."""
    rows = decoder.encode(sources, capacity=100)
    assert {array.shape[2] for name, array in rows.state.items() if name.startswith("cross")} == {100}
    rows.state = {name: np.pad(a, [(0, 0), (0, 0), (0, 33), (0, 0)]) for name, a in rows.state.items()}
    assert steps(decoder, rows, targets_for(sources)) == alone


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_the_unused_part_of_a_cache_is_never_read(
    decoder: ArtifactDecoder, sources: list[list[int]], alone: list[bytes], garbage: float
) -> None:
    """The caches may hold anything beyond the positions in use, NaN too: a retired row leaves its state behind. Of
    integers, the largest and the smallest are as bad as it gets."""
    rows = decoder.encode(sources, capacity=100)
    for name, array in rows.state.items():
        if array.dtype == np.int8:
            garbage = 127 if garbage == np.inf else -128
        if name.startswith("self"):
            array[:] = garbage
        else:
            for row, length in enumerate(rows.lengths):
                array[row, :, length:] = garbage
    assert steps(decoder, rows, [target[:8] for target in targets_for(sources)]) == [
        bits[: 8 * 300 * 4] for bits in alone
    ]


def test_rows_at_different_positions_share_a_step(
    decoder: ArtifactDecoder, sources: list[list[int]], alone: list[bytes]
) -> None:
    """A row that is at its fifth token and one that just began get, in one batch, the bits they get alone."""
    targets = targets_for(sources)
    old = decoder.encode([sources[0]], capacity=64)
    first = list(decoder.teacher_forced(old, [targets[0][:4]]))
    young = decoder.encode([sources[1]], capacity=64)
    both = Rows(
        np.zeros((2, 1, 32)),
        np.concatenate([old.lengths, young.lengths]),
        {name: np.concatenate([old.state[name], young.state[name]]) for name in old.state},
    )
    step = decoder.step(both, np.array([targets[0][3], 1]), np.array([4, 0]), 1)
    assert b"".join([*(logits[0].tobytes() for logits in first), step.logits[0].tobytes()]) == alone[0][: 5 * 300 * 4]
    assert step.logits[1].tobytes() == alone[1][: 300 * 4]


@pytest.mark.parametrize("k", [1, 2, 8, 298])
def test_candidates_are_the_likeliest_tokens_best_first(
    decoder: ArtifactDecoder, sources: list[list[int]], k: int
) -> None:
    """Ids are sorted by log-probability over the whole distribution; padding and start are in it, but never offered."""
    step = decoder.step(decoder.encode(sources), np.full(12, 1), np.zeros(12, dtype=np.int64), k)
    wide = step.logits.astype(np.float64)
    expected = (
        wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
    )
    assert step.candidates.shape == step.scores.shape == (12, k)
    assert not np.isin(step.candidates, [0, 1]).any()
    assert (np.diff(step.scores, axis=1) <= 0).all()
    np.testing.assert_allclose(step.scores, np.take_along_axis(expected, step.candidates, 1), atol=1e-4)
    expected[:, :2] = -np.inf
    np.testing.assert_allclose(step.scores, -np.sort(-expected, axis=1)[:, :k], atol=1e-4)


def test_the_best_tokens_are_found_in_any_vocabulary(tmp_path: Path) -> None:
    """Also where equals stand in many places, k is everything, or the size is prime; fewer are the first of more."""
    for size in (1, 2, 13, 97, 100, 360):
        save(
            trace(
                BestTokens(),
                [(Port("scores", ("rows", size)), torch.zeros(3, size)), (Port("k", ()), torch.tensor(1))],
                [Port("values", ("rows", "k")), Port("ids", ("rows", "k"))],
            ),
            tmp_path / "best.onnx",
        )
        session = open_session(tmp_path / "best.onnx", threads=1)
        scores = np.random.default_rng(size).integers(0, max(1, size // 3), (20, size)).astype(np.float32)
        everything = session.run(None, {"scores": scores, "k": np.array(size)})[1]
        assert (np.sort(everything) == np.arange(size)).all()
        for k in (k for k in (1, 2, 7, 60, size) if k <= size):
            values, ids = session.run(None, {"scores": scores, "k": np.array(k)})
            assert (values == -np.sort(-scores)[:, :k]).all()
            assert (np.take_along_axis(scores, ids, 1) == values).all()
            assert (ids == everything[:, :k]).all()


class BestTokens(nn.Module):
    def forward(self, scores: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return best_tokens(scores, k)


def weights(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for tensor in onnx.load(path).graph.initializer:
        yield onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims)


def test_a_shared_matrix_is_stored_once(tiny_artifact: Path, tiny_fp32_artifact: Path) -> None:
    """Embedding and output projection of the decoder are one tensor in the file, whichever the variant."""
    for path, kind in (
        (tiny_artifact / "cpu", "INT8"),
        (tiny_artifact / "cuda", "INT8"),
        (tiny_fp32_artifact / "cpu", "FLOAT"),
    ):
        found = list(weights(path / "decoder.onnx"))
        assert [shape for _, shape in found if sorted(shape) == [32, 300]] == [(300, 32)]
        assert (kind, (300, 32)) in found


def test_small_types_in_the_file_cost_nothing_in_a_run(tiny_artifact: Path, tmp_path: Path) -> None:
    """Matrices stored as integers are expanded when ONNX Runtime loads a graph, not at every step."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tiny_artifact / "cuda/decoder.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert onnx.TensorProto.INT8 not in {tensor.data_type for tensor in graph.initializer}


def test_a_graph_says_nothing_of_the_machine_it_was_made_on(tiny_artifact: Path) -> None:
    """No path, no stack trace: the exporter's notes are stripped."""
    for path in tiny_artifact.rglob("*.onnx"):
        content = path.read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


def test_the_cuda_variant_computes_in_float16_what_the_model_computes(
    model: Transformer, tiny_artifact: Path, sources: list[list[int]]
) -> None:
    """State is float16; on the CPU, where it can be run here, its memory is the model's but for rounding."""
    decoder = ArtifactDecoder(tiny_artifact, "cuda", threads=1)
    rows = decoder.encode(sources)
    assert {array.dtype for array in rows.state.values()} == {np.dtype(np.float16)}
    with torch.no_grad():
        expected = model.encode(pad_rows(sources, 0), torch.tensor([len(s) for s in sources])).numpy()
    for row, source in enumerate(sources):
        assert np.abs(rows.memory[row, : len(source)] - expected[row, : len(source)]).max() < 0.3


def test_reorder_takes_rows_of_every_state_tensor(tiny_artifact: Path, sources: list[list[int]]) -> None:
    """Row i of each result is row rows_from[i], and a row may be taken more than once."""
    rows = ArtifactDecoder(tiny_artifact, "cuda", threads=1).encode(sources)
    session = open_session(tiny_artifact / "cuda/reorder.onnx", threads=1)
    picked = np.array([3, 3, 0])
    outputs = session.run(None, {"rows_from": picked, **rows.state})
    names = [port.name for port in session.get_outputs()]
    assert names == [f"next_{name}" for name in rows.state] or set(names) == {f"next_{name}" for name in rows.state}
    for name, output in zip(names, outputs, strict=True):
        assert output.tobytes() == rows.state[name.removeprefix("next_")][picked].tobytes()

"""Alone or in any batch, at any order of admission: the same bits. On a real artifact, fp32 and int8."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.artifact import Artifact
from service.core import Core
from service.runner import Runner
from service.sequence import Sequence, Token
from service.settings import Settings
from tests.service.fakes import Client, Clock, make_metrics, sample


@dataclass
class Model:
    """A runner that is opened once, and what it says about some sources when each is alone."""

    runner: Runner
    sources: list[list[int]]
    ids: list[list[int]]
    log_probabilities: list[list[float]]
    vectors: list[np.ndarray]

    def core(self, **sizes: int) -> Core:
        sizes = {"max_rows": 4, "encode_tokens": 128, **sizes}
        return Core(self.runner, make_metrics(), clock=Clock(), **sizes)  # type: ignore[arg-type]


def _sources(manifest_vocab: int, longest: int) -> list[list[int]]:
    rng = random.Random(5)
    lengths = [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 25, 33, 48, 49, longest - 1, longest]
    return [[*(rng.randrange(3, manifest_vocab) for _ in range(length - 1)), 2] for length in lengths]


def _alone(runner: Runner) -> Model:
    manifest = runner.manifest
    model = Model(runner, _sources(manifest.vocab_size, manifest.max_source_tokens), [], [], [])
    for source in model.sources:
        client, core = Client(), model.core(max_rows=1)
        generation, encoding = client.generate(source, manifest.max_target_tokens), client.encode(source)
        for sequence in (generation, encoding):  # one after the other
            core.add([sequence])
            while not core.idle:
                core.iterate()
        model.ids.append(client.result(generation).ids)
        model.log_probabilities.append(client.result(generation).log_probabilities)
        model.vectors.append(client.vectors(encoding))
    return model


@pytest.fixture(scope="module", params=["fp32", "int8"])
def model(request: pytest.FixtureRequest) -> Model:
    path: Path = request.getfixturevalue("tiny_fp32_artifact" if request.param == "fp32" else "tiny_artifact")
    return _alone(Runner(Artifact.load(path), Settings(threads=1, provider="cpu")))


def test_the_sources_are_worth_comparing(model: Model) -> None:
    """Answers differ from source to source, are of several lengths, and some reach the limit or the end token."""
    assert len({tuple(ids) for ids in model.ids}) > len(model.ids) / 2
    assert len({len(ids) for ids in model.ids}) > 2
    assert any(ids[-1] == 2 for ids in model.ids)
    assert all(np.isfinite(vectors).all() for vectors in model.vectors)
    assert all(value <= 0 for values in model.log_probabilities for value in values)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_alone_is_batched_at_every_admission_order(model: Model, data: st.DataObject) -> None:
    """Ids, log-probabilities and vectors are the same bits, whoever came before, beside and after, in whatever room."""
    core = model.core(
        max_rows=data.draw(st.integers(1, 9), label="max_rows"),
        encode_tokens=data.draw(st.sampled_from([1, 64, 200, 1000]), label="encode_tokens"),
    )
    entry = st.tuples(st.integers(0, len(model.sources) - 1), st.integers(0, 4), st.sampled_from(["g", "g", "e", "c"]))
    client = Client()
    expected: list[tuple[Sequence, int]] = []
    cancelled: list[Sequence] = []
    for place, pause, kind in data.draw(st.lists(entry, min_size=1, max_size=20), label="arrivals"):
        source, limit = model.sources[place], model.runner.manifest.max_target_tokens
        sequence = client.encode(source) if kind == "e" else client.generate(source, limit, stream=place % 2 == 0)
        core.add([sequence])
        for _ in range(pause):
            core.iterate()
        if kind == "c":
            cancelled.append(sequence)
        else:
            expected.append((sequence, place))
        if len(cancelled) > 1:
            core.cancel([cancelled.pop(0)])
    core.cancel(cancelled)
    while not core.idle:
        core.iterate()
    core.check_integrity()
    for sequence, place in expected:
        if sequence.kind == "encode":
            assert client.vectors(sequence).tobytes() == model.vectors[place].tobytes()
            continue
        finished = client.result(sequence)
        assert finished.ids == model.ids[place]
        assert finished.log_probabilities == model.log_probabilities[place]
        tokens = [event for event in client.events[sequence] if isinstance(event, Token)]
        if sequence.stream:
            assert [token.id for token in tokens] == finished.ids
            assert [token.log_probability for token in tokens] == finished.log_probabilities


def test_a_shorter_limit_cuts_the_same_answer(model: Model) -> None:
    """The limit decides where an answer ends, not what it says."""
    core, client = model.core(), Client()
    sequences = [client.generate(source, limit) for source, limit in zip(model.sources, range(1, 99), strict=False)]
    core.add(sequences)
    while not core.idle:
        core.iterate()
    for sequence, limit, ids in zip(sequences, range(1, 99), model.ids, strict=False):
        finished = client.result(sequence)
        assert finished.ids == ids[:limit]
        assert finished.reason == ("stop" if ids[:limit][-1] == 2 else "length")


def test_many_rows_share_a_step(model: Model) -> None:
    """16 sequences take about as many steps as the longest of them, not as all of them together."""
    core, client = model.core(max_rows=16, encode_tokens=4096), Client()
    core.add([client.generate(source, 10) for source in model.sources])
    while not core.idle:
        core.iterate()
    steps = sample(core._metrics, "batch_rows_count")
    assert steps == max(min(len(ids), 10) for ids in model.ids)

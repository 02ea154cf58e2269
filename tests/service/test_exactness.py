"""Alone or in any batch, at any order of admission: the same bits. On real artifacts, fp32 and int8, with every kind of
state.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.artifact import Artifact
from service.core import Core
from service.patterns import Patterns, Vocabulary
from service.runner import Runner
from service.sequence import Sequence, Token
from service.settings import Settings
from tests.service.fakes import Client, Clock, make_metrics, sample
from tests.service.references import Texts, spellings


@dataclass
class Model:
    """A runner that is opened once, and what it says about some sources when each is alone."""

    runner: Runner
    sources: list[list[int]]
    ids: list[list[int]]
    log_probabilities: list[list[float]]
    vectors: list[np.ndarray]
    told: dict[tuple[str, int], list[object]] = field(default_factory=dict)
    """Of a control and a source, when it is alone."""

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


ARTIFACTS = {
    "fp32": "tiny_fp32_artifact",
    "int8": "tiny_artifact",
    "window": "tiny_window_artifact",
    "linear": "tiny_linear_artifact",
}


@pytest.fixture(scope="module", params=ARTIFACTS)
def model(request: pytest.FixtureRequest) -> Model:
    path: Path = request.getfixturevalue(ARTIFACTS[request.param])
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


# ---- every control ----

TEXTS = Texts(spellings(300), stop=(b"abca", b"ccb"), suppress=(b"bab", b"cc", b"aca"))
"""Made-up bytes for the tokens of the tiny model: what matters is that the same ones complete a text."""

CONTROLS: dict[str, dict[str, object]] = {
    "greedy": {},
    "limited": {"min_new_tokens": 9, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "texts": {**TEXTS.patterns(), "prefix_ids": (7, 8)},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "long beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never", "min_new_tokens": 4},
    "bent beams": {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "early_stopping": True},
    "beams after a prefix": {"num_beams": 3, "prefix_ids": (5, 9, 11, 6), "suppress": TEXTS.patterns()["suppress"]},
    "sampled": {"do_sample": True, "seed": 1, "temperature": 1.5},
    "several sampled": {"do_sample": True, "seed": 2, "num_return_sequences": 4, "top_k": 40, "top_p": 0.9},
    "sampled after a prefix": {"do_sample": True, "seed": 3, "top_k": 5, "prefix_ids": (30,), "min_new_tokens": 5},
    "alternatives": {"return_alternatives": True, "num_return_sequences": 5},
    "alternatives with beams": {"return_alternatives": True, "num_return_sequences": 2, "num_beams": 3},
    "many alternatives": {"return_alternatives": True, "num_return_sequences": 6, "prefix_ids": (5, 6)},
}


def _controlled(client: Client, source: list[int], control: str) -> Sequence:
    return client.generate(source, 24, stream=True, **CONTROLS[control])


def _told_alone(model: Model, control: str, place: int) -> list[object]:
    """Worked out once."""
    if (control, place) not in model.told:
        client, core = Client(), model.core(max_rows=6)
        sequence = _controlled(client, model.sources[place], control)
        core.add([sequence])
        while not core.idle:
            core.iterate()
        assert client.finished(sequence)
        model.told[control, place] = client.told(sequence)
    return model.told[control, place]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_control_alone_is_batched(model: Model, data: st.DataObject) -> None:
    """Beams, sampling, prefixes, alternatives, constraints and encodings side by side, some cancelled half-way: every
    token, every number and the order in which they became certain are the same as alone."""
    core = model.core(
        max_rows=data.draw(st.integers(6, 16), label="max_rows"),
        encode_tokens=data.draw(st.sampled_from([1, 100, 1000]), label="encode_tokens"),
    )
    call = st.tuples(
        st.sampled_from([*CONTROLS, "encode"]),
        st.integers(0, len(model.sources) - 1),
        st.integers(0, 5),
        st.sampled_from([False] * 5 + [True]),
    )
    client = Client()
    calls: list[tuple[Sequence, str, int]] = []
    cancelled: list[Sequence] = []
    gone: set[Sequence] = set()
    for control, place, pause, given_up in data.draw(st.lists(call, min_size=2, max_size=14), label="calls"):
        source = model.sources[place]
        sequence = client.encode(source) if control == "encode" else _controlled(client, source, control)
        calls.append((sequence, control, place))
        core.add([sequence])
        for _ in range(pause):
            core.iterate()
            core.check_integrity()
        core.cancel(cancelled)
        gone.update(cancelled)
        cancelled = [sequence] if given_up else []
    while not core.idle:
        core.iterate()
        core.check_integrity()
    for sequence, control, place in calls:
        if control == "encode":
            alone: list[object] = [model.vectors[place].tolist()]
        else:
            alone = _told_alone(model, control, place)
        told = client.told(sequence)
        assert told == (alone if sequence not in gone else alone[: len(told)])


def test_the_controls_are_worth_comparing(model: Model) -> None:
    """Each one changes what is said, and results end in both ways."""
    plain = [_told_alone(model, "greedy", place)[-1] for place in range(6)]
    reasons = set()
    for control in CONTROLS:
        results = [_told_alone(model, control, place)[-1] for place in range(6)]
        assert control == "greedy" or results != plain
        reasons |= {result.reason for finished in results for result in finished}  # type: ignore[attr-defined]
    assert reasons == {"stop", "length"}


def test_greedy_by_a_search_of_its_own_is_plain_greedy(model: Model) -> None:
    """A control that forbids nothing changes no bit, whether it looks at candidates or at all logits."""
    limit = model.runner.manifest.max_target_tokens
    unheard = Texts(spellings(300), stop=(b"x",), suppress=(b"y",)).patterns()
    core, client = model.core(max_rows=8), Client()
    sequences = [client.generate(source, limit, **unheard) for source in model.sources]
    forbidding = [
        client.generate(source, limit, suppress=_nearly_all(model, ids))
        for source, ids in zip(model.sources, model.ids, strict=True)
    ]
    core.add([*sequences, *forbidding])
    while not core.idle:
        core.iterate()
    for place, (sequence, other) in enumerate(zip(sequences, forbidding, strict=True)):
        assert client.result(sequence).ids == client.result(other).ids == model.ids[place]
        assert client.result(sequence).log_probabilities == model.log_probabilities[place]
        assert client.result(other).log_probabilities == pytest.approx(model.log_probabilities[place], abs=1e-5)


def _nearly_all(model: Model, ids: list[int]) -> Patterns:
    """Forbids every token that this answer does not need: so many that all logits are looked at."""
    vocabulary = [b"" if id in (0, 1, 2) else b"yes" if id in ids else b"no" for id in range(300)]
    return Patterns(Vocabulary(vocabulary), [b"no"])

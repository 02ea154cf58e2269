"""A model of a few lines, in numpy, that obeys the runner's interface and reads every kind of state tensor.

What it says depends on all that it should remember, so a row that was moved wrongly, or grown wrongly, says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from prometheus_client import CollectorRegistry

from service.artifact import Manifest
from service.batch import Batch, StepOutput
from service.core import Core
from service.ladder import Ladder
from service.metrics import Families, Metrics
from service.sequence import (
    Encoded,
    Event,
    Failed,
    Finished,
    GenerateParameters,
    Result,
    Scored,
    Sequence,
    Token,
)
from service.state import State

PAD, BOS, EOS = 0, 1, 2
VOCAB, LONGEST_SOURCE, LONGEST_TARGET = 97, 40, 70

MANIFEST = Manifest.model_validate(
    {
        "format_version": 1,
        "name": "fake",
        "version": "1",
        "embedding_size": 3,
        "vocab_size": VOCAB,
        "max_source_tokens": LONGEST_SOURCE,
        "max_target_tokens": LONGEST_TARGET,
        "special_tokens": {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS},
        "state": [
            {"name": "source", "kind": "source", "shape": ["rows", "source_capacity", 2]},
            {"name": "history", "kind": "cache", "shape": ["rows", 3, "target_capacity"]},
            {"name": "sum", "kind": "recurrent", "shape": ["rows", 2]},
        ],
        "variants": {"cpu": {"precision": "fp32", "encoder": "encoder.onnx", "decoder": "decoder.onnx"}},
        "files": dict.fromkeys(("tokenizer.json", "encoder.onnx", "decoder.onnx"), "0" * 64),
    }
)


@functools.cache
def distribution(mixed: int) -> np.ndarray:
    """Log-probabilities of the next token, (VOCAB,): some numbers that depend on a number."""
    values = np.random.default_rng(mixed).normal(size=VOCAB).astype(np.float32)
    values[EOS if mixed % 17 == 0 else 3 + mixed % (VOCAB - 3)] += 6.0
    values[[PAD, BOS]] = -np.inf
    return values - np.float32(np.log(np.exp(values.astype(np.float64)).sum()))


def says(source_ids: list[int], limit: int) -> list[int]:
    """What the fake model generates for a source, worked out without any state."""
    ids: list[int] = []
    history, total = [BOS], 0
    while len(ids) < limit:
        total = (total * 31 + history[-1]) % 1009
        mixed = sum(place * id for place, id in enumerate(source_ids, 1)) + 7 * sum(history) + total
        ids.append(int(distribution(mixed).argmax()))
        if ids[-1] == EOS:
            break
        history.append(ids[-1])
    return ids


TALKATIVE = [source for place in range(3, VOCAB) if EOS not in says(source := [3, place], LONGEST_TARGET)]
"""Sources whose answers do not end by themselves."""


class FakeRunner:
    """Executes nothing but arithmetic. `fail` names the calls that raise: "encode_into", "encode", "step"."""

    manifest = MANIFEST
    variant = "cpu"
    generates = scores = aligns = True

    def __init__(self) -> None:
        self.fail: set[str] = set()
        self.steps: list[int] = []
        self.encoded: list[tuple[str, int, int]] = []
        self.before_step: Callable[[], None] = lambda: None
        self.before_encoding: Callable[[], None] = lambda: None

    def new_state(self, *, max_rows: int, source: Ladder, target: Ladder) -> State:
        tensors = [(tensor, np.dtype(np.int64)) for tensor in self.manifest.state]
        return State(tensors, max_rows=max_rows, source=source, target=target)

    def encode_into(self, state: State, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.before_encoding()
        self._called("encode_into")
        self.encoded.append(("generate", *ids.shape))
        block = state._buffers["source"].block.read()
        for row, (source, length) in enumerate(zip(ids, lengths, strict=True), start=state.rows):
            assert (source[length:] == PAD).all()
            block[row] = -1
            block[row, : len(source), 0] = source
            block[row, : len(source), 1] = source

    def encode(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self._called("encode")
        self.encoded.append(("encode", *ids.shape))
        return np.repeat(ids[:, :, None], 3, axis=2).astype(np.float32)

    def score(
        self, ids: np.ndarray, lengths: np.ndarray, target_ids: np.ndarray, *, alignment: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        self._called("score")
        self.encoded.append(("score", *ids.shape))
        weights = np.zeros((*target_ids.shape, ids.shape[1]), np.float32)
        for row, length in enumerate(lengths):
            weights[row, :, :length] = 1 / length
        return -target_ids.astype(np.float32), weights if alignment else None

    def step(self, batch: Batch, state: State, k: int, logits: bool) -> StepOutput:
        self.before_step()
        self._called("step")
        rows = batch.rows
        assert rows == state.rows
        self.steps.append(rows)
        source, history, total = (state.read(name) for name in ("source", "history", "sum"))
        values = np.empty((rows, VOCAB), np.float32)
        for row in range(rows):
            position, length = batch.positions[row], batch.source_lengths[row]
            history[row, :, position] = batch.last_ids[row]
            total[row] = (total[row] * 31 + batch.last_ids[row]) % 1009
            mixed = (source[row, :length, 1] * np.arange(1, length + 1)).sum()
            mixed += 7 * history[row, 2, : position + 1].sum() + total[row, 1]
            values[row] = distribution(int(mixed))
        ids = np.argsort(-values, axis=1, kind="stable")[:, :k]
        return StepOutput(ids, np.take_along_axis(values, ids, axis=1), values + 1.0 if logits else None)

    def _called(self, name: str) -> None:
        if name in self.fail:
            raise RuntimeError(f"{name} fails because the test says so")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Client:
    """Makes sequences and keeps what they are told."""

    def __init__(self) -> None:
        self.events: dict[Sequence, list[Event]] = {}

    def generate(self, source_ids: list[int], limit: int = 20, **options: object) -> Sequence:
        """A sequence of kind generate; options of GenerateParameters and of Sequence."""
        names = {field.name for field in dataclasses.fields(GenerateParameters)}
        asked = {name: options.pop(name) for name in names & set(options)}
        return self._make(source_ids, parameters=GenerateParameters(limit, **asked), **options)  # type: ignore[arg-type]

    def score(self, source_ids: list[int], target_ids: list[int], **options: object) -> Sequence:
        """A sequence of kind score."""
        return self._make(source_ids, kind="score", target_ids=target_ids, **options)

    def encode(self, source_ids: list[int], **options: object) -> Sequence:
        """A sequence of kind encode."""
        return self._make(source_ids, kind="encode", **options)

    def classify(self, source_ids: list[int], **options: object) -> Sequence:
        """A sequence of kind classify."""
        return self._make(source_ids, kind="classify", **options)

    def last(self, sequence: Sequence) -> Event | None:
        """The last event, None if there was none yet."""
        return self.events[sequence][-1] if self.events[sequence] else None

    def finished(self, sequence: Sequence) -> Finished:
        """Its result; fails if there is another or none."""
        event = self.last(sequence)
        assert isinstance(event, Finished), event
        assert [type(event) for event in self.events[sequence][:-1]] == [Token] * (len(self.events[sequence]) - 1)
        return event

    def result(self, sequence: Sequence) -> Result:
        """Its only result."""
        (result,) = self.finished(sequence).results
        return result

    def told(self, sequence: Sequence) -> list[object]:
        """All that it was told, without times: equal if every token, number and result is."""
        contents: list[object] = []
        for event in self.events[sequence]:
            if isinstance(event, Token):
                contents.append(event)
            elif isinstance(event, Finished):
                contents.append(event.results)
            elif isinstance(event, Scored):
                contents.append(event.log_probabilities)
            else:
                contents.append(event.error if isinstance(event, Failed) else event.memory.tolist())
        return contents

    def error(self, sequence: Sequence) -> Exception:
        """The error that it got, and nothing after it."""
        event = self.last(sequence)
        assert isinstance(event, Failed), event
        return event.error

    def vectors(self, sequence: Sequence) -> np.ndarray:
        """Its encoding."""
        (event,) = self.events[sequence]
        assert isinstance(event, Encoded), event
        return event.memory

    def _make(self, source_ids: list[int], **options: object) -> Sequence:
        events: list[Event] = []
        sequence = Sequence(source_ids, events.append, **options)  # type: ignore[arg-type]
        self.events[sequence] = events
        return sequence


def make_metrics() -> Metrics:
    """Metrics on a registry of their own."""
    return Families(CollectorRegistry()).of("fake")


def make_core(
    runner: FakeRunner, metrics: Metrics, clock: Clock, *, max_rows: int = 4, encode_tokens: int = 64
) -> Core:
    """A core on the fake runner."""
    return Core(runner, metrics, max_rows=max_rows, encode_tokens=encode_tokens, clock=clock)


class Bench:
    """A core and all that is around it."""

    def __init__(self, **sizes: int) -> None:
        self.runner, self.metrics, self.clock, self.client = FakeRunner(), make_metrics(), Clock(), Client()
        self.core = make_core(self.runner, self.metrics, self.clock, **sizes)

    def submit(self, *sequences: Sequence) -> None:
        """Let them wait, from now on."""
        for sequence in sequences:
            sequence.submitted_at = self.clock.now
        self.core.add(sequences)

    def run(self, iterations: int = 10_000) -> None:
        """Iterate until idle, checking the books each time."""
        for _ in range(iterations):
            if self.core.idle:
                break
            self.core.iterate()
            self.core.check_integrity()
            self.clock.now += 0.01


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """The value of a sample, summed over the labels that are not given."""
    found = [
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"transduce_{name}" and labels.items() <= sample.labels.items()
    ]
    return sum(found)


def books(metrics: Metrics) -> dict[str, float]:
    """The accounting of requests: those that came to an end, that run, and that wait."""
    return {
        "finished": sample(metrics, "requests_total"),
        "running": sample(metrics, "num_requests_running"),
        "waiting": sample(metrics, "num_requests_waiting"),
    }

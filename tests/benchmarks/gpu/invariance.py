"""What a row's numbers depend on besides the row itself: how many rows there are, its place, its neighbours, padding.

Tells what could be done where alone is not batched: always the same number of rows, say. The decoder is given the very
bits that the encoder makes of each source alone, so that only its own steps are looked at.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from service.batch import Batch, pad
from service.ladder import Ladder
from service.runner import Runner
from service.state import State
from tests.benchmarks.gpu.asked import generation
from tests.benchmarks.gpu.request import Request, random_source

_ROWS = (
    *range(1, 17), 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 256, 384, 511, 512,
)  # fmt: skip
_LENGTH = 13
"""Tokens of the source that is looked at."""
_EVERY = 7
"""It stands in every seventh row."""
_STEPS = 4


@dataclass(frozen=True)
class StepCheck:
    """The logits of some decoder steps with so many rows."""

    rows: int
    as_alone: bool
    """The same bits as with one row."""
    at_every_place: bool
    beside_others: bool
    """The same bits beside other texts, with as many rows."""
    difference: float
    """The largest from those of one row."""


@dataclass(frozen=True)
class EncoderCheck:
    """The vectors of an encoder call of so many rows, padded to so many tokens."""

    rows: int
    padded_to: int
    as_alone: bool
    difference: float


@dataclass(frozen=True)
class Invariance:
    """The part `invariance`."""

    steps: list[StepCheck]
    encoder: list[EncoderCheck]
    problems: list[str] = field(default_factory=list)


def look(request: Request) -> Invariance:
    """The part `invariance`."""
    runner, most = request.open_runner(), max(request.rows)
    return Invariance(_steps(runner, most), _encoder(runner, min(most, 64)))


class _Rows:
    """Many rows of which any number of the first ones can take steps: the text looked at, and others between."""

    def __init__(self, runner: Runner, most: int, seed: int) -> None:
        manifest = runner.manifest
        rng, probe = random.Random(seed), random_source(manifest, random.Random(0), _LENGTH)
        lengths, targets = (Ladder.of_capacities(n) for n in (manifest.max_source_tokens, manifest.max_target_tokens))
        self.state: State = runner.new_state(max_rows=most, source=lengths, target=targets)
        self.batch = Batch(
            max_rows=most, max_target_tokens=manifest.max_target_tokens, bos_id=manifest.special_tokens.bos_id
        )
        self._runner = runner
        rungs = Ladder.of_lengths(manifest.max_source_tokens)
        self.state.reserve(source=rungs.rung(2 * _LENGTH), target=_STEPS)
        for row in range(most):
            length = rng.randint(1, 2 * _LENGTH)
            source = probe if row % _EVERY == 0 else random_source(manifest, rng, length)
            ids, lengths_ = pad([source], rungs.rung(len(source)), manifest.special_tokens.pad_id)
            runner.encode_into(self.state, ids, lengths_)
            self.state.append(1)
            self.batch.append([generation(source, _STEPS).sequence])

    def logits(self, rows: int) -> np.ndarray:
        """(texts looked at, steps, vocabulary), with so many rows."""
        batch, found = self.batch, []
        self.state.rows = batch.rows = rows
        batch.positions[:rows] = 0
        first = self._runner.manifest.vocab_size // 2
        for step in range(_STEPS):
            batch.last_ids[:rows] = first + step
            output = self._runner.step(batch, self.state, 1, logits=True)
            assert output.logits is not None
            found.append(output.logits[::_EVERY].copy())
            batch.positions[:rows] += 1
        return np.stack(found, axis=1)


def _steps(runner: Runner, most: int) -> list[StepCheck]:
    rows, beside = _Rows(runner, most, seed=1), _Rows(runner, most, seed=2)
    alone = rows.logits(1)[0]
    checks = []
    for count in sorted({count for count in _ROWS if count <= most} | {most}):
        found, others = rows.logits(count), beside.logits(count)
        checks.append(
            StepCheck(
                count,
                as_alone=bool((found == alone).all()),
                at_every_place=bool((found == found[0]).all()),
                beside_others=bool((found == others).all()),
                difference=float(np.abs(found - alone).max()),
            )
        )
    return checks


def _encoder(runner: Runner, most: int) -> list[EncoderCheck]:
    manifest = runner.manifest
    probe, rng = random_source(manifest, random.Random(0), _LENGTH), random.Random(3)
    rungs = Ladder.of_lengths(manifest.max_source_tokens).rungs
    lengths = [rung for rung in rungs if _LENGTH <= rung <= 256]
    alone = _memory(runner, [probe], lengths[0])
    checks = []
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= most]
    for rows, length in [*((count, lengths[0]) for count in counts), *((1, length) for length in lengths[1:])]:
        others = [random_source(manifest, rng, rng.randint(1, length)) for _ in range(rows - 1)]
        found = _memory(runner, [*others, probe], length)
        checks.append(
            EncoderCheck(rows, length, bool((found == alone).all()), difference=float(np.abs(found - alone).max()))
        )
    return checks


def _memory(runner: Runner, sources: list[list[int]], length: int) -> np.ndarray:
    """The vectors of the last of these sources."""
    return runner.encode(*pad(sources, length, runner.manifest.special_tokens.pad_id))[-1, :_LENGTH]

"""Faults, one at each call of the model and at each allocation: those concerned fail, and all is sound afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from service.artifact import Artifact
from service.batch import Batch, StepOutput
from service.core import Core
from service.errors import EngineFailure
from service.health import TOLERATED
from service.ladder import Ladder
from service.runner import Runner
from service.sequence import Failed, Result, Sequence
from service.settings import Settings
from service.state import Block, HostBlock, State
from tests.service.fakes import Bench, Client, Clock, FakeRunner, books, make_metrics, sample

POISON = -(10**7)
"""What stands in the state of a row that went wrong: the fake's state has whole numbers, and no NaN."""


@dataclass
class Call:
    """One call of the model as it came."""

    name: str
    rows: int
    concerned: list[Sequence]
    """Of a step: whose rows it works on."""


class Faulty(FakeRunner):
    """The fake model, with a fault at the call, or the allocation, of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.allocations = 0
        self.raises_at = self.unsound_at = self.no_memory_at = -1
        self.unsound_row = 0
        self.state: State | None = None

    def new_state(self, *, max_rows: int, source: Ladder, target: Ladder) -> State:
        state = super().new_state(max_rows=max_rows, source=source, target=target)
        state._allocate = self._allocate  # those from now on: without the first ones no engine comes to be
        self.state = state
        return state

    def encode_into(self, state: State, ids: np.ndarray, lengths: np.ndarray) -> None:
        self._come("encode_into", len(ids))
        super().encode_into(state, ids, lengths)

    def encode(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._spoilt(self._come("encode", len(ids)), super().encode(ids, lengths))

    def classify(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._spoilt(self._come("classify", len(ids)), super().encode(ids, lengths) + 1)

    def score(
        self, ids: np.ndarray, lengths: np.ndarray, target_ids: np.ndarray, *, alignment: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        unsound = self._come("align" if alignment else "score", len(ids))
        scores, weights = super().score(ids, lengths, target_ids, alignment=alignment)
        if weights is not None:
            return scores, self._spoilt(unsound, weights)
        return self._spoilt(unsound, scores), None

    def step(self, batch: Batch, state: State, k: int, logits: bool) -> StepOutput:
        unsound = self._come("step", batch.rows, list(batch.sequences))
        output = super().step(batch, state, k, logits)
        if unsound:
            row = self.unsound_row % batch.rows
            output.log_probabilities[row] = np.nan
            if output.logits is not None:
                output.logits[row] = np.nan
            for name in state.names:
                state._buffers[name].block.read()[row] = POISON
        return output

    @property
    def poisoned(self) -> bool:
        """Whether anything of a row that went wrong is left, in use or not."""
        assert self.state is not None
        return any((buffer.lent.read() == POISON).any() for buffer in self.state._buffers.values() if buffer.lent)

    def _come(self, name: str, rows: int, concerned: list[Sequence] | None = None) -> bool:
        number = len(self.calls)
        self.calls.append(Call(name, rows, concerned or []))
        if number == self.raises_at:
            raise RuntimeError(f"call {number}, {name}, fails because the test says so")
        return number == self.unsound_at

    def _spoilt(self, unsound: bool, numbers: np.ndarray) -> np.ndarray:
        if unsound:
            numbers[self.unsound_row % len(numbers), 0] = np.nan
        return numbers

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> Block:
        self.allocations += 1
        if self.allocations - 1 == self.no_memory_at:
            raise MemoryError("no memory because the test says so")
        return HostBlock(shape, dtype)


class Play:
    """The same requests of every kind in the same order, on a model with at most one fault."""

    def __init__(self, *, warm: bool = False, **faults: int) -> None:
        self.bench = Bench(max_rows=8)
        self.runner = Faulty()
        self.bench.runner = self.runner
        self.bench.core = type(self.bench.core)(
            self.runner, self.bench.metrics, max_rows=8, encode_tokens=64, clock=self.bench.clock
        )
        for name, value in faults.items():
            setattr(self.runner, name, value)
        self.first = self._act()
        self.calls, self.allocations = list(self.runner.calls), self.runner.allocations
        self.told = self._told(self.first)

    def again(self) -> list[list[object]]:
        """What the same requests are told after that."""
        return self._told(self._act())

    @property
    def failed(self) -> set[int]:
        """The numbers of the requests that failed, each with an EngineFailure as its last event."""
        last = [self.bench.client.last(sequence) for sequence in self.first]
        assert None not in last
        failures = {number: event for number, event in enumerate(last) if isinstance(event, Failed)}
        assert all(isinstance(event.error, EngineFailure) for event in failures.values())
        return set(failures)

    def numbers(self, sequences: list[Sequence]) -> set[int]:
        """Which requests these are."""
        return {self.first.index(sequence) for sequence in sequences}

    def _told(self, sequences: list[Sequence]) -> list[list[object]]:
        def comparable(told: object) -> object:
            if not isinstance(told, list) or not all(isinstance(result, Result) for result in told):
                return told
            return [
                replace(result, alignment=None if (a := result.alignment) is None else a.tolist()) for result in told
            ]

        return [[comparable(told) for told in self.bench.client.told(sequence)] for sequence in sequences]

    def check_books(self) -> None:
        """Everyone came to an end once, no row is lost, and nothing that is no number is left."""
        self.bench.core.check_integrity()
        assert self.bench.core.idle
        assert books(self.bench.metrics) == {"finished": len(self.first), "running": 0, "waiting": 0}
        assert sample(self.bench.metrics, "rows_in_use") == 0
        assert sample(self.bench.metrics, "requests_total", finish_reason="error") == len(self.failed)
        assert not self.runner.poisoned

    def _act(self) -> list[Sequence]:
        client, bench = self.bench.client, self.bench
        long = [[3, 7, 8], [3, 8, 7], [4, 6, 8], [4, 8, 7]]  # answers that do not end by themselves
        waves = [
            [
                client.generate(long[0], 45),
                client.generate([*long[1], 5], 20, stream=True),
                client.generate(long[2], 12, num_beams=2, num_return_sequences=2),
                client.encode([4, 5, 6]),
                client.encode([7, 8]),
            ],
            [
                client.score([3, 4], [5, 6, 2]),
                client.score([3, 5], [7, 6, 2]),
                client.generate([9] * 35, 5),
                client.generate([3, 9], 9, do_sample=True, seed=3, stream=True),
                client.generate([3, 4, 5], 6, return_alignments=True),
            ],
            [
                client.classify([4, 4]),
                client.classify([4, 5]),
                client.generate(long[3], 40, num_beams=3, stream=True),
                client.generate([6, 7], 8, repetition_penalty=1.5),
            ],
        ]
        for wave in waves:
            bench.submit(*wave)
            bench.run(3)
        bench.run()
        return [sequence for wave in waves for sequence in wave]


@pytest.fixture(scope="module")
def sound() -> Play:
    """Without a fault."""
    play = Play()
    assert not play.failed
    play.check_books()
    return play


def test_the_play_has_every_call(sound: Play) -> None:
    """Else the tests below would claim more than they show."""
    assert {call.name for call in sound.calls} == {
        "encode_into", "encode", "classify", "score", "align", "step"
    }  # fmt: skip
    assert any(call.rows > 1 for call in sound.calls if call.name == "encode_into")
    assert sound.allocations >= 2  # both capacities grow while rows are in use
    assert sound.again() == sound.told


def _every(count: Callable[[Play], int], fault: str, sound: Play, **more: int) -> None:
    for number in range(count(sound)):
        play = Play(**{fault: number}, **more)
        failed = play.failed
        call = None if fault == "no_memory_at" else play.calls[number]
        if call is None:
            pass  # who is concerned is not the runner's to know
        elif fault == "raises_at" and call.name == "step":
            assert failed == play.numbers(call.concerned), call
        elif call.name == "step":
            assert failed == play.numbers([call.concerned[more["unsound_row"] % call.rows]]), call
        elif fault == "raises_at":
            assert len(failed) == (1 if call.rows == 1 else 0), call  # two are tried again, one by one
        elif call.name == "encode_into":
            assert failed == set(), call  # its numbers are not seen before a step
        else:
            assert len(failed) == 1, call
        for request, (told, wanted) in enumerate(zip(play.told, sound.told, strict=True)):
            if request not in failed:
                assert told == wanted, (number, call, request)
            else:
                assert told[:-1] == wanted[: len(told) - 1], (number, call, request)
        play.check_books()
        play.runner.raises_at = play.runner.unsound_at = play.runner.no_memory_at = -1
        assert play.again() == sound.told, (number, call)


def test_a_call_that_raises_fails_those_it_concerns(sound: Play) -> None:
    """A step: those in it. Another call: nobody where it was for several, since each half is tried again."""
    _every(lambda play: len(play.calls), "raises_at", sound)


@pytest.mark.parametrize("row", [0, 2])
def test_what_is_no_number_fails_its_own_request_alone(sound: Play, row: int) -> None:
    """And what stood in its rows is gone before another gets them."""
    _every(lambda play: len(play.calls), "unsound_at", sound, unsound_row=row)


def test_an_allocation_that_fails_costs_no_more_than_those_who_run(sound: Play) -> None:
    """Buffers are made anew; whoever comes later is served."""
    _every(lambda play: play.allocations, "no_memory_at", sound)


def test_memory_that_cannot_be_had_anew_costs_the_newcomers_alone(sound: Play) -> None:
    """What was given back when the last row left is asked for when the next comes."""
    count = len(Play().runner.manifest.state)
    for number in range(count):
        play = Play()
        play.runner.no_memory_at = play.allocations + number
        told = play.again()
        failed = [one for one, wanted in zip(told, sound.told, strict=True) if one != wanted]
        assert all(isinstance(one[-1], EngineFailure) for one in failed)
        assert len(failed) <= 1  # one by one they are tried again, and by then there is memory
        play.bench.core.check_integrity()
        assert play.again() == sound.told


def test_a_fault_that_stays_fails_everyone_and_nothing_else(sound: Play) -> None:
    """Every call of one name: the others answer as ever, and when it works again so does everything."""
    for name in ("encode_into", "encode", "classify", "score", "align", "step"):
        play = Play()

        def come(called: str, rows: int, concerned: object = None, *, name: str = name) -> bool:
            if called == name:
                raise RuntimeError("always")
            return False

        play.runner._come = come  # type: ignore[method-assign]
        told = play.again()
        assert any(told != wanted for told, wanted in zip(told, sound.told, strict=True))
        assert all(
            isinstance(one[-1], EngineFailure) for one, wanted in zip(told, sound.told, strict=True) if one != wanted
        )
        del play.runner._come
        assert play.again() == sound.told


def test_failures_are_told_by_call(sound: Play) -> None:
    """In a metric, so that an alert can be set on it."""
    number = next(number for number, call in enumerate(sound.calls) if call.name == "step")
    play = Play(raises_at=number)
    assert sample(play.bench.metrics, "model_call_failures_total", call="step") == 1
    assert sample(play.bench.metrics, "model_call_failures_total") == 1
    assert TOLERATED > 1
    assert not play.bench.core.suspect


@pytest.mark.parametrize("artifact", ["tiny_fp32_artifact", "tiny_linear_artifact"])
def test_a_real_row_of_no_numbers_harms_nobody(request: pytest.FixtureRequest, artifact: str) -> None:
    """On real graphs, where 0 times NaN is NaN: those beside it and those who get its place after it.

    In fp32: products of 8 bits round what is no number to some number.
    """
    path: Path = request.getfixturevalue(artifact)
    runner = Runner(Artifact.load(path), Settings(threads=1, provider="cpu"))
    sources = [[*range(5, 5 + length), 2] for length in (3, 9, 14, 30)]

    def begin() -> tuple[Core, Client]:
        return Core(runner, make_metrics(), max_rows=3, encode_tokens=128, clock=Clock()), Client()

    def finish(core: Core) -> None:
        while not core.idle:
            core.iterate()
            core.check_integrity()

    alone = []
    for source in sources:
        core, client = begin()
        sequence = client.generate(source, 30)
        core.add([sequence])
        finish(core)
        alone.append(client.told(sequence))
    for spoilt in range(3):
        core, client = begin()
        company = [client.generate(source, 30) for source in sources[:3]]
        core.add(company)
        core.iterate()
        for name in core.state.names:
            if core.state.dtype(name).kind == "f":
                core.state.read(name)[spoilt] = np.nan
        later = [client.generate(source, 30) for source in (sources[3], sources[spoilt])]
        core.add(later)
        finish(core)
        assert isinstance(client.error(company[spoilt]), EngineFailure)
        told = [client.told(sequence) for sequence in [*company, *later]]
        wanted = [*alone[:3], alone[3], alone[spoilt]]
        del told[spoilt], wanted[spoilt]
        assert told == wanted

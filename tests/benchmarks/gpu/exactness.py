"""Alone against together: each source by itself, then all of them, of every kind, side by side at random arrivals."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.core import Core
from service.runner import Runner
from service.sequence import Encoded, Event, Failed, Finished, Scored
from tests.benchmarks.gpu.asked import Asked, finish, generation, new_core
from tests.benchmarks.gpu.request import Request, sources_of

CONTROLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "4 beams": {"num_beams": 4, "num_return_sequences": 4},
    "sampling": {"do_sample": True, "seed": 1, "temperature": 0.8, "top_p": 0.95},
    "2 samples of 40": {"do_sample": True, "seed": 2, "num_return_sequences": 2, "top_k": 40},
}
AGAIN = "alone again"
"""The company of those who are asked a second time, by themselves: what differs here differs for no reason."""
_ROWS_ALONE = 4
"""What the widest of them takes: a core of so many rows holds one sequence."""
_COMPANIES = (16, 128)
"""Rows of the cores in which all meet."""


@dataclass(frozen=True)
class Agreement:
    """How one kind of answer agrees with what was said alone."""

    company: str
    kind: str
    answers: int
    same: int
    """Equal token ids; of vectors and scores, what agrees within 1e-3."""
    same_bits: int
    largest_difference: float
    """Of log-probabilities up to the first other token, or of vectors."""
    first_difference: str
    """Where the first answer parts; empty if none does."""


@dataclass(frozen=True)
class Exactness:
    """The part `exactness`."""

    sources: int
    longest_source: int
    agreements: list[Agreement]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What was said, in parts: one for each result, of ids and numbers."""

    ids: list[list[int]]
    numbers: list[np.ndarray]


def look(request: Request) -> Exactness:
    """The part `exactness`."""
    runner = request.open_runner()
    manifest = runner.manifest
    sources = sources_of(manifest, request.sources)
    targets = sources[1:] + sources[:1]
    kinds, notes = [*CONTROLS, "encode"], []
    if can_score(runner):
        kinds.append("score")
    else:
        notes.append("score: not compared, the artifact has no scorer")
    limit = min(request.new_tokens, manifest.max_target_tokens)
    calls = [(kind, place) for kind in kinds for place in range(len(sources))]

    def ask(kind: str, place: int) -> Asked:
        if kind == "encode":
            return Asked(sources[place], kind="encode")
        if kind == "score":
            target = targets[place][: manifest.max_target_tokens]
            return Asked(sources[place], kind="score", target_ids=target)
        return generation(sources[place], limit, **CONTROLS[kind])

    alone = _one_by_one(runner, calls, ask)
    agreements = _agreements(AGAIN, alone, _one_by_one(runner, calls, ask))
    for rows in _COMPANIES:
        if rows <= max(_COMPANIES[0], *request.rows):
            together = _together(new_core(runner, rows), calls, ask, random.Random(rows))
            agreements += _agreements(f"{rows} rows", alone, together)
    return Exactness(len(sources), max(map(len, sources)), agreements, notes)


def can_score(runner: Runner) -> bool:
    """Whether this artifact and this service give log-probabilities of given targets."""
    scorer = getattr(runner.manifest.variants[runner.variant], "scorer", None)
    return scorer is not None and hasattr(runner, "score")


def _one_by_one(runner: Runner, calls: list[tuple[str, int]], ask: Any) -> dict[tuple[str, int], Answer]:
    core, answers = new_core(runner, _ROWS_ALONE), {}
    for call in calls:
        asked = ask(*call)
        core.add([asked.sequence])
        finish(core)
        answers[call] = _answer(asked.event)
    return answers


def _together(core: Core, calls: list[tuple[str, int]], ask: Any, rng: random.Random) -> dict[tuple[str, int], Answer]:
    """In a random order, up to four arrivals between two steps."""
    asked = {call: ask(*call) for call in rng.sample(calls, len(calls))}
    arriving = list(asked.values())
    while arriving:
        core.add([arriving.pop().sequence for _ in range(min(rng.randint(0, 4), len(arriving)))])
        core.iterate()
        core.check_integrity()
    finish(core)
    return {call: _answer(one.event) for call, one in asked.items()}


def _answer(event: Event | None) -> Answer:
    match event:
        case Finished(results):
            return Answer([r.ids for r in results], [np.array(r.log_probabilities, np.float32) for r in results])
        case Encoded(memory):
            return Answer([], [memory])
        case Scored(log_probabilities):
            return Answer([], [np.array(log_probabilities, np.float32)])
        case Failed(error):
            raise error
        case _:
            raise RuntimeError(f"a sequence ended with {event}")


def _agreements(
    company: str, alone: dict[tuple[str, int], Answer], together: dict[tuple[str, int], Answer]
) -> list[Agreement]:
    found = []
    for kind in dict.fromkeys(kind for kind, _ in alone):
        pairs = {place: (answer, together[name, place]) for (name, place), answer in alone.items() if name == kind}
        differences = {place: difference(*pair) for place, pair in pairs.items()}
        others = [place for place, pair in pairs.items() if not _same_bits(*pair)]
        found.append(
            Agreement(
                company,
                kind,
                answers=len(pairs),
                same=sum(pair[0].ids == pair[1].ids and differences[place] < 1e-3 for place, pair in pairs.items())
                if kind in ("encode", "score")
                else sum(pair[0].ids == pair[1].ids for pair in pairs.values()),
                same_bits=len(pairs) - len(others),
                largest_difference=max(differences.values()),
                first_difference=_where(others[0], *pairs[others[0]]) if others else "",
            )
        )
    return found


def _same_bits(alone: Answer, together: Answer) -> bool:
    bits = [[array.tobytes() for array in answer.numbers] for answer in (alone, together)]
    return alone.ids == together.ids and bits[0] == bits[1]


def difference(alone: Answer, together: Answer) -> float:
    """The largest of the numbers, as far as the tokens before them are equal."""
    largest = 0.0
    for place, (one, other) in enumerate(zip(alone.numbers, together.numbers, strict=False)):
        until = min(len(one), len(other))
        if alone.ids:
            until = min(until, _equal_until(alone.ids[place], together.ids[place]))
        if until:
            largest = max(largest, float(np.abs(one[:until] - other[:until]).max()))
    return largest


def _equal_until(one: list[int], other: list[int]) -> int:
    """How many tokens from the first on are equal."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _where(source: int, alone: Answer, together: Answer) -> str:
    for result, (one, other) in enumerate(zip(alone.ids, together.ids, strict=False)):
        if one != other:
            return f"source {source}, result {result}, token {_equal_until(one, other)}"
    return f"source {source}, in numbers alone"

"""Decoding as its definitions read: every token of the vocabulary is looked at, every text is read again.

Written from Hugging Face's logits processors, warpers and beam search and from the contract, for tests to hold the
searches against. Of the service it shares the parameters' names and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from service.hypothesis import Outlook, SpecialIds
from service.patterns import Patterns, Vocabulary
from service.search import Search
from service.sequence import GenerateParameters, Result
from tests.service.fakes import BOS, EOS, PAD, VOCAB

SPECIAL = SpecialIds(BOS, EOS, (PAD, BOS))

Logits = Callable[[Sequence[int]], np.ndarray]
"""From the target so far, the start token first, to the logits of the next token, (vocabulary,)."""


class RandomModel:
    """Logits that depend on everything said so far. The padding and the start token have some too, often high ones."""

    def __init__(self, seed: int, vocabulary: int = VOCAB, *, spread: float = 2.0) -> None:
        self.vocabulary = vocabulary
        self._seed = seed
        self._spread = spread
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, target: Sequence[int]) -> np.ndarray:
        key = tuple(target)
        if key not in self._known:
            rng = np.random.default_rng([self._seed, *key])
            values = rng.normal(scale=self._spread, size=self.vocabulary)
            values[EOS] += rng.choice([-1.0, 1.0, 5.0])
            values[[PAD, BOS]] = rng.normal(scale=5.0, size=2)
            self._known[key] = values.astype(np.float32)
        return self._known[key]


@functools.cache
def spellings(vocabulary: int, seed: int = 0) -> list[bytes]:
    """Bytes of so many tokens: few letters, so that texts are spelt in many ways. Special tokens have none."""
    rng = np.random.default_rng(seed)
    words = [bytes(rng.choice(list(b"abc"), size=rng.integers(1, 4)).tolist()) for _ in range(vocabulary)]
    return [b"" if id in (PAD, BOS, EOS) else word for id, word in enumerate(words)]


@dataclass(frozen=True)
class Texts:
    """What `stop` and `suppress` look for, as tests see it."""

    spelling: list[bytes] = field(repr=False)
    stop: tuple[bytes, ...] = ()
    suppress: tuple[bytes, ...] = ()

    def patterns(self) -> dict[str, Patterns]:
        """The same as the service's parameters."""
        vocabulary = Vocabulary(self.spelling)
        asked = {"stop": self.stop, "suppress": self.suppress}
        return {name: Patterns(vocabulary, list(texts)) for name, texts in asked.items() if texts}

    def joined(self, ids: Sequence[int]) -> bytes:
        """The text of tokens."""
        return b"".join(self.spelling[id] for id in ids)


WORDS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5).map(str.encode), max_size=3).map(tuple)
"""Texts to look for in what `spellings` gives."""


@st.composite
def requests(draw: st.DrawFn, *, vocabulary: int = VOCAB, longest: int = 12, **fixed: object) -> Slow:
    """A random model, and a request with any of the controls but beams, sampling and alternatives: these are `fixed`,
    as values or as strategies."""
    texts = Texts(spellings(vocabulary), draw(WORDS), draw(WORDS))
    limit = draw(st.integers(1, longest))
    few = st.integers(3, min(vocabulary - 1, 12))
    parameters = GenerateParameters(
        limit,
        min_new_tokens=draw(st.one_of(st.just(0), st.integers(0, limit))),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 1, 2, 3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        prefix_ids=tuple(draw(st.one_of(st.just([]), st.lists(few, max_size=4)))),
        **texts.patterns(),  # type: ignore[arg-type]
    )
    drawn = {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in fixed.items()}
    model = RandomModel(draw(st.integers(0, 999)), vocabulary, spread=draw(st.sampled_from([0.5, 2.0])))
    return Slow(model, replace(parameters, **drawn), texts, limit)  # type: ignore[arg-type]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In doubles."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def occurs_newly(texts: Sequence[bytes], before: bytes, after: bytes) -> bool:
    """Whether one of the texts ends in `after`, which follows `before`."""
    joined = before + after
    return any(joined[:end].endswith(text) for text in texts for end in range(len(before) + 1, len(joined) + 1))


@dataclass
class Slow:
    """The definitions for one request on one model."""

    model: Logits
    parameters: GenerateParameters
    texts: Texts
    limit: int

    def banned(self, new: list[int], id: int) -> bool:
        """Whether the token must not come after these new ones."""
        p, history = self.parameters, [BOS, *self.parameters.prefix_ids, *new, id]
        size = p.no_repeat_ngram_size
        ngrams = [tuple(history[start : start + size]) for start in range(len(history) - size + 1)] if size else []
        before = self.texts.joined([*p.prefix_ids, *new])
        return (
            id in (PAD, BOS)
            or (id == EOS and len(new) < p.min_new_tokens)
            or (bool(ngrams) and ngrams[-1] in ngrams[:-1])
            or occurs_newly(self.texts.suppress, before, self.texts.spelling[id])
        )

    def scores(self, new: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of every token what a search thinks of it, -inf if it is banned, and its log-probability."""
        history = [BOS, *self.parameters.prefix_ids, *new]
        logits = self.model(history)
        log_probabilities = log_softmax(logits)
        scores = log_probabilities.copy() if self.parameters.num_beams > 1 else logits.astype(np.float64)
        for id in set(history):
            penalty = self.parameters.repetition_penalty
            scores[id] = scores[id] * penalty if scores[id] < 0 else scores[id] / penalty
        for id in range(len(scores)):
            if self.banned(new, id):
                scores[id] = -np.inf
        return scores, log_probabilities

    def over(self, new: list[int]) -> str | None:
        """Why a text ends with its last token, None if it does not."""
        text = self.texts.joined(new)
        if new[-1] == EOS or any(stop in text for stop in self.texts.stop):
            return "stop"
        return "length" if len(new) >= self.limit else None

    def result(self, new: list[int], reason: str) -> Result:
        """With the model's own log-probabilities."""
        values = [float(self.scores(new[:place])[1][id]) for place, id in enumerate(new)]
        return Result(new, values, reason)  # type: ignore[arg-type]

    def greedy(self, beginning: Sequence[int] = ()) -> Result:
        """The best token at each step."""
        new = list(beginning)
        while not new or self.over(new) is None:
            scores, _ = self.scores(new)
            if scores.max() == -np.inf:
                return self.result(new, "stop")
            new.append(int(scores.argmax()))
        return self.result(new, str(self.over(new)))

    def beams(self, beginning: Sequence[int] = ()) -> list[tuple[float, Result]]:
        """`num_beams` best endings with their ranking; tables of running and of finished beams, as Hugging Face's."""
        p, width = self.parameters, self.parameters.num_beams
        score = sum(float(self.scores(list(beginning[:place]))[0][id]) for place, id in enumerate(beginning))
        running = [(score, list(beginning))]
        finished: list[tuple[float, list[int], str]] = []
        length = len(beginning)
        while True:
            length += 1
            every = []
            for total, new in running:
                scores, _ = self.scores(new)
                every += [(total + float(scores[id]), [*new, id]) for id in np.flatnonzero(scores > -np.inf).tolist()]
            if not every:
                finished += [(total / len(new) ** p.length_penalty, new, "stop") for total, new in running if new]
                break
            every.sort(key=lambda entry: -entry[0])
            top = [(total, new, self.over(new)) for total, new in every[: 2 * width]]
            just = [(total / length**p.length_penalty, new, over) for total, new, over in top[:width] if over]
            finished = sorted([*finished, *just], key=lambda entry: -entry[0])[:width]
            running = [(total, new) for total, new, over in top if not over][:width]
            if not running:
                break
            if len(finished) == width:
                if p.early_stopping is True:
                    break
                hypothetical = self.limit if p.early_stopping == "never" and p.length_penalty > 0 else length
                if not running[0][0] / hypothetical**p.length_penalty > finished[-1][0]:
                    break
        finished = sorted(finished, key=lambda entry: -entry[0])
        if not finished:
            return [(0.0, self.result([], "stop"))]
        return [(ranking, self.result(new, reason)) for ranking, new, reason in finished[:width]]

    def answer(self) -> list[Result]:
        """What the request gets, without sampling."""
        p = self.parameters
        if not p.return_alternatives:
            return (
                [result for _, result in self.beams()][: p.num_return_sequences] if p.num_beams > 1 else [self.greedy()]
            )
        scores, _ = self.scores([])
        firsts = [id for id in np.argsort(-scores, kind="stable").tolist() if scores[id] > -np.inf]
        answers = []
        for id in firsts[: p.num_return_sequences]:
            if over := self.over([id]):
                answers.append(self.result([id], over))
            else:
                answers.append(self.beams([id])[0][1] if p.num_beams > 1 else self.greedy([id]))
        return answers or [self.result([], "stop")]


@dataclass
class Journey:
    """What a search gave, and what it said on the way."""

    results: list[Result]
    told: dict[int, list[tuple[int, float]]]
    """Of each result the tokens that were called certain, with their log-probabilities."""
    rows: list[int]
    """Rows before each step."""


def follow(search: Search, model: Logits, *, more: int = 0, steps: int | None = None) -> Journey:
    """Take a search through steps of the model, each row with the text that its parents gave it.

    `more` candidates than asked are given, as in a batch with others. Ends when it is done, or after `steps`.
    """
    targets = [[BOS]]
    journey = Journey([], {}, [])
    while not search.done and (steps is None or len(journey.rows) < steps):
        logits = np.stack([model(target) for target in targets])
        values = np.stack([log_softmax(row) for row in logits])
        values[:, [PAD, BOS]] = -np.inf
        k, wants_logits = min(search.k + more, values.shape[1]), search.wants_logits
        ids = np.argsort(-values, axis=1, kind="stable")[:, :k]
        candidates = np.take_along_axis(values, ids, axis=1).tolist()
        journey.rows.append(len(targets))
        parents = search.advance(Outlook(ids.tolist(), candidates, logits if wants_logits else None))
        for result, id, value in search.certain():
            journey.told.setdefault(result, []).append((id, value))
        if not search.done:
            assert len(parents) == len(search.last_ids)
            targets = [[*targets[parent], id] for parent, id in zip(parents, search.last_ids, strict=True)]
    journey.results = search.results()
    return journey


def is_told(journey: Journey, number: int) -> list[tuple[int, float]]:
    """What was called certain of a result, which has to be its beginning."""
    told, result = journey.told.get(number, []), journey.results[number]
    assert told == list(zip(result.ids, result.log_probabilities, strict=True))[: len(told)]
    return told

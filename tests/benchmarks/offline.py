"""Whole files: `transduce translate`, CTranslate2's `translate_batch` and `transformers`, in alternating rounds.

Each engine has a process of its own, which is idle while another is measured. CTranslate2 runs with the fastest of its
instruction sets, thread splits and batch sizes, found by a sweep on the same texts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from tests.benchmarks.workload import Subject

CTRANSLATE2_SETS: tuple[dict[str, str], ...] = ({}, {"CT2_FORCE_CPU_ISA": "AVX512"})
"""Environments: what it chooses by itself (AVX2 on an AMD processor), and what it can be made to use. Its other
backend, MKL, is eight times slower on such a processor."""

PINNED = {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "ACTIVE"}
"""Without these its OpenMP threads wait long for one another; with them replicas would share one core."""


@dataclass(frozen=True)
class Way:
    """How CTranslate2 is run."""

    environment: dict[str, str]
    options: dict[str, Any]

    def __str__(self) -> str:
        threads = f"{self.options['inter_threads']}x{self.options['intra_threads']}"
        size = f"{self.options['max_batch_size']} {self.options['batch_type']}"
        return f"{self.environment.get('CT2_FORCE_CPU_ISA', 'its own choice')}, {threads} threads, batches of {size}"


def ways(processors: int) -> list[Way]:
    """All that are tried: `processors` replicas of one thread, or one of as many threads."""
    found = []
    for environment in CTRANSLATE2_SETS:
        for size, kind in ((32, "examples"), (64, "examples"), (128, "examples"), (512, "tokens"), (1024, "tokens")):
            options = {"inter_threads": processors, "intra_threads": 1, "max_batch_size": size, "batch_type": kind}
            found.append(Way(environment, options))
    options = {"inter_threads": 1, "intra_threads": processors, "max_batch_size": 128, "batch_type": "examples"}
    return [*found, Way({**CTRANSLATE2_SETS[-1], **PINNED}, options)]


def alike(way: Way, other: Way) -> bool:
    """Whether they differ in their batches alone."""
    batches = {"max_batch_size": 0, "batch_type": ""}
    return way.environment == other.environment and way.options | batches == other.options | batches


class Worker:
    """A process of offline_worker. Used as a context."""

    def __init__(self, engine: str, *files: object, environment: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", "tests.benchmarks.offline_worker", engine, *map(str, files)]
        self._environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"} | (environment or {})

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        self._answer()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def translate(self, texts: Sequence[str], num_beams: int, **options: Any) -> tuple[float, list[str]]:
        """Seconds and answers."""
        assert self._process.stdin is not None
        task = {"texts": list(texts), "num_beams": num_beams, "options": options}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["texts"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command[2:])} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Figures:
    """One engine on one subject with one number of beams."""

    engine: str
    way: str
    texts: int
    tokens_per_second: list[float] = field(default_factory=list)
    """Of each round."""
    bleu: float | None = None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.tokens_per_second)


@dataclass
class Comparison:
    """All engines on one subject with one number of beams."""

    subject: str
    num_beams: int
    figures: dict[str, Figures]

    def ratios(self, over: str = "ctranslate2") -> list[float]:
        """Transduce over another, round by round."""
        pairs = zip(self.figures["transduce"].tokens_per_second, self.figures[over].tokens_per_second, strict=True)
        return [ours / theirs for ours, theirs in pairs]


def fastest(subject: Subject, num_beams: int, tried: Sequence[Way]) -> Way:
    """CTranslate2's best way of these."""
    texts = subject.texts
    rates: list[tuple[float, Way]] = []
    for environment in {tuple(sorted(way.environment.items())): way.environment for way in tried}.values():
        with Worker("ctranslate2", subject.ctranslate2, subject.tokenizer_file, environment=environment) as worker:
            for way in [way for way in tried if way.environment == environment]:
                worker.translate(texts[:32], num_beams, **way.options, **subject.ctranslate2_limit)
                seconds, _ = worker.translate(texts, num_beams, **way.options, **subject.ctranslate2_limit)
                rates.append((seconds, way))
                print(f"    {subject.name}, {num_beams} beams, {way}: {len(texts) / seconds:.0f} texts/s", flush=True)
    return min(rates, key=lambda pair: pair[0])[1]


def compare(subject: Subject, beams: Sequence[int], rounds: int, processors: int) -> list[Comparison]:
    """Sweep, then `rounds` rounds in which every engine has its turn at every number of beams."""
    best: dict[int, Way] = {}
    tried = ways(processors)
    for num_beams in beams:
        best[num_beams] = fastest(subject, num_beams, tried)
        # The best instruction set and threads do not depend on the beams, the best batches do.
        tried = [way for way in tried if alike(way, best[num_beams])]
    comparisons = []
    with ExitStack() as stack:
        transduce = stack.enter_context(Worker("transduce", subject.artifact))
        transformers = stack.enter_context(Worker("transformers", subject.checkpoint))
        for num_beams in beams:
            way = best[num_beams]
            files = (subject.ctranslate2, subject.tokenizer_file)
            with Worker("ctranslate2", *files, environment=way.environment) as ctranslate2:
                few = subject.texts[:: max(1, len(subject.texts) // subject.few)]
                turns = [
                    ("transduce", transduce, "as installed", subject.texts, {}),
                    ("ctranslate2", ctranslate2, str(way), subject.texts, {**way.options, **subject.ctranslate2_limit}),
                    ("transformers", transformers, "float32, batches of 64", few, {}),
                ]
                figures = {name: Figures(name, how, len(texts)) for name, _, how, texts, _ in turns}
                for _, worker, _, texts, options in turns:
                    worker.translate(texts[:64], num_beams, **options)
                for number in range(rounds):
                    # Which comes first changes from round to round.
                    for name, worker, _, texts, options in turns if number % 2 else turns[::-1]:
                        seconds, answers = worker.translate(texts, num_beams, **options)
                        figures[name].tokens_per_second.append(subject.tokens(answers) / seconds)
                        figures[name].bleu = subject.bleu(answers)
                comparisons.append(Comparison(subject.name, num_beams, figures))
                print_comparison(comparisons[-1])
    return comparisons


def print_comparison(comparison: Comparison) -> None:
    """A line for each engine."""
    for figures in comparison.figures.values():
        bleu = "" if figures.bleu is None else f", BLEU {figures.bleu:.2f}"
        print(
            f"  {comparison.subject}, {comparison.num_beams} beams, {figures.engine} ({figures.way}), "
            f"{figures.texts} texts: {figures.median:,.0f} tokens/s "
            f"({min(figures.tokens_per_second):,.0f} to {max(figures.tokens_per_second):,.0f}){bleu}",
            flush=True,
        )

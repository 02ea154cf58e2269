"""What the service's engine answers to token ids, without HTTP and threads: all requests in one running batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.artifact import Artifact
from service.core import Core
from service.runner import Runner
from service.sequence import Result, Scored
from service.settings import Settings
from service.tokenizer import Tokenizer
from tests.service.fakes import Client, Clock, make_metrics


class EngineAnswers:
    """One artifact, opened once."""

    def __init__(self, artifact: Path, max_rows: int = 32) -> None:
        loaded = Artifact.load(artifact)
        self.tokenizer = Tokenizer(loaded)
        self._runner = Runner(loaded, Settings(threads=1, provider="cpu"))
        self._max_rows = max_rows

    def results(
        self, sources: Sequence[list[int]], limit: int, each: Sequence[dict[str, Any]] | None = None, **asked: Any
    ) -> list[list[Result]]:
        """The results of each source, whose ids end with the end token. `asked` are GenerateParameters of all of them,
        `each` those of every single one."""
        core, client = self._core(), Client()
        own = each or [{}] * len(sources)
        requests = [client.generate(s, limit, **asked, **o) for s, o in zip(sources, own, strict=True)]
        core.add(requests)
        while not core.idle:
            core.iterate()
        return [client.finished(request).results for request in requests]

    def scores(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[list[float]]:
        """The log-probabilities of given targets, which end with the end token."""
        core, client = self._core(), Client()
        requests = [client.score(source, target) for source, target in zip(sources, targets, strict=True)]
        core.add(requests)
        while not core.idle:
            core.iterate()
        found = []
        for request in requests:
            event = client.last(request)
            assert isinstance(event, Scored), event
            found.append(event.log_probabilities)
        return found

    def _core(self) -> Core:
        return Core(self._runner, make_metrics(), max_rows=self._max_rows, encode_tokens=512, clock=Clock())


def ranking(result: Result, length_penalty: float) -> float:
    """The contract's score: the sum of log-probabilities / number of tokens ** length_penalty."""
    return sum(result.log_probabilities) / len(result.ids) ** length_penalty

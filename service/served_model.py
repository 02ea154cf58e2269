"""The model that a process serves: its artifact, its tokenizer, its engine, and what a request may ask of it."""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from service.artifact import Artifact
from service.call import SubmitsSequences
from service.engine import Engine, Status
from service.errors import ArtifactError, NotFound, TooLarge, Unavailable, ValidationFailed
from service.metrics import Metrics
from service.schemas import ModelCard
from service.settings import DEFAULT_MODEL, Settings
from service.tokenizer import Tokenizer

_TEXTS_PER_TURN = 32
"""Texts tokenised in one go: a refusal comes before the rest is looked at."""

_INLINE_CHARACTERS = 2000
"""Texts that are together shorter than this are tokenised on the event loop: sooner done than a thread is woken."""

_WHY_NOT_READY: dict[Status, str] = {
    "new": "the model is being loaded",
    "starting": "the model is being loaded",
    "draining": "the server is shutting down",
    "stopped": "the server is shutting down",
    "failed": "the engine has failed",
}


def load(settings: Settings) -> "ServedModel":
    """Read and verify the artifact that `settings` name; the engine is made, not started. Raises StartupError."""
    path = settings.model_path
    if settings.model == DEFAULT_MODEL and not path.exists():
        raise ArtifactError(
            f"the default artifact is not here ({path}). Pass another with --model PATH, or make one: "
            f"transduce train ..., then transduce export CHECKPOINT {path}."
        )
    artifact = Artifact.load(path, name=settings.model_name)
    metrics = Metrics(CollectorRegistry(), artifact.name)
    return ServedModel(artifact, Tokenizer(artifact), Engine(artifact, settings, metrics), metrics, settings)


class ModelEngine(SubmitsSequences, Protocol):
    """What HTTP needs of the engine; the tests have a small one of their own."""

    @property
    def status(self) -> Status:
        """Where it is in its life."""

    def start(self) -> None:
        """Start the thread; returns at once."""

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Block until ready; raises the StartupError with which starting failed."""

    def drain(self, seconds: float) -> None:
        """Accept nothing more and finish; returns at once."""

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end."""

    def stop(self) -> None:
        """End at once."""

    def describe(self) -> dict[str, object]:
        """Facts for people."""


@dataclass(frozen=True)
class ServedModel:
    """One artifact behind one engine."""

    artifact: Artifact
    tokenizer: Tokenizer
    engine: ModelEngine
    metrics: Metrics
    settings: Settings

    def require_ready(self) -> None:
        """Unavailable (503) unless the engine takes requests now."""
        if (why := _WHY_NOT_READY.get(self.engine.status)) is not None:
            raise Unavailable(f"{why}; try again in a moment")

    def require_name(self, name: str | None) -> None:
        """NotFound (404) if a request names another model."""
        if name is not None and name != self.artifact.name:
            raise NotFound(f"no such model here; this server has {self.artifact.name!r}")

    def require_input_count(self, count: int) -> None:
        """TooLarge (413) for more inputs than a call, or the whole line, can ever hold."""
        limit = min(self.settings.max_inputs, self.settings.max_queue)
        if count > limit:
            raise TooLarge(f"{count:,} inputs in one call, the limit is {limit:,}; split them over several calls")

    def max_new_tokens(self, wanted: int | None) -> int:
        """How many tokens to generate at most: what was asked, or the model's limit; ValidationFailed above that."""
        limit = self.artifact.manifest.max_target_tokens
        if wanted is not None and not 1 <= wanted <= limit:
            raise ValidationFailed(f"parameters.max_new_tokens: must be between 1 and {limit}")
        return limit if wanted is None else wanted

    def deadline(self, timeout: float | None) -> float | None:
        """The moment, on the engine's clock, at which a request that starts now has had its seconds."""
        seconds = timeout if timeout is not None else self.settings.default_timeout or None
        return None if seconds is None else time.monotonic() + seconds

    async def source_ids(self, texts: dict[int, str], *, truncate: bool) -> dict[int, list[int]]:
        """Token ids by index of input, end token included; one too long is cut or, with TooLarge, refuses the call."""
        if not truncate:
            for index, text in texts.items():
                self._refuse_if_surely_too_long(text, f"inputs[{index}]")
        sources: dict[int, list[int]] = {}
        items = list(texts.items())
        for start in range(0, len(items), _TEXTS_PER_TURN):
            turn = items[start : start + _TEXTS_PER_TURN]
            beginnings = [text[: self._longest_prefix] for _, text in turn]
            if sum(map(len, beginnings)) < _INLINE_CHARACTERS:
                found = self.tokenizer.encode_batch(beginnings)
            else:
                found = await asyncio.to_thread(self.tokenizer.encode_batch, beginnings)
            for (index, _), ids in zip(turn, found, strict=True):
                sources[index] = self._fit(ids, truncate, f"inputs[{index}]")
        return sources

    def source_ids_of(self, text: str, place: str, *, truncate: bool) -> list[int]:
        """The same for one text by itself, without an event loop; `place` is what a refusal calls it."""
        if not truncate:
            self._refuse_if_surely_too_long(text, place)
        return self._fit(self.tokenizer.encode(text[: self._longest_prefix]), truncate, place)

    def _fit(self, ids: list[int], truncate: bool, place: str) -> list[int]:
        limit = self.artifact.manifest.max_source_tokens
        if len(ids) <= limit:
            return ids
        if truncate:
            return [*ids[: limit - 1], self.tokenizer.eos_id]
        raise TooLarge(f"{place} has {len(ids):,} tokens, the limit is {limit}; split it, or ask to truncate")

    def _refuse_if_surely_too_long(self, text: str, place: str) -> None:
        """No token spells more than so many characters, so a very long text is refused without being tokenised."""
        limit = self.artifact.manifest.max_source_tokens
        if len(text) > self._longest_token * limit:
            raise TooLarge(
                f"{place} has {len(text):,} characters, at least {len(text) // self._longest_token:,} tokens, "
                f"the limit is {limit} tokens; split it, or ask to truncate"
            )

    @cached_property
    def _longest_token(self) -> int:
        vocab_size = self.artifact.manifest.vocab_size
        return max(1, *(len(self.tokenizer.token(id)) for id in range(vocab_size)))

    @property
    def _longest_prefix(self) -> int:
        """Characters that can matter when a text is cut to the limit; twice that, so that no word is cut early."""
        return 2 * self._longest_token * self.artifact.manifest.max_source_tokens

    def card(self) -> ModelCard:
        """What GET /v1/models tells of it."""
        manifest = self.artifact.manifest
        return ModelCard(
            id=self.artifact.name,
            created=_seconds(manifest.created),
            version=manifest.version,
            description=manifest.description,
            languages=manifest.languages,
            license=manifest.license,
            training_data=manifest.training_data,
            max_source_tokens=manifest.max_source_tokens,
            max_target_tokens=manifest.max_target_tokens,
            embedding_size=manifest.embedding_size,
            parity=manifest.parity,
            engine=_facts(self.engine),
        )


def _facts(engine: ModelEngine) -> dict[str, Any]:
    return {"status": engine.status, **(engine.describe() if engine.status in ("ready", "draining") else {})}


def _seconds(date: str) -> int:
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

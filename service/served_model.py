"""The model that a process serves: its artifact, its tokenizer, its engine, and what a request may ask of it."""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from service.artifact import Artifact
from service.call import SubmitsSequences
from service.controls import Limits, controls
from service.engine import Engine, Status
from service.errors import ArtifactError, SettingsError, TooLarge, Unavailable, ValidationFailed
from service.memory import Memory
from service.metrics import Families, Metrics
from service.parameters import Parameters
from service.schemas import ModelCard
from service.sequence import GenerateParameters
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
    "failing": "the model fails at whatever it is given, its self-test included; the service's log says how",
    "failed": "the engine has failed",
}


def load(settings: Settings, name: str | None, path: Path, families: Families, memory: Memory) -> "ServedModel":
    """Read and verify the artifact at `path`, to be served as `name` (None: what its manifest calls it); the engine is
    made, not started. Raises StartupError.
    """
    if str(path) == DEFAULT_MODEL and not path.exists():
        raise ArtifactError(
            f"the default artifact is not here ({path}). Pass another with --model PATH, or make one: "
            f"transduce train ..., then transduce export CHECKPOINT {path}."
        )
    artifact = Artifact.load(path, name=name)
    metrics = families.of(artifact.name)
    return ServedModel(
        artifact, Tokenizer(artifact), Engine(artifact, settings, metrics, memory=memory), metrics, settings
    )


def load_only(settings: Settings) -> "ServedModel":
    """The same of the one model that `settings` name. SettingsError if there are several."""
    if len(settings.models) > 1:
        raise SettingsError("--model: this takes one model, not several")
    return load(settings, *settings.models[0], Families(CollectorRegistry()), Memory())


class ModelEngine(SubmitsSequences, Protocol):
    """What HTTP needs of the engine; the tests have a small one of their own."""

    @property
    def status(self) -> Status:
        """Where it is in its life."""

    @property
    def rows_per_sequence(self) -> int:
        """Rows that one input may take at most."""

    def require_room(self, client: str) -> None:
        """QueueFull or Unavailable if nothing of this client would be taken now."""

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


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One artifact behind one engine: a version of a model."""

    artifact: Artifact
    tokenizer: Tokenizer
    engine: ModelEngine
    metrics: Metrics
    settings: Settings

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.artifact.name

    @property
    def version(self) -> str:
        """What the manifest says."""
        return self.artifact.manifest.version

    def require_ready(self) -> None:
        """Unavailable (503) unless the engine takes requests now."""
        if (why := _WHY_NOT_READY.get(self.engine.status)) is not None:
            raise Unavailable(f"{why}; try again in a moment")

    def require_alive(self) -> None:
        """Unavailable (503) if only a new process can be expected to help."""
        if (status := self.engine.status) in ("failing", "failed"):
            raise Unavailable(_WHY_NOT_READY[status])

    def require_room(self, client: str) -> None:
        """QueueFull (429) if there is no room in line for anything of this client: told before a body is read."""
        self.engine.require_room(client)

    def generate_parameters(self, asked: Parameters, path: str = "parameters.") -> GenerateParameters:
        """The engine's parameters; ValidationFailed for what does not fit together, or not this model and server.

        `path` is what a refusal writes before the name of a field.
        """
        manifest = self.artifact.manifest
        limits = Limits(max_target_tokens=manifest.max_target_tokens, max_rows=self.engine.rows_per_sequence)
        if len(asked.prefix) > self._longest_token * manifest.max_target_tokens:
            raise ValidationFailed(
                f"{path}prefix: has {len(asked.prefix):,} characters, "
                f"more than the model's {manifest.max_target_tokens} target tokens can spell"
            )
        prefix_ids = self.tokenizer.encode(asked.prefix)[:-1] if asked.prefix else []
        return controls(asked, prefix_ids, self.tokenizer.vocabulary, limits, path)

    def deadline(self, timeout: float | None) -> float | None:
        """The moment, on the engine's clock, at which a request that starts now has had its seconds."""
        seconds = timeout if timeout is not None else self.settings.default_timeout or None
        return None if seconds is None else time.monotonic() + seconds

    async def source_ids(self, texts: dict[int, str], *, truncate: bool) -> dict[int, list[int]]:
        """Token ids by index of input, end token included; one too long is cut or, with TooLarge, refuses the call."""
        return await self._ids(texts, "inputs", self.artifact.manifest.max_source_tokens, truncate)

    async def target_ids(self, texts: dict[int, str]) -> dict[int, list[int]]:
        """The same of targets, which are never cut."""
        return await self._ids(texts, "targets", self.artifact.manifest.max_target_tokens, truncate=False)

    def source_ids_of(self, text: str, place: str, *, truncate: bool) -> list[int]:
        """The same for one source by itself, without an event loop; `place` is what a refusal calls it."""
        limit = self.artifact.manifest.max_source_tokens
        if not truncate:
            self._refuse_if_surely_too_long(text, place, limit)
        return self._fit(self.tokenizer.encode(self._beginning(text, limit)), truncate, place, limit)

    async def _ids(self, texts: dict[int, str], name: str, limit: int, truncate: bool) -> dict[int, list[int]]:
        if not truncate:
            for index, text in texts.items():
                self._refuse_if_surely_too_long(text, f"{name}[{index}]", limit)
        found: dict[int, list[int]] = {}
        items = list(texts.items())
        for start in range(0, len(items), _TEXTS_PER_TURN):
            turn = items[start : start + _TEXTS_PER_TURN]
            beginnings = [self._beginning(text, limit) for _, text in turn]
            if sum(map(len, beginnings)) < _INLINE_CHARACTERS:
                encoded = list(map(self.tokenizer.encode, beginnings))
            else:
                encoded = await asyncio.to_thread(self.tokenizer.encode_batch, beginnings)
            for (index, _), ids in zip(turn, encoded, strict=True):
                found[index] = self._fit(ids, truncate, f"{name}[{index}]", limit)
        return found

    def _fit(self, ids: list[int], truncate: bool, place: str, limit: int) -> list[int]:
        if len(ids) <= limit:
            return ids
        if truncate:
            return [*ids[: limit - 1], self.tokenizer.eos_id]
        raise TooLarge(f"{place} has {len(ids):,} tokens, the limit is {limit}; {_remedy(place)}")

    def _refuse_if_surely_too_long(self, text: str, place: str, limit: int) -> None:
        """No token spells more than so many characters, so a very long text is refused without being tokenised."""
        if len(text) > self._longest_token * limit:
            raise TooLarge(
                f"{place} has {len(text):,} characters, at least {len(text) // self._longest_token:,} tokens, "
                f"the limit is {limit} tokens; {_remedy(place)}"
            )

    @cached_property
    def _longest_token(self) -> int:
        vocab_size = self.artifact.manifest.vocab_size
        return max(1, *(len(self.tokenizer.token(id)) for id in range(vocab_size)))

    def _beginning(self, text: str, limit: int) -> str:
        """What can matter when a text is cut to the limit; twice that, so that no word is cut early."""
        return text[: 2 * self._longest_token * limit]

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


def _remedy(place: str) -> str:
    return "split the pair" if place.startswith("targets") else "split it, or ask to truncate"


def _facts(engine: ModelEngine) -> dict[str, Any]:
    return {"status": engine.status, **(engine.describe() if engine.status in ("ready", "draining") else {})}


def _seconds(date: str) -> int:
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

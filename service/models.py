"""The models of a process, by name: which version of each answers now, and how another takes its place.

A new version is read, verified and warmed beside the one that serves; then it takes its place, and the old one
finishes what it has taken. Who is about to ask a model something borrows it, and what is borrowed is not shut. Used on
the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.engine import Status
from service.errors import (
    Conflict,
    NotFound,
    RequestError,
    SettingsError,
    StartupError,
    TooLarge,
    Unavailable,
    ValidationFailed,
)
from service.memory import Memory, give_back
from service.metrics import Families, Metrics
from service.served_model import ServedModel, load
from service.settings import Settings

log = logging.getLogger("transduce.models")

_LOOK_SECONDS = 1.0
"""Waiting for an engine is done in turns of so long: a thread that waits for good would keep a process from ending."""

_WORST_FIRST: tuple[Status, ...] = ("failed", "new", "starting", "failing", "draining", "ready", "stopped")

Load = Callable[[str, Path], ServedModel]


class Models:
    """At least one model. The first is the one that answers where a request names none."""

    def __init__(
        self, first: Sequence[ServedModel], load_version: Load | None = None, memory: Memory | None = None
    ) -> None:
        """`load_version` makes, and does not start, another version of a name. SettingsError if a name comes twice."""
        self.settings: Settings = first[0].settings
        self.families: Families = first[0].metrics.families
        self.registry = self.families.registry
        self._load_version = load_version
        self._memory = memory or Memory()
        self._served: dict[str, ServedModel] = {}
        for model in first:
            if model.name in self._served:
                raise SettingsError(
                    f"--model: two models are called {model.name!r}; give one another name, with --model NAME=PATH"
                )
            self._served[model.name] = model
        self._default = first[0].name
        self._places = {model.name: model.artifact.path.resolve().parent for model in first}
        self._borrowed: Counter[ServedModel] = Counter()
        self._returned = asyncio.Event()
        self._loading: set[str] = set()
        self._leaving: dict[ServedModel, asyncio.Task[None]] = {}
        self._over = False

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._served.values())

    # ---- who answers ----

    def named(self, name: str | None) -> ServedModel:
        """The version of a model that answers now. NotFound (404) with the names there are."""
        if (model := self._served.get(self._default if name is None else name)) is None:
            names = ", ".join(map(repr, self._served))
            raise NotFound(f"no such model here; this server has {names}")
        return model

    @contextlib.contextmanager
    def borrow(self, name: str | None) -> Iterator[ServedModel]:
        """The same, and it goes on taking sequences until it is given back. Unavailable if it takes none now."""
        model = self.named(name)
        model.require_ready()
        self._borrowed[model] += 1
        try:
            yield model
        finally:
            self._borrowed[model] -= 1
            if not self._borrowed[model]:
                del self._borrowed[model]
                self._returned.set()

    def require_room(self, client: str) -> None:
        """Unavailable (503) or QueueFull (429) if no model here would take anything of this client now."""
        refusals: list[RequestError] = []
        for model in self:
            try:
                model.require_ready()
                model.require_room(client)
            except RequestError as error:
                refusals.append(error)
            else:
                return
        raise refusals[0]

    def require_input_count(self, count: int) -> None:
        """TooLarge (413) for more inputs than a call, or the whole line, can ever hold."""
        limit = min(self.settings.max_inputs, self.settings.max_queue)
        if count > limit:
            raise TooLarge(f"{count:,} inputs in one call, the limit is {limit:,}; split them over several calls")

    def metrics(self, name: str | None) -> Metrics:
        """Those of a model; of the first where none is named: what concerns no model is counted with it."""
        return self._served[self._default if name is None else name].metrics

    def require_ready(self) -> None:
        """Unavailable (503) unless every model takes requests."""
        for model in self:
            model.require_ready()

    def require_alive(self) -> None:
        """Unavailable (503) if only a new process can be expected to help."""
        for model in self:
            model.require_alive()

    # ---- the life of the process ----

    @property
    def status(self) -> Status:
        """Where they are in their lives: the one that is furthest from serving."""
        return min((model.engine.status for model in self), key=_WORST_FIRST.index)

    def start(self) -> None:
        """Open all of them at the same time. Returns at once."""
        for model in self:
            model.engine.start()

    async def wait_ready(self) -> None:
        """Until all are ready. Raises the StartupError with which starting one failed."""
        for model in self:
            await _ready(model)
            model.metrics.serve_version(model.version)
            model.metrics.count_load("served")

    def drain(self, seconds: float) -> None:
        """Accept nothing more and finish; returns at once."""
        self._over = True
        for model in [*self, *self._leaving]:
            model.engine.drain(seconds)

    async def join(self, seconds: float) -> bool:
        """Wait for the end; False if the time ran out."""
        end = time.monotonic() + seconds
        ended = [
            await asyncio.to_thread(model.engine.join, max(0.0, end - time.monotonic()))
            for model in [*self, *self._leaving]
        ]
        return all(ended)

    @property
    def ended(self) -> bool:
        """Whether no engine has a thread any more."""
        return all(model.engine.join(0) for model in [*self, *self._leaving])

    async def stop(self) -> None:
        """End at once."""
        self._over = True
        for task in self._leaving.values():
            task.cancel()
        for model in [*self, *self._leaving]:
            await asyncio.to_thread(model.engine.stop)

    # ---- versions ----

    async def replace(self, name: str, path: str | None) -> ServedModel:
        """Serve another version of a model: what lies at `path`, or anew what lies where the one that serves came
        from.

        `path` is relative to the directory in which the first version lies, and may not lead out of it. Raises
        NotFound, Conflict (one is being loaded), Unavailable (loading, draining), or ValidationFailed for a version
        that cannot be served: the other then stays.
        """
        old = self.named(name)
        assert self._load_version is not None
        place = old.artifact.path if path is None else _within(self._places[name], path)
        if old.engine.status != "failing":
            old.require_ready()
        if name in self._loading:
            raise Conflict(f"another version of {name} is being loaded; try again when it serves")
        self._loading.add(name)
        try:
            new = await asyncio.to_thread(self._load_version, name, place)
            log.info("loading model=%s version=%s, beside version=%s", name, new.version, old.version)
            new.engine.start()
            try:
                await _ready(new)
            except BaseException:
                await asyncio.to_thread(new.engine.stop)
                raise
        except StartupError as error:
            old.metrics.count_load("refused")
            log.error("refused model=%s: %s; version=%s goes on serving", name, error, old.version)
            self._tidy_up()
            raise ValidationFailed(f"path: {error} Version {old.version!r} goes on serving.") from None
        finally:
            self._loading.discard(name)
        if self._over:
            await asyncio.to_thread(new.engine.stop)
            raise Unavailable("the server is shutting down")
        self._served[name] = new
        new.metrics.serve_version(new.version)
        new.metrics.count_load("served")
        log.info("serving model=%s version=%s, in place of version=%s", name, new.version, old.version)
        self._leaving[old] = asyncio.create_task(self._let_go(old))
        return new

    async def _let_go(self, old: ServedModel) -> None:
        """Have an old version finish what it has taken, or is about to be given, and forget it."""
        seconds = self.settings.drain_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._borrowed[old]:
                    self._returned.clear()
                    await self._returned.wait()
        old.engine.drain(seconds)
        if not await asyncio.to_thread(old.engine.join, seconds + _LOOK_SECONDS):
            log.warning("model=%s version=%s did not end in time", old.name, old.version)
        del self._leaving[old]
        self._memory.release(old.engine)
        self._tidy_up()
        log.info("gone model=%s version=%s", old.name, old.version)

    def _tidy_up(self) -> None:
        """Give back what a version held, in a moment: then nobody refers to it any more."""
        loop = asyncio.get_running_loop()
        loop.call_later(_LOOK_SECONDS, loop.run_in_executor, None, give_back)


async def _ready(model: ServedModel) -> None:
    while not await asyncio.to_thread(model.engine.wait_ready, _LOOK_SECONDS):
        pass


def _within(place: Path, path: str) -> Path:
    """The path, taken from `place`. ValidationFailed if it leads out of it, by links either."""
    found = (place / path).resolve()
    if not found.is_relative_to(place):
        raise ValidationFailed(f"path: leads out of {place}, in which the versions of this model lie")
    return found


def load_all(settings: Settings) -> Models:
    """Read and verify the artifacts that `settings` name; the engines are made, not started. Raises StartupError."""
    families, memory = Families(CollectorRegistry()), Memory()
    first = [load(settings, name, path, families, memory) for name, path in settings.models]
    return Models(first, lambda name, path: load(settings, name, path, families, memory), memory)

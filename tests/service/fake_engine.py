"""A model without a model, for the tests of HTTP: an engine that says every text back, and a tokenizer of bytes."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from service.detokenizer import Detokenizer
from service.errors import EngineFailure, QueueFull, Unavailable
from service.metrics import Families
from service.models import Models
from service.patterns import Vocabulary
from service.sequence import Encoded, Failed, Finished, GenerateParameters, Result, Scored, Sequence, Timings, Token
from service.served_model import ServedModel
from service.settings import Settings

EOS = 2
TIMINGS = Timings(0.0, 0.0, 0.0)
POISON = "poison"
"""A text on which the fake model fails."""


class ByteTokenizer:
    """A token is a byte; ids from 3 on, as after pad, bos and eos."""

    eos_id = EOS
    table = (b"", b"", b"", *(bytes([byte]) for byte in range(256)))
    vocabulary = Vocabulary(list(table))

    def encode(self, text: str) -> list[int]:
        return [*(byte + 3 for byte in text.encode(errors="replace")), EOS]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.table[id] for id in ids).decode(errors="replace")

    def token(self, id: int) -> str:
        return self.table[id].decode(errors="replace")

    def detokenizer(self, prefix: str = "", stop: Any = ()) -> Detokenizer:
        return Detokenizer(list(self.table), prefix, [text.encode() for text in stop])


class _Echo:
    """One sequence under way. Its result j is the source without its first j tokens, each of them -0.5 - j / 10."""

    def __init__(self, sequence: Sequence) -> None:
        assert sequence.parameters is not None
        self.sequence, self.parameters = sequence, sequence.parameters
        source = sequence.source_ids
        self.steps = 0
        self.told = 0
        self.wanted = [source[min(j, len(source) - 1) :] for j in range(self.parameters.num_return_sequences)]
        self.results = [self._cut(ids, self.parameters) for ids in self.wanted]

    def _cut(self, ids: list[int], parameters: GenerateParameters) -> tuple[list[int], Any]:
        before = b""
        for count, id in enumerate(ids[: parameters.max_new_tokens], 1):
            if id == EOS or (parameters.stop is not None and parameters.stop.completed_by(before, id)):
                return ids[:count], "stop"
            before += ByteTokenizer.table[id]
        return ids[: parameters.max_new_tokens], "length"

    def step(self) -> bool:
        """Whether that was the last one."""
        self.steps += 1
        if self.sequence.stream:
            self._tell()
        return self.steps >= max(len(ids) for ids, _ in self.results)

    def _tell(self) -> None:
        """Each result's next token; with beams the best one's alone, three steps late, as they may still differ."""
        with_beams = self.parameters.num_beams > 1
        place = self.steps - (4 if with_beams else 1)
        for j, (ids, _) in enumerate(self.results[:1] if with_beams else self.results):
            if 0 <= place < len(ids):
                self.sequence.on_event(Token(ids[place], -0.5 - j / 10, j))

    def finished(self, *, late: bool = False) -> Finished:
        results = []
        for j, (ids, reason) in enumerate(self.results):
            taken = ids[: self.steps] if late else ids
            alignment = None
            if self.parameters.return_alignments:
                alignment = np.full((len(taken), len(self.sequence.source_ids)), 1 / len(self.sequence.source_ids))
            results.append(
                Result(
                    list(taken),
                    [-0.5 - j / 10] * len(taken),
                    "timeout" if late else reason,
                    None if alignment is None else alignment.astype(np.float32),
                )
            )
        return Finished(results, TIMINGS)


class FakeEngine:
    """Echoes: the answer's ids are the source's, a token a step, on a thread of its own.

    `may_load` and `may_work` are gates that a test can close: loading, or every step, then waits.
    """

    def __init__(self, step_seconds: float = 0.0, room: int = 4096) -> None:
        self.status: Any = "ready"
        self.step_seconds = step_seconds
        self.may_load, self.may_work = threading.Event(), threading.Event()
        self.may_load.set()
        self.may_work.set()
        self.room = room
        self.rows_per_sequence = 16
        self.open: list[Sequence] = []
        self.cancelled: list[Sequence] = []
        self.received: list[Sequence] = []
        self.refuse_with: Any = None
        self._ready = threading.Event()
        self._lock = threading.Lock()

    @property
    def submitted(self) -> int:
        return len(self.received)

    @property
    def parameters(self) -> GenerateParameters:
        """Of the last sequence that came."""
        parameters = self.received[-1].parameters
        assert parameters is not None
        return parameters

    def submit(self, sequences: list[Sequence]) -> None:
        if self.status != "ready":
            raise Unavailable("not now")
        if self.refuse_with is not None:
            raise self.refuse_with
        if len(self.open) + len(sequences) > self.room:
            raise QueueFull("the line is full")
        self.received += sequences
        with self._lock:
            self.open += sequences
        threading.Thread(target=self._work, args=(sequences,), daemon=True).start()

    def require_room(self, client: str) -> None:
        if len(self.open) >= self.room:
            raise QueueFull("the line is full")

    def cancel(self, sequences: list[Sequence]) -> None:
        self.cancelled += sequences
        with self._lock:
            self.open = [one for one in self.open if one not in sequences]

    def _work(self, sequences: list[Sequence]) -> None:
        running = {id(one): _Echo(one) if one.kind == "generate" else None for one in sequences}
        while running:
            self.may_work.wait()
            if self.step_seconds:
                time.sleep(self.step_seconds)
            for one in sequences:
                if id(one) in running and (one not in self.open or self._step(one, running[id(one)])):
                    del running[id(one)]
                    with self._lock:
                        self.open = [other for other in self.open if other is not one]

    def _step(self, one: Sequence, echo: _Echo | None) -> bool:
        """Whether that was its last step."""
        if one.kind == "score":
            assert one.target_ids is not None
            one.on_event(Scored([-0.25] * len(one.target_ids), TIMINGS))
            return True
        if echo is None:
            rows = np.asarray(one.source_ids, dtype=np.float32)
            one.on_event(Encoded(np.stack([rows, rows * 2, -rows, rows * 0], axis=1), TIMINGS))
            return True
        if one.deadline is not None and echo.steps and time.monotonic() > one.deadline:
            one.on_event(echo.finished(late=True))
            return True
        if ByteTokenizer().decode(one.source_ids).startswith(POISON) and echo.steps >= len(POISON) - 1:
            one.on_event(Failed(EngineFailure("the model failed on this request")))
            return True
        if echo.step():
            one.on_event(echo.finished())
            return True
        return False

    def start(self) -> None:
        self.status = "starting"

        def load() -> None:
            self.may_load.wait()
            self.status = "ready"
            self._ready.set()

        threading.Thread(target=load, daemon=True).start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        return self._ready.wait(timeout)

    def drain(self, seconds: float) -> None:
        self.status = "draining"
        self._drained_by = time.monotonic() + seconds

    def join(self, timeout: float | None = None) -> bool:
        while self.open and time.monotonic() < self._drained_by:
            time.sleep(0.01)
        left, self.open = self.open, []
        for one in left:
            one.on_event(Failed(Unavailable("the service stopped")))
        self.status = "stopped"
        return True

    def stop(self) -> None:
        self.status = "stopped"

    def describe(self) -> dict[str, object]:
        return {"provider": "fake", "open": len(self.open)}


def fake_model(engine: FakeEngine | None = None, **settings: Any) -> ServedModel:
    """A served model of such parts: sources up to 64 tokens, answers up to 48, vectors of 4 numbers."""
    manifest = SimpleNamespace(
        version="1", description="echo", languages={}, license="none", training_data="none", created="2026-11-23",
        max_source_tokens=64, max_target_tokens=48, embedding_size=4, vocab_size=259, parity={},
        labels=["a", "b", "c", "d"],
    )  # fmt: skip
    artifact: Any = SimpleNamespace(name="echo", manifest=manifest, path=Path("/nowhere/echo"))
    tokenizer: Any = ByteTokenizer()
    metrics = Families(CollectorRegistry()).of("echo")
    return ServedModel(artifact, tokenizer, engine or FakeEngine(), metrics, Settings(**settings))


def fake_models(engine: FakeEngine | None = None, **settings: Any) -> Models:
    """A server's only model, such a one."""
    return Models([fake_model(engine, **settings)])

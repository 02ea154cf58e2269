"""A model without a model, for the tests of HTTP: an engine that says every text back, and a tokenizer of bytes."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from service.errors import EngineFailure, QueueFull, Unavailable
from service.metrics import Metrics
from service.sequence import Encoded, Failed, Finished, Sequence, Timings, Token
from service.served_model import ServedModel
from service.settings import Settings
from service.tokenizer import Detokenizer

EOS = 2
TIMINGS = Timings(0.0, 0.0, 0.0)
POISON = "poison"
"""A text on which the fake model fails."""


class ByteTokenizer:
    """A token is a byte; ids from 3 on, as after pad, bos and eos."""

    eos_id = EOS
    table = (b"", b"", b"", *(bytes([byte]) for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return [*(byte + 3 for byte in text.encode()), EOS]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.table[id] for id in ids).decode(errors="replace")

    def token(self, id: int) -> str:
        return self.table[id].decode(errors="replace")

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(list(self.table))


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
        self.open: list[Sequence] = []
        self.cancelled: list[Sequence] = []
        self.submitted = 0
        self._ready = threading.Event()
        self._lock = threading.Lock()

    def submit(self, sequences: list[Sequence]) -> None:
        if self.status != "ready":
            raise Unavailable("not now")
        if len(self.open) + len(sequences) > self.room:
            raise QueueFull("the line is full")
        self.submitted += len(sequences)
        with self._lock:
            self.open += sequences
        threading.Thread(target=self._work, args=(sequences,), daemon=True).start()

    def cancel(self, sequences: list[Sequence]) -> None:
        self.cancelled += sequences
        with self._lock:
            self.open = [one for one in self.open if one not in sequences]

    def _work(self, sequences: list[Sequence]) -> None:
        running = {id(one): 0 for one in sequences}
        while running:
            self.may_work.wait()
            if self.step_seconds:
                time.sleep(self.step_seconds)
            for one in sequences:
                if id(one) in running and (one not in self.open or self._step(one, running)):
                    del running[id(one)]
                    with self._lock:
                        self.open = [other for other in self.open if other is not one]

    def _step(self, one: Sequence, running: dict[int, int]) -> bool:
        """Whether that was its last step."""
        if one.deadline is not None and running[id(one)] and time.monotonic() > one.deadline:
            one.on_event(Finished("timeout", one.source_ids[: running[id(one)]], [-0.5] * running[id(one)], TIMINGS))
            return True
        if ByteTokenizer().decode(one.source_ids).startswith(POISON) and running[id(one)] >= len(POISON) - 1:
            one.on_event(Failed(EngineFailure("the model failed on this request")))
            return True
        if one.kind == "encode":
            rows = np.asarray(one.source_ids, dtype=np.float32)
            one.on_event(Encoded(np.stack([rows, rows * 2, -rows, rows * 0], axis=1), TIMINGS))
            return True
        step = running[id(one)]
        assert one.parameters is not None
        if one.stream:
            one.on_event(Token(one.source_ids[step], -0.5))
        running[id(one)] = made = step + 1
        if one.source_ids[step] == EOS or made == one.parameters.max_new_tokens:
            reason: Any = "stop" if one.source_ids[step] == EOS else "length"
            one.on_event(Finished(reason, one.source_ids[:made], [-0.5] * made, TIMINGS))
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
    )  # fmt: skip
    artifact: Any = SimpleNamespace(name="echo", manifest=manifest)
    tokenizer: Any = ByteTokenizer()
    metrics = Metrics(CollectorRegistry(), "echo")
    return ServedModel(artifact, tokenizer, engine or FakeEngine(), metrics, Settings(**settings))

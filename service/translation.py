"""Translation of a stream of lines through the engine: as many lines out as in, in order, in bounded memory.

A reader thread takes lines from the input, no more than a window ahead of what was written; the main thread hands them
to the engine as they come, all that have come at once, and yields answers in order. The window is wide, so that the
engine always finds lines to fill its rows with; what is kept of a line in it is token ids. Lines that come slowly (a
terminal, a pipe) are answered one by one.

The main thread shares the interpreter's lock with the engine's threads. So it sleeps until the line that is next to be
written is answered, however many behind it are answered before.
"""

import enum
import queue
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from service.errors import RequestError, TransduceError
from service.lines import Line, as_one_line, read_lines
from service.parameters import Parameters
from service.sequence import Event, Failed, Finished, Sequence
from service.served_model import ServedModel

WINDOW = 4096
"""Lines that are read ahead of what was written at most."""

_UNSEEN = 64
"""Lines that are read ahead of what was tokenised at most: each may be long."""


class _Wake(enum.Enum):
    """What wakes the main thread besides lines."""

    ANSWER = enum.auto()
    """The line that it waits for."""
    END = enum.auto()
    """Of the input."""


class LineFailed(TransduceError):
    """A line cannot be translated; the message begins with its number."""


class Translation:
    """One run over one input. Not thread-safe; used once."""

    def __init__(self, model: ServedModel, asked: Parameters) -> None:
        """ValidationFailed for parameters that do not fit; it names them as flags."""
        self._model = model
        self._truncate = asked.truncate
        self._parameters = model.generate_parameters(asked, path="--")
        prefix = model.tokenizer.decode(self._parameters.prefix_ids)
        self._detokenizer = model.tokenizer.detokenizer(prefix, asked.stop)
        self._room = threading.Semaphore(min(WINDOW, model.settings.max_queue))
        self._unseen = threading.Semaphore(_UNSEEN)
        # What wakes the main thread; an exception is the failure that ended the input.
        self._inbox: queue.SimpleQueue[Line | _Wake | BaseException] = queue.SimpleQueue()
        self._ended = False  # whether all lines have come
        self._events: deque[tuple[int, Event]] = deque()  # from the engine's threads
        self._next_number = 1  # the line that is to be written; written by the main thread
        self._answers: dict[int, str | LineFailed] = {}

    def run(self, stream: BinaryIO) -> Iterator[str]:
        """The translation of each line of `stream`, in order. LineFailed in the place of one that cannot be had."""
        threading.Thread(target=self._read, args=(stream,), name="lines", daemon=True).start()
        last_number = 0
        while not self._ended or self._next_number <= last_number:
            if lines := list(self._lines()):
                self._submit(lines)
                last_number = lines[-1].number
                self._unseen.release(len(lines))
            # Which line is next is known before the events are looked at: one that comes later wakes the main thread.
            while self._take_events() or self._next_number in self._answers:
                while (answer := self._answers.pop(self._next_number, None)) is not None:
                    if isinstance(answer, LineFailed):
                        raise answer
                    yield answer
                    self._room.release()
                    self._next_number += 1

    def _read(self, stream: BinaryIO) -> None:
        try:
            for line in read_lines(stream):
                self._room.acquire()
                self._unseen.acquire()
                self._inbox.put(line)
            self._inbox.put(_Wake.END)
        except BaseException as error:  # told to the main thread, whatever it is
            self._inbox.put(error)

    def _lines(self) -> Iterator[Line]:
        """Those that have come: waits for the first message, does not wait for more."""
        message = self._inbox.get()
        while True:
            if isinstance(message, BaseException):
                raise message
            if message is _Wake.END:
                self._ended = True
            if isinstance(message, Line):
                yield message
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _submit(self, lines: list[Line]) -> None:
        """The longest first: so lines of like length are encoded together, and no long one is left for the end."""
        sequences: dict[int, Sequence] = {}
        for line in lines:
            number, place = line.number, f"line {line.number}"
            if not line.text or line.text.isspace():
                self._answers[number] = ""
                continue
            if line.cut and not self._truncate:
                self._answers[number] = LineFailed(
                    f"{place} is longer than any model takes; split it, or pass --truncate"
                )
                continue
            try:
                ids = self._model.source_ids_of(line.text, place, truncate=self._truncate)
            except RequestError as error:
                self._answers[number] = LineFailed(str(error))
                continue
            sequences[number] = Sequence(ids, partial(self._tell, number), parameters=self._parameters)
        try:
            by_length = sorted(sequences.values(), key=lambda sequence: len(sequence.source_ids), reverse=True)
            self._model.engine.submit(by_length)
        except RequestError as error:
            self._answers.update({number: LineFailed(f"line {number}: {error}") for number in sequences})

    def _tell(self, number: int, event: Event) -> None:
        """On one of the engine's threads."""
        self._events.append((number, event))
        if number == self._next_number:
            self._inbox.put(_Wake.ANSWER)

    def _take_events(self) -> bool:
        """Answers of what the engine has told; whether there was any."""
        any_taken = bool(self._events)
        while self._events:
            number, event = self._events.popleft()
            if isinstance(event, Failed):
                self._answers[number] = LineFailed(f"line {number}: {event.error}")
            if isinstance(event, Finished):
                self._answers[number] = as_one_line(self._detokenizer.text(event.results[0].ids))
        return any_taken

"""Translation of a stream of lines through the engine: as many lines out as in, in order, in bounded memory.

A reader thread takes lines from the input, no more than a window ahead of what was written; the main thread hands them
to the engine as they come and yields answers in order. Lines that come slowly (a terminal, a pipe) are answered one by
one.
"""

import queue
import threading
from collections.abc import Iterator
from typing import BinaryIO

from service.errors import RequestError, TransduceError
from service.lines import Line, as_one_line, read_lines
from service.sequence import Event, Failed, Finished, GenerateParameters, Sequence
from service.served_model import ServedModel


class LineFailed(TransduceError):
    """A line cannot be translated; the message begins with its number."""


class Translation:
    """One run over one input. Not thread-safe; used once."""

    def __init__(self, model: ServedModel, *, truncate: bool, max_new_tokens: int | None = None) -> None:
        self._model = model
        self._truncate = truncate
        self._parameters = GenerateParameters(model.max_new_tokens(max_new_tokens))
        window = min(max(256, 4 * model.settings.max_rows), model.settings.max_queue)
        self._room = threading.Semaphore(window)
        # What the reader thread and the engine's thread tell the main thread. None: the input has ended.
        self._inbox: queue.SimpleQueue[Line | tuple[int, Event] | BaseException | None] = queue.SimpleQueue()
        self._answers: dict[int, str] = {}

    def run(self, stream: BinaryIO) -> Iterator[str]:
        """The translation of each line of `stream`, in order. Raises LineFailed."""
        threading.Thread(target=self._read, args=(stream,), name="lines", daemon=True).start()
        next_number, last_number, read = 1, None, 0
        while last_number is None or next_number <= last_number:
            for message in self._messages():
                if message is None:
                    last_number = read
                elif isinstance(message, BaseException):
                    raise message
                elif isinstance(message, Line):
                    read = message.number
                    self._submit(message)
                else:
                    self._take(*message)
            while next_number in self._answers:
                yield self._answers.pop(next_number)
                self._room.release()
                next_number += 1

    def _read(self, stream: BinaryIO) -> None:
        try:
            for line in read_lines(stream):
                self._room.acquire()
                self._inbox.put(line)
        except BaseException as error:  # told to the main thread, whatever it is
            self._inbox.put(error)
        else:
            self._inbox.put(None)

    def _messages(self) -> Iterator[Line | tuple[int, Event] | BaseException | None]:
        """What has come: waits for the first, does not wait for more."""
        yield self._inbox.get()
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _submit(self, line: Line) -> None:
        if not line.text or line.text.isspace():
            self._answers[line.number] = ""
            return
        if line.cut and not self._truncate:
            raise LineFailed(f"line {line.number} is longer than any model takes; split it, or pass --truncate")
        try:
            ids = self._model.source_ids_of(line.text, f"line {line.number}", truncate=self._truncate)
            number = line.number
            sequence = Sequence(ids, lambda event: self._inbox.put((number, event)), parameters=self._parameters)
            self._model.engine.submit([sequence])
        except RequestError as error:
            raise LineFailed(str(error)) from None

    def _take(self, number: int, event: Event) -> None:
        if isinstance(event, Failed):
            raise LineFailed(f"line {number}: {event.error}")
        if isinstance(event, Finished):
            self._answers[number] = as_one_line(self._model.tokenizer.decode(event.ids))

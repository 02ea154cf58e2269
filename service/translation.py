"""Translation of a stream of lines through the engine: as many lines out as in, in order, in bounded memory.

A reader thread takes lines from the input, no more than a window ahead of what was written; the main thread hands them
to the engine as they come and yields answers in order. The window is wide, so that the engine always finds lines to
fill its rows with and may choose among them; what is kept of a line in it is token ids. Lines that come slowly (a
terminal, a pipe) are answered one by one.
"""

import queue
import threading
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
        # What the reader thread and the engine's threads tell the main thread. None: the input has ended.
        self._inbox: queue.SimpleQueue[Line | tuple[int, Event] | BaseException | None] = queue.SimpleQueue()
        self._answers: dict[int, str | LineFailed] = {}

    def run(self, stream: BinaryIO) -> Iterator[str]:
        """The translation of each line of `stream`, in order. LineFailed in the place of one that cannot be had."""
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
                    self._unseen.release()
                    self._submit(message)
                else:
                    self._take(*message)
            while (answer := self._answers.pop(next_number, None)) is not None:
                if isinstance(answer, LineFailed):
                    raise answer
                yield answer
                self._room.release()
                next_number += 1

    def _read(self, stream: BinaryIO) -> None:
        try:
            for line in read_lines(stream):
                self._room.acquire()
                self._unseen.acquire()
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
        number = line.number
        if not line.text or line.text.isspace():
            self._answers[number] = ""
            return
        if line.cut and not self._truncate:
            self._answers[number] = LineFailed(
                f"line {number} is longer than any model takes; split it, or pass --truncate"
            )
            return
        try:
            ids = self._model.source_ids_of(line.text, f"line {number}", truncate=self._truncate)
            sequence = Sequence(ids, partial(self._tell, number), parameters=self._parameters)
            self._model.engine.submit([sequence])
        except RequestError as error:
            self._answers[number] = LineFailed(str(error))

    def _tell(self, number: int, event: Event) -> None:
        """On one of the engine's threads."""
        self._inbox.put((number, event))

    def _take(self, number: int, event: Event) -> None:
        if isinstance(event, Failed):
            self._answers[number] = LineFailed(f"line {number}: {event.error}")
        if isinstance(event, Finished):
            self._answers[number] = as_one_line(self._detokenizer.text(event.results[0].ids))

"""Server-sent events: the answer of POST /v1/generate while it is being made.

Each result of an input has its own detokenizer, so that an event never holds half a character, and the texts of a
result's events, joined, are the text it would have got without a stream. A client that reads slowly gets fewer and
longer events.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Self

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service import answer
from service.call import Call, EngineRefusal
from service.detokenizer import Pieces
from service.errors import TransduceError
from service.generation import NOTHING, Generation
from service.problem import problem
from service.sequence import Event, Failed, Finished, Result, Token

logger = logging.getLogger("transduce.http")

FIRST_EVENT_SECONDS = 10.0
"""How long the status may wait for the first event, so that a request that fails in line is told by its status."""

KEEP_ALIVE_SECONDS = 15.0
"""After so long without an event a comment is sent, for the proxies that close what is silent."""


class EventStream(Response):
    """The streamed answer to one generation; owns the call and closes it, whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, call: Call, first: list[tuple[int, Event]], request_id: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._call = call
        self._first = first
        self._request_id = request_id
        self._pieces: dict[tuple[int, int], Pieces] = {}

    @classmethod
    async def begin(cls, generation: Generation, call: Call, request: Request) -> Self:
        """Submit, and wait for the first event: until it comes, a failure is a status and not an event."""
        try:
            generation.submit(call, request.receive, stream=True)
            first: list[tuple[int, Event]] = []
            if call.open and not generation.blank:
                first = await _events_within(call, FIRST_EVENT_SECONDS)
            for _, event in first:
                if isinstance(event, Failed):
                    raise EngineRefusal(event.error)
            return cls(generation, call, first, request.state.trail.request_id)
        except BaseException:
            call.close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come. The call itself watches for the client's leaving."""
        with self._call:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except ClientDisconnect:
                raise
            except EngineRefusal as refusal:
                await self._fail(refusal.error, send)
                return
            except Exception:
                logger.exception("unexpected error in a stream request_id=%s", self._request_id)
                await self._fail(TransduceError("internal error; the server's log has it under this request_id"), send)
                return
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _fail(self, error: TransduceError, send: Send) -> None:
        """The status is out: the failure is the last event, and no [DONE] follows."""
        self._generation.model.metrics.count_failure(error.type)
        body = _data(problem(error, self._request_id))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        """The events, several in one chunk if several had come."""
        blank = [self._last_event(index, 0, "", NOTHING) for index in self._generation.blank]
        if blank:
            yield b"".join(blank)
        events = self._first
        while True:
            if chunk := b"".join(self._told(events)):
                yield chunk
            if not self._call.open:
                return
            events = await _events_within(self._call, KEEP_ALIVE_SECONDS)
            if not events:
                yield b": still working\n\n"

    def _told(self, events: list[tuple[int, Event]]) -> list[bytes]:
        """One event for each result that has news: the tokens that came together are told together."""
        new_ids: dict[tuple[int, int], list[int]] = {}
        finished: dict[int, Finished] = {}
        for index, event in events:
            if isinstance(event, Failed):
                raise EngineRefusal(event.error)
            if isinstance(event, Token):
                new_ids.setdefault((index, event.result), []).append(event.id)
            elif isinstance(event, Finished):
                finished[index] = event
        told = []
        for (index, place), ids in new_ids.items():
            # With its end, a result's last tokens come again: they are taken from there, all that are left at once.
            if index not in finished and (text := self._pieces_of(index, place).push(ids)):
                told.append(_data(self._common(index, place, text, None)))
        for index, event in finished.items():
            for place, result in enumerate(event.results):
                pieces = self._pieces_of(index, place)
                text = pieces.push(result.ids[pieces.count :]) + pieces.finish()
                told.append(self._last_event(index, place, text, result))
                del self._pieces[index, place]
        return told

    def _pieces_of(self, index: int, place: int) -> Pieces:
        """The text so far of an input's result, counted from 0."""
        if (pieces := self._pieces.get((index, place))) is None:
            pieces = self._pieces[index, place] = self._generation.detokenizer.pieces()
        return pieces

    def _common(self, index: int, place: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "index": index,
            "sequence": place,
            "text": text,
            "finish_reason": finish_reason,
        }

    def _last_event(self, index: int, place: int, text: str, result: Result) -> bytes:
        """The last event of a result."""
        source_tokens = len(self._generation.sources.get(index, []))
        return _data(
            {
                **self._common(index, place, text, result.reason),
                **self._generation.extras(result),
                **self._generation.source_tokens(index),
                "usage": answer.usage(source_tokens, len(result.ids)),
            }
        )


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + answer.as_json(value) + b"\n\n"


async def _events_within(call: Call, seconds: float) -> list[tuple[int, Event]]:
    """The next events, or none if the time runs out."""
    try:
        async with asyncio.timeout(seconds):
            return await call.events()
    except TimeoutError:
        return []

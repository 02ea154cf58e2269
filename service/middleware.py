"""What surrounds every request: its id, its count, its line in the log, and an answer whatever happens inside.

Two plain ASGI layers. `Envelope` is the outer one: it knows ids, metrics, the log and the last-resort 500. `Linger`
keeps a connection readable while a client is still sending a body that was already refused. None knows what a request
means.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.body import Bodies
from service.door import Refusals, body_may_be_long
from service.errors import QueueFull, TransduceError, Unauthorized
from service.large_answers import PIECE_BYTES, LargeAnswers, in_pieces, seconds_for
from service.logs import Words
from service.metrics import Metrics
from service.problem import problem_response
from service.ration import Ration
from service.request_id import request_id_of
from service.trail import Trail

if TYPE_CHECKING:
    from service.tracing import Tracing

logger = logging.getLogger("transduce.http")

UNKNOWN_ENDPOINT = "unknown"
"""The label of every path that is no route, so that strangers cannot grow the metrics."""

CLIENT_CLOSED = 499
"""Counted when the client left before its answer; nobody receives this status."""


class Envelope:
    """Gives each request an id, counts and logs its answer, and makes an unexpected exception the contract's 500."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Callable[[str | None], Metrics],
        bodies: Bodies,
        answers: LargeAnswers,
        paths: Collection[str],
        leaving: Callable[[], bool],
        refusals: Refusals,
        ration: Ration,
        tracing: "Tracing | None" = None,
    ) -> None:
        """`metrics` gives those of a model, or, for None, those of what concerns no model. `paths` are those of the
        routes, whose requests are counted under their names even if none of them was reached. `leaving` tells whether
        the server is shutting down: its clients are then told to close their connections. `refusals` say which of
        them are logged, and `ration` how soon their connections are read again. `tracing` gets a span of each request
        for a model."""
        self.app = app
        self._bodies = bodies
        self._answers = answers
        self._paths = paths
        self._refusals = refusals
        self._ration = ration
        self._tracing = tracing
        self._metrics = metrics
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        request_id = request_id_of(scope["headers"])
        # A HEAD is answered as the GET it stands for, without the body. A copy: the server's own scope stays as it is.
        scope = dict(scope, method="GET" if method == "HEAD" else method)
        trail = Trail(request_id)
        scope["state"] = dict(scope.get("state") or {}, trail=trail)
        status = CLIENT_CLOSED
        waited = 0.0  # seconds, for the client of a large answer
        traced = self._tracing is not None and scope["path"].startswith(_MODEL_ROUTES)
        span = self._tracing.begin(method, scope["headers"]) if self._tracing is not None and traced else None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", request_id.encode("ascii"))]
                if (timing := trail.server_timing) is not None:
                    added.append((b"server-timing", timing.encode("ascii")))
                if self._leaving():
                    added.append((b"connection", b"close"))
                message = dict(message, headers=[*message["headers"], *added])
            elif method == "HEAD":
                message = dict(message, body=b"")
            elif len(body := message.get("body", b"")) > PIECE_BYTES:
                if not (more := message.get("more_body", False)):
                    self._answers.hold(trail, len(body))
                for piece in in_pieces(body):
                    await send_in_time({"type": "http.response.body", "body": piece, "more_body": True})
                message = dict(message, body=b"")
                if more:
                    return
            await send_in_time(message)

        async def send_in_time(message: Message) -> None:
            nonlocal waited
            if not trail.answer_bytes:
                await send(message)
                return
            began = time.monotonic()
            try:
                async with asyncio.timeout(seconds_for(trail.answer_bytes) - waited):
                    await send(message)
            except TimeoutError:
                scope["state"]["connection"].cut_off("a client took a large answer too slowly")
            waited += time.monotonic() - began

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        except Exception:
            logger.exception("unexpected error request_id=%s", request_id)
            if status != CLIENT_CLOSED:
                raise  # the response had begun: only closing the connection can tell the client
            error = TransduceError("internal error; the server's log has it under this request_id")
            self._metrics(trail.model).count_failure(error.type)
            await problem_response(error, request_id)(scope, receive, send_with_id)
        finally:
            self._bodies.give_back(trail)
            self._answers.hold(trail, 0)
            endpoint = endpoint_of(scope, self._paths)
            method = method if method in _METHODS else "other"
            self._metrics(trail.model).count_http(endpoint, status)
            if self._tracing is not None and span is not None:
                self._tracing.end(span, trail, method, endpoint, status)
            level = logging.INFO if endpoint.startswith(_MODEL_ROUTES) else logging.DEBUG
            if status == QueueFull.status:
                level = self._refusals.level(trail.began)
            if status in _REFUSED and (connection := scope["state"].get("connection")) is not None:
                self._ration.take(connection)
            if logger.isEnabledFor(level):
                words = Words(request_id=request_id, method=method, endpoint=endpoint, status=status)
                words["seconds"] = round(time.monotonic() - trail.began, 4)
                words |= trail.words
                if span is not None:
                    words["trace_id"] = format(span.get_span_context().trace_id, "032x")
                logger.log(level, words)


_REFUSED = (QueueFull.status, Unauthorized.status)
"""What costs the server nothing else, and can come as often as a client likes."""

_MODEL_ROUTES = ("/v1/", "/admin/")

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def endpoint_of(scope: Scope, paths: Collection[str]) -> str:
    """The template of the route that took the request (`/v1/generate`) or that it was for, or `unknown`."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    return scope["path"] if scope["path"] in paths else UNKNOWN_ENDPOINT


class Linger:
    """Lets a client read an early refusal while it is still sending.

    A server that answers and closes with unread bytes in its socket resets the connection, and the client loses the
    answer. So when the answer is whole and the body is not, the answer goes out with `Connection: close` and the rest
    of the body is read and thrown away, within bounds of bytes and seconds; then the connection closes.
    """

    def __init__(
        self, app: ASGIApp, keep_alive_bytes: int, max_bytes: int = 1 << 30, max_seconds: float = 60.0
    ) -> None:
        """Unread bodies of a declared length up to `keep_alive_bytes` are left to the server, which skips them."""
        self.app = app
        self._keep_alive_bytes = keep_alive_bytes
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not body_may_be_long(scope["headers"], self._keep_alive_bytes):
            await self.app(scope, receive, send)
            return
        body_read = closing = False

        async def receive_and_note() -> Message:
            nonlocal body_read
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                body_read = True
            return message

        async def send_and_linger(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start" and not body_read:
                closing = True
                message = dict(message, headers=[*message["headers"], (b"connection", b"close")])
            if not closing or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send(dict(message, more_body=True))  # the client has the whole answer, by its content-length
            await self._discard(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self.app(scope, receive_and_note, send_and_linger)

    async def _discard(self, receive: Receive) -> None:
        discarded = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._max_seconds):
                while discarded < self._max_bytes:
                    message = await receive()
                    discarded += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

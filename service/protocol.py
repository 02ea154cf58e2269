"""HTTP/1.1 on the wire: uvicorn's httptools protocol, with limits on a request's head and this service's error shape.

uvicorn answers what is not HTTP with a line of plain text and sets no limit on headers; here such a request gets the
contract's JSON (400), and a head longer than `MAX_HEAD_BYTES` is refused (431) before it fills the memory. A client
that is slow costs a connection for a bounded time: to send a head, to send a body, to go on reading an answer. And a
request for which there is no room is answered here, as soon as its head has come.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import orjson
from starlette.responses import Response
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.connections import Connections
from service.door import Doorkeeper
from service.request_id import make_request_id

MAX_HEAD_BYTES = 64 * 1024
"""Longest request line plus headers of one request."""

HEAD_SECONDS = 30.0
"""How long a connection may take to send the head of a request."""

BODY_SECONDS = 60.0
"""How long the body of a request may take after its head."""

STALLED_SECONDS = 60.0
"""How long a client may take for what is written and waits here, behind the sockets: some 100 KB, for no more of an
answer is written meanwhile."""

logger = logging.getLogger("transduce.http")

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
"""An offer to change the protocol, which this server declines by ignoring it. httptools would take the body of such a
request for the other protocol and drop it; Java's client makes the offer (h2c) with every first request."""


class HeadTooLarge(Exception):
    """The request line and headers together pass MAX_HEAD_BYTES."""


class Protocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self,
        *args: Any,
        connections: Connections,
        door: Doorkeeper | None = None,
        **options: Any,
    ) -> None:
        """`door` has the answer to requests that need not be let in."""
        super().__init__(*args, **options)
        self._all = connections
        self._door = door
        self._under_way: list[RequestResponseCycle] = []  # more than one if a client sends ahead

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _forget: Callable[["Protocol"], None] | None = None
    _refused = False
    _cut = False
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        """A connection that sends no complete head in time is closed: an idle one must not cost a socket forever. One
        beyond the limit is told so, whatever it was about to ask."""
        super().connection_made(transport)
        if self._all.opened(self):
            self._start_head_timer()
            return
        self._all.trouble("too_many")
        if self._all.far_too_many:
            self.transport.abort()
        else:
            message = f"the server has its {self._all.limit:,} connections; try again in a moment"
            self._refuse(503, "Service Unavailable", "unavailable", message, "retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._all.closed(self)
        if self._forget is not None:
            self._forget(self)
        unanswered = self._unanswered()
        if unanswered and not self._refused and not self._cut:
            self._all.trouble("client_left")
        for cycle in unanswered:  # uvicorn tells the last one alone, and the others would write to nobody
            cycle.disconnected = True
            cycle.message_event.set()
        self._stop_head_timer()
        self._stop_body_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what it is sent. Who stops for good is cut off, with all that waits for it."""
        super().pause_writing()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        """It reads again."""
        self._stop_stall_timer()
        super().resume_writing()
        self._watch_the_end()

    def data_received(self, data: bytes) -> None:
        """Bytes arrived; after a refusal the rest of them is dropped until the client has closed."""
        if self._refused:
            return
        if self._in_head and _UPGRADE.search(data, 0, MAX_HEAD_BYTES):
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request starts."""
        self._head_bytes = 0
        self._start_head_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request target arrived."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header arrived."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._stop_head_timer()
        self._body_timer = self.loop.call_later(BODY_SECONDS, self._refuse_slow_body)
        self.scope["state"]["connection"] = self
        super().on_headers_complete()
        self._under_way = self._unanswered()
        if self.cycle not in self._under_way:
            self._under_way.append(self.cycle)

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._in_head = True
        self._stop_body_timer()
        if self._unanswered():
            self._all.works_for(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is whole."""
        super().on_response_complete()
        self._watch_the_end()
        if not self._unanswered() and not self.transport.is_closing():
            self._all.waits_for(self)

    def _unanswered(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._under_way if not cycle.response_complete]

    def make_room(self) -> None:
        """Close this connection: others want to be heard, and its client keeps silent."""
        self._cut = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # it would wait for the client
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """The turn of a request has come. One that is refused at once needs no task, unless others wait behind it or
        the client does not read what it is told: then it has to keep to the common pace."""
        if self._door is not None and not self.pipeline and not self.flow.write_paused:
            scope: Any = cycle.scope  # uvicorn has a type of its own for it
            if (response := self._door.turn_away(scope)) is not None:
                self._answer(cycle, response)
                self._door.refused(self)
                return
        super()._start_asgi_task(cycle, app)

    def _answer(self, cycle: RequestResponseCycle, response: Response) -> None:
        """Send a whole response. What comes of the request's body after it is skipped."""
        cycle.response_started = cycle.response_complete = True
        content = [STATUS_LINE[response.status_code]]
        for name, value in (*cycle.default_headers, *response.raw_headers):
            content += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            content.append(b"connection: close\r\n")
        self.transport.write(b"".join((*content, b"\r\n", response.body)))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def pause(self, forget: Callable[["Protocol"], None]) -> bool:
        """Leave what comes in the system's buffers, and tell `forget` if the connection is closed. False if it is."""
        if self.transport.is_closing():
            return False
        self._forget = forget
        self.flow.pause_reading()
        return True

    def go_on(self) -> None:
        """Read again."""
        self._forget = None
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_slow_head)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came on the connection for a while."""
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._watch_the_end()

    def _watch_the_end(self) -> None:
        """A connection closes when its client has all that was said, so one who does not read could keep it for ever:
        the sockets and, without anybody's being told to pause, some of the buffer here may hold the last answer."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._start_stall_timer()

    def _close_slow_head(self) -> None:
        self._all.trouble("slow_head")
        self._close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _start_stall_timer(self) -> None:
        if self._stall_timer is None:
            reason = f"a client took next to nothing for {STALLED_SECONDS:g} s"
            self._stall_timer = self.loop.call_later(STALLED_SECONDS, self.cut_off, reason)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def cut_off(self, reason: str) -> None:
        """End the connection of a client that takes its answers too slowly, with all that waits for it."""
        if self._cut:
            return
        logger.info("%s: its connection is cut", reason)
        self._all.trouble("stalled_reader")
        self._cut = True
        self.transport.abort()

    def _refuse_slow_body(self) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self._close()  # it was answered without its body, which nobody needs any more
            return
        self._all.trouble("slow_body")
        self._refuse(408, "Request Timeout", "request_timeout", f"the body did not come within {BODY_SECONDS:g} s")

    def _count(self, length: int) -> None:
        self._head_bytes += length
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused in the contract's shape and close."""
        self._all.trouble("malformed")
        if self._head_bytes > MAX_HEAD_BYTES:
            message = f"the request line and headers pass {MAX_HEAD_BYTES:,} bytes"
            self._refuse(431, "Request Header Fields Too Large", "headers_too_large", message)
        else:
            self._refuse(400, "Bad Request", "invalid_request", "this is not an HTTP/1.1 request")

    def _refuse(self, status: int, phrase: str, kind: str, message: str, headers: str = "") -> None:
        self._refused = True
        self._stop_head_timer()
        self._stop_body_timer()
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            if self.cycle.response_started:
                self._close()  # nothing can be said in the middle of a response
                return
            self.cycle.disconnected = True  # its body was broken: the handler that waits for the rest is told to leave
            self.cycle.message_event.set()
        before = [cycle for cycle in self._under_way if not (cycle.response_complete or cycle.disconnected)]
        if before:  # what was sent ahead is answered, not overtaken; then the connection closes
            before[-1].keep_alive = False
            return
        request_id = make_request_id()
        body = orjson.dumps({"error": {"type": kind, "message": message}, "request_id": request_id})
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\n{headers}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # Closing with unread bytes would reset the connection under the answer: the client gets a moment to read it.
        self.loop.call_later(1.0, self._close)

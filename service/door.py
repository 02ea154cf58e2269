"""The door: what the engine has no room for is refused before it is routed or read.

An overloaded server must not spend its time on saying no. So the protocol asks here as soon as the head of a request is
whole, and what is refused then costs neither a task nor a way through the application. `Door`, an ASGI layer, asks
again for those that cannot be answered without reading on.
"""

import logging
import math
import time
from collections.abc import Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import QueueFull, RequestError
from service.keys import Keys
from service.logs import Words
from service.models import Models
from service.problem import problem_response
from service.ration import Connection, Ration
from service.request_id import request_id_of
from service.trail import Trail

logger = logging.getLogger("transduce.http")

_TOLD_SECONDS = 1.0


class Refusals:
    """The log of an overloaded server: a line a second for what is refused with 429, and their number."""

    def __init__(self) -> None:
        self._since = -math.inf
        self._unsaid = 0

    def level(self, now: float) -> int:
        """The level of the line of one that is refused now. If it is said aloud, the number of those that were not is
        told first."""
        if now - self._since < _TOLD_SECONDS:
            self._unsaid += 1
            return logging.DEBUG
        if self._unsaid:
            words = Words(status=QueueFull.status, further_requests=self._unsaid, seconds=round(now - self._since, 1))
            logger.info(words)
        self._since, self._unsaid = now, 0
        return logging.INFO


class Doorkeeper:
    """Knows who may come in."""

    def __init__(
        self, models: Models, keys: Keys, paths: Collection[str], refusals: Refusals, ration: Ration, longest: int
    ) -> None:
        """`paths`: those at which something is asked of a model. Bodies of up to `longest` bytes need not be read."""
        self._models = models
        self._keys = keys
        self._paths = paths
        self._refusals = refusals
        self._longest = longest
        self._ration = ration

    def require_room(self, scope: Scope, client: str) -> None:
        """QueueFull (429) or Unavailable (503) if nothing of this client would be taken now."""
        if self._asks_a_model(scope):
            self._models.require_room(client)

    def _asks_a_model(self, scope: Scope) -> bool:
        return scope["path"] in self._paths and scope["method"] == "POST"

    def refused(self, connection: Connection) -> None:
        """What `turn_away` had to say was said on this connection, which is not read again at once if that has come too
        often."""
        self._ration.take(connection)

    def turn_away(self, scope: Scope) -> Response | None:
        """The answer to a request for which there is no room; counted, and in the log. None if it has to be let in, be
        it to get another answer.
        """
        headers = scope["headers"]
        if not self._asks_a_model(scope) or body_may_be_long(headers, self._longest):
            return None
        if (client := self._keys.client_of(headers)) is None:
            return None
        try:
            self._models.require_room(client)
            return None
        except QueueFull as error:
            full = error
        except RequestError:
            return None
        request_id = request_id_of(headers)
        metrics = self._models.metrics(None)
        metrics.count_failure(full.type)
        metrics.count_http(scope["path"], full.status)
        if logger.isEnabledFor(level := self._refusals.level(time.monotonic())):
            words = Words(request_id=request_id, method="POST", endpoint=scope["path"], status=full.status)
            if client:
                words["client"] = client
            logger.log(level, words)
        return problem_response(full, request_id, {"x-request-id": request_id})


class Door:
    """Refuses in the application what the protocol could not."""

    def __init__(self, app: ASGIApp, keeper: Doorkeeper, models: Models) -> None:
        self.app = app
        self._keeper = keeper
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] == "http":
            trail: Trail = scope["state"]["trail"]
            try:
                self._keeper.require_room(scope, trail.client)
            except RequestError as error:
                self._models.metrics(None).count_failure(error.type)
                await problem_response(error, trail.request_id)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def body_may_be_long(headers: Collection[tuple[bytes, bytes]], limit: int) -> bool:
    """Whether a request's body may have more than `limit` bytes, as far as its head tells."""
    for name, value in headers:
        if name == b"content-length":
            return not (value.isdigit() and len(value) < 16 and int(value) <= limit)
        if name == b"transfer-encoding":
            return True
    return False

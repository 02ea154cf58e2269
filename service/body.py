"""Reads the body of a request: bytes within a limit, then JSON, whatever the content type says.

`curl -d '{...}'` without a header announces a form, so the content type is not asked: a body is JSON or it is refused.
Python's own decoder is used, because it takes the lone surrogates that JSON escapes can spell (they become U+FFFD),
and because its hooks see what a plain parser passes over: a key that comes twice, NaN, Infinity.
"""

import asyncio
import json
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request

from service.errors import InvalidRequest, QueueFull, TooLarge
from service.json_values import exceeded
from service.trail import Trail

MAX_DEPTH = 16
"""Deepest nesting of arrays and objects in a body; the contract itself needs three."""

_MAX_MEMBERS = 256
"""Of an object in a body; the contract's largest has a few dozen. To say of each that it is unknown takes time."""

_PARSE_IN_THREAD = 64 * 1024
"""Bodies longer than this (bytes) are parsed in a thread, so that the event loop answers others meanwhile."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Bodies:
    """The bodies of all requests under way, in bytes: what waits in line or is sent slowly is held meanwhile."""

    def __init__(self, limit: int, max_values: int) -> None:
        """`limit` is of all bodies together, in bytes; `max_values` of one, in texts, numbers, lists and objects."""
        self.limit = limit
        self.max_values = max_values
        self.held = 0
        self.parsing = asyncio.Lock()
        """Held while a long body is parsed: threads would only take turns, and what they make is several times as
        large as the body."""

    def take(self, trail: Trail, count: int) -> None:
        """So many more of this request's. QueueFull (429) if they are too many together."""
        self.require_room(count)
        self.held += count
        trail.body_bytes += count

    def require_room(self, count: int) -> None:
        """QueueFull (429) if so many could not be taken now."""
        if self.held + count > self.limit:
            raise QueueFull(f"requests under way hold {self.held:,} of {self.limit:,} bytes")

    def give_back(self, trail: Trail) -> None:
        """The request is over."""
        self.held -= trail.body_bytes


async def read_body(request: Request, limit: int, bodies: Bodies) -> bytes:
    """The whole body, at most `limit` bytes; TooLarge or QueueFull as soon as that is known, and no further read."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdecimal():
        if int(declared) > limit:
            raise _too_large(limit, f"{int(declared):,}")
        bodies.require_room(int(declared))
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        if len(body) + len(piece) > limit:
            raise _too_large(limit, f"more than {limit:,}")
        bodies.take(request.state.trail, len(piece))
        body += piece
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(limit: int, length: str) -> TooLarge:
    return TooLarge(f"the body has {length} bytes, the limit is {limit:,}; send fewer inputs per call")


async def read_json(request: Request, limit: int, bodies: Bodies) -> Any:
    """The body of `request` as Python values, without lone surrogates."""
    body = await read_body(request, limit, bodies)
    if len(body) <= _PARSE_IN_THREAD:
        return parse_json(body, bodies.max_values)
    async with bodies.parsing:
        return await asyncio.to_thread(parse_json, body, bodies.max_values)


def parse_json(body: bytes, max_values: int) -> Any:
    """The value that `body` spells; InvalidRequest (400) if it is not UTF-8, not JSON, or nested too deep, TooLarge
    (413) if it has more values than that.
    """
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} cannot be decoded") from None
    match exceeded(body, max_depth=MAX_DEPTH, max_values=max_values):
        case "depth":
            raise InvalidRequest(f"the body is nested too deep; the limit is {MAX_DEPTH} levels")
        case "values":
            raise TooLarge(f"the body has more than {max_values:,} values; send fewer inputs per call")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise InvalidRequest(f"the body is not JSON: {what} at character {error.pos}") from None
    except ValueError:  # Python refuses integers of thousands of digits
        raise InvalidRequest("the body is not usable JSON: a number is too long") from None
    # A lone surrogate can only come from an escape; without one the walk is spared.
    return _without_lone_surrogates(value) if re.search(r"\\u[dD][89a-fA-F]", text) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_MEMBERS:
        raise InvalidRequest(f"an object in the body has {len(pairs):,} members, the limit is {_MAX_MEMBERS}")
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidRequest("an object in the body has the same key twice")
    return members


def _refuse_constant(name: str) -> Any:
    raise InvalidRequest(f"the body is not JSON: {name} is not a JSON number")


def without_lone_surrogates(text: str) -> str:
    """`text` with U+FFFD in the place of each code point that UTF-8 cannot spell."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return without_lone_surrogates(value)
    if isinstance(value, list):
        return [_without_lone_surrogates(member) for member in value]
    if isinstance(value, dict):
        return {without_lone_surrogates(key): _without_lone_surrogates(member) for key, member in value.items()}
    return value

"""A server as its clients see it: POST /v1/generate, and its metrics and model if it tells of them.

Kept cheap, since it often shares the machine with the server: one session, JSON by orjson, and of a stream only the
last events are parsed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import aiohttp
import orjson
from yarl import URL

from service.bench.report import Reply
from service.errors import TransduceError

_KEEP_ALIVE_SECONDS = 4.0
"""uvicorn closes an idle connection after 5 s; who reuses it at that moment loses a request."""

_REMEDIES = {
    401: "give its key with --api-key-file",
    404: "the address is the server's own, without /v1/generate; --model names one of its models",
    413: "leave long lines out of the data, or add --parameters '{\"truncate\": true}'",
    503: "wait until GET /readyz answers 200",
}


class TargetRefused(TransduceError):
    """The server cannot be loaded: nobody there, or it does not answer the first request."""


class Target:
    """A server at `url`, and how each request asks; `timeout` is in seconds. Used as an async context."""

    def __init__(
        self,
        url: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        model: str | None = None,
        stream: bool = False,
        api_key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.stream = stream
        self._route = URL(f"{self.url}/v1/generate")
        self._fields: dict[str, Any] = {"stream": True} if stream else {}
        if parameters:
            self._fields["parameters"] = dict(parameters)
        if model is not None:
            self._fields["model"] = model
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # No limit: how many connections there are is the load's to decide.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("a target is entered (`async with`) before it is asked")
        return self._session

    async def generate(self, inputs: Sequence[str], due: float | None = None) -> tuple[Reply, Any]:
        """Send one request, and wait until it ends one way or another; its body too, if it is no stream.

        `due` is when it should have been sent (time.perf_counter()); now, if not given. Raises nothing of the network:
        a failure is a reply.
        """
        body = self._body(inputs)
        first, ended, answer, failure = None, None, None, None
        source_tokens = generated_tokens = 0
        sent = time.perf_counter()
        try:
            async with self._http.post(self._route, data=body) as response:
                if response.status != 200:
                    failure = _refusal(response.status, await response.read())
                elif self.stream:
                    events = _Events()
                    async for chunk in response.content.iter_any():
                        events.read(chunk)
                    first, failure = events.first, events.failure
                    source_tokens, generated_tokens = events.source_tokens, events.generated_tokens
                else:
                    content = await response.read()
                    ended = time.perf_counter()
                    answer = orjson.loads(content)
                    source_tokens, generated_tokens = _usage(answer)
        except TimeoutError:
            failure = "timeout"
        except (aiohttp.ClientError, OSError):
            failure = "connection"
        except (ValueError, KeyError, TypeError):
            failure = "malformed answer"
        ended = ended or time.perf_counter()
        return Reply(
            sent if due is None else due, sent, first, ended, len(inputs), source_tokens, generated_tokens, failure
        ), answer

    async def check(self, inputs: Sequence[str]) -> None:
        """Ask once, and raise TargetRefused, with what to do about it, unless that is answered."""
        try:
            async with self._http.post(self._route, data=self._body(inputs)) as response:
                status, content = response.status, await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            message = f"cannot reach {self.url}: {_reason(error)}; `transduce serve` starts a server"
            raise TargetRefused(message) from None
        if status != 200:
            remedy = f"; {_REMEDIES[status]}" if status in _REMEDIES else ""
            message = f"{self.url} answers the first request with {_refusal(status, content)}"
            raise TargetRefused(f"{message}{_message(content)}{remedy}")
        try:
            if self.stream:
                events = _Events()
                events.read(content)
                if events.failure is not None:
                    raise ValueError(events.failure)
            else:
                _usage(orjson.loads(content))
        except (ValueError, KeyError, TypeError):
            raise TargetRefused(f"{self.url} does not answer as POST /v1/generate of Transduce does") from None

    async def metrics(self) -> str | None:
        """The page at GET /metrics, None if there is none."""
        return await self._get("/metrics", {"Accept": "text/plain"})

    async def describe(self) -> dict[str, Any] | None:
        """What GET /v1/models says of the model that is asked, None if it says nothing."""
        page = await self._get("/v1/models", {})
        try:
            cards = [] if page is None else orjson.loads(page)["data"]
            name = self._fields.get("model")
            return next((dict(card) for card in cards if name in (None, card["id"])), None)
        except (ValueError, KeyError, TypeError):
            return None

    async def _get(self, path: str, headers: dict[str, str]) -> str | None:
        try:
            async with self._http.get(URL(self.url + path), headers=headers) as response:
                return await response.text(errors="replace") if response.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None

    def _body(self, inputs: Sequence[str]) -> bytes:
        return orjson.dumps({"inputs": inputs[0] if len(inputs) == 1 else list(inputs), **self._fields})


class _Events:
    """Server-sent events as they come in: an event is one `data:` line, [DONE] the last."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.source_tokens = self.generated_tokens = 0
        self._rest = b""
        self._failure: str | None = None
        self._done = False

    @property
    def failure(self) -> str | None:
        """What went wrong, once the stream has ended."""
        return self._failure or (None if self._done else "stream cut off")

    def read(self, chunk: bytes) -> None:
        """Raises ValueError, KeyError or TypeError for what is no event."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if self.first is None:
                self.first = time.perf_counter()
            if data == b"[DONE]":
                self._done = True
            elif b'"usage"' in data or b'"error"' in data:  # within a text the quotes would be escaped
                event = orjson.loads(data)
                if "error" in event:
                    self._failure = f"stream {_word(event)}"
                elif "usage" in event:
                    source_tokens, generated_tokens = _usage(event)
                    self.generated_tokens += generated_tokens
                    # Several sequences of an input have read the same source.
                    self.source_tokens += source_tokens if event.get("sequence", 0) == 0 else 0


def _reason(error: Exception) -> str:
    """In the words of the operating system, where it has some."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno is not None:
        number = error.os_error.errno  # below 0 it is of the name service
        return (os.strerror(number) if number > 0 else str(error.os_error.strerror)).lower()
    return str(error) or type(error).__name__


def _usage(answer: Any) -> tuple[int, int]:
    usage = answer["usage"]
    return int(usage["source_tokens"]), int(usage["generated_tokens"])


def _refusal(status: int, content: bytes) -> str:
    """Status and type."""
    try:
        return f"{status} {_word(orjson.loads(content))}".strip()
    except ValueError:
        return str(status)


def _word(problem: Any) -> str:
    """The `type` of an error if it has one: a word and not a sentence, for it is counted by."""
    error = problem.get("error") if isinstance(problem, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    return kind if isinstance(kind, str) and re.fullmatch(r"\w{1,40}", kind) else ""


def _message(content: bytes) -> str:
    """What the server has to say, on one line."""
    try:
        message = str(orjson.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
    return f" ({' '.join(message.split())[:300]})"

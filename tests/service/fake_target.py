"""A server with the contract of POST /v1/generate and no model: answers after a delay that a test decides."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import orjson
from aiohttp import web

SOURCE_TOKENS, GENERATED_TOKENS = 5, 3
"""Of each input."""


class FakeTarget:
    """Answers its n-th request (from 0) after `delay(n)` seconds, as `script` says of n; keeps what it saw.

    What a script may say: `ok`, `malformed`, `drop` (the connection is cut), `cut` (a stream without its end), `fail`
    (a stream that ends in an error), or the status of an error.
    """

    def __init__(
        self,
        delay: Callable[[int], float] = lambda number: 0.0,
        script: Callable[[int], str | int] = lambda number: "ok",
        metrics: Callable[[], str] | None = None,
    ) -> None:
        self.arrivals: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._delay, self._script, self._metrics = delay, script, metrics

    async def generate(self, request: web.Request) -> web.StreamResponse:
        number = len(self.arrivals)
        self.arrivals.append(time.perf_counter())
        self.headers.append(dict(request.headers))
        self.bodies.append(body := orjson.loads(await request.read()))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer(request, body, self._delay(number), self._script(number))
        finally:
            self._at_once -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], delay: float, word: str | int
    ) -> web.StreamResponse:
        inputs = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
        usage = {"source_tokens": SOURCE_TOKENS, "generated_tokens": GENERATED_TOKENS}
        if isinstance(word, int):
            await asyncio.sleep(delay)
            error = {"type": "made_up", "message": "as the test wants"}
            return web.Response(body=orjson.dumps({"error": error}), status=word)
        if word == "drop":
            assert request.transport is not None
            request.transport.abort()
        if body.get("stream"):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b": a comment is no event\n\n")
            await asyncio.sleep(delay / 2)
            for index in range(len(inputs)):
                await response.write(_data({"index": index, "sequence": 0, "text": 'a "usage"', "finish_reason": None}))
            await asyncio.sleep(delay / 2)
            for index in range(len(inputs)):
                end = {"index": index, "sequence": 0, "text": ".", "finish_reason": "stop", "usage": usage}
                await response.write(_data(end))
            if word == "fail":
                await response.write(_data({"error": {"type": "made_up", "message": "as the test wants"}}))
            elif word == "ok":
                await response.write(b"data: [DONE]\n\n")
            return response
        await asyncio.sleep(delay)
        if word == "malformed":
            return web.Response(body=b'{"outputs": []}')
        usage = {key: value * len(inputs) for key, value in usage.items()}
        return web.Response(body=orjson.dumps({"outputs": [], "usage": usage}))

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(status=404) if self._metrics is None else web.Response(text=self._metrics())

    async def models(self, request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps({"data": [{"id": "fake", "version": "7"}]}))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its address."""
        application = web.Application()
        application.router.add_post("/v1/generate", self.generate)
        application.router.add_get("/v1/models", self.models)
        application.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[str]:
        """The same, for a test without an event loop."""
        begun, ended, found = threading.Event(), threading.Event(), []

        async def listen() -> None:
            async with self.listening() as url:
                found.append(url)
                begun.set()
                await asyncio.to_thread(ended.wait)

        thread = threading.Thread(target=asyncio.run, args=(listen(),))
        thread.start()
        assert begun.wait(10)
        try:
            yield found[0]
        finally:
            ended.set()
            thread.join()


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"

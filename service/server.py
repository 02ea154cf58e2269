"""The life of the serving process: open the port, load, serve, drain, leave with the right status.

uvicorn moves the bytes. Signals are this module's, because uvicorn closes the listener first and raises the signal
again at the end: a draining service could not say 503, and a clean end would look like a kill.

The life, by signals: the first SIGTERM or SIGINT makes the engine refuse what is new (503, the listener stays open) and
finish what it has; when that is done, or after `drain_seconds`, connections and listener close, status 0, or 1 if an
engine has not ended `ENGINE_SECONDS` later. A second signal ends it now: what is unfinished is answered with 503, as
far as clients take it within `HURRIED_SECONDS`; status 128 + its number. A third one does not even wait for that.
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from service.connections import Connections
from service.errors import SettingsError, StartupError
from service.models import Models
from service.protocol import Protocol
from service.settings import Settings

logger = logging.getLogger("transduce.server")

KEEP_ALIVE_SECONDS = 75
"""An idle connection is kept longer than a load balancer's usual 60 s: this side must not be the first to close."""

HURRIED_SECONDS = 1.0
"""What a second signal leaves for answers."""

ENGINE_SECONDS = 5.0
"""How much longer than the drain its engines may take to end."""

_BACKLOG = 2048


def slow_reader_seconds(settings: Settings) -> int:
    """What connections get to read their answers when the engines have ended."""
    return max(1, round(settings.drain_seconds))


class UvicornServer(uvicorn.Server):
    """uvicorn without signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; SettingsError, with the remedy, if the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name with several addresses (localhost) the IPv4 one: it is what 127.0.0.1 reaches.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"--host {host}: not an address to listen on ({error.strerror})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        remedy = "stop what listens there, or choose another with --port (0 takes a free one)"
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror}; {remedy}") from None
    listener.setblocking(False)
    return listener


def configure(app: FastAPI, models: Models) -> uvicorn.Config:
    """How uvicorn serves `app`, which is that of `models`."""
    settings = models.settings
    connections = Connections(settings.max_connections, models.families)
    if connections.limit < settings.max_connections:
        logger.warning(
            "the system allows file descriptors for %d connections, fewer than --max-connections %d",
            connections.limit, settings.max_connections,
        )  # fmt: skip
    return uvicorn.Config(
        app,
        http=functools.partial(  # type: ignore[arg-type]  # it is only called
            Protocol, connections=connections, door=app.state.door
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=slow_reader_seconds(settings),
    )


def serve(app: FastAPI, models: Models, listener: socket.socket) -> int:
    """Serve until a signal; the process's exit status."""
    config = configure(app, models)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_Life(UvicornServer(config), models).run(listener))


class _Life:
    """One run of the server."""

    def __init__(self, server: uvicorn.Server, models: Models) -> None:
        self._server = server
        self._models = models
        self._settings = models.settings
        self._stopping = asyncio.Event()
        self._hurried = False
        self._status = 0

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._server.serve([listener]))
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        loading = self._models.status in ("new", "starting")
        drains = not (serving.done() or loading)
        if drains:
            await self._drain()
        self._server.should_exit = True
        await serving
        for task in (starting, stopping):
            task.cancel()
        if not (drains or loading):  # a load cannot be interrupted, nor what a drain left: threads end with the process
            await self._models.stop()
        logger.info("stopped status=%d", self._status)
        return self._status

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._hurried:
            os._exit(128 + number)
        if self._stopping.is_set():
            logger.warning("%s again: ending now, what is unfinished is answered with 503", name)
            self._hurried, self._status = True, 128 + number
            self._models.drain(0)
            asyncio.get_running_loop().call_later(HURRIED_SECONDS, os._exit, self._status)
            return
        logger.info("%s: draining, for %g s at most; send it again to end at once", name, self._settings.drain_seconds)
        self._stopping.set()

    async def _start(self) -> None:
        """Load and warm up in the engines' threads while the port already answers 503."""
        try:
            self._models.start()
            await self._models.wait_ready()
        except StartupError as error:
            logger.error("%s", error)
            self._fail()
        except Exception:
            logger.exception("a model did not start")
            self._fail()
        else:
            logger.info("ready")

    def _fail(self) -> None:
        self._status = 2
        self._stopping.set()

    async def _drain(self) -> None:
        seconds = self._settings.drain_seconds
        self._models.drain(seconds)
        # A little longer than the engines' own limit: they fail what is left, and the answers say so.
        if not await self._models.join(seconds + ENGINE_SECONDS):
            logger.warning("the engines did not end in time")
            self._status = self._status or 1

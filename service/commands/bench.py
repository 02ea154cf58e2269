"""`transduce bench`: load on a running server; a table, and JSON and a picture if asked for."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import __version__
from service.bench.arguments import DEFAULT_CLIENTS, DEFAULT_SECONDS, add_arguments
from service.errors import SettingsError

if TYPE_CHECKING:
    from service.bench.report import Point, Run
    from service.bench.target import Target
    from service.bench.workload import Load, Workload

_PICTURES = (".png", ".svg", ".pdf")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="load a running server and measure it",
        description="Load a running server and measure it: throughput, latency, failures, and of its metrics rows per "
        "step, padding and memory. Several numbers of clients, or several rates, are measured one after the other. "
        "Exit status 1 if the server cannot be loaded, 130 after Ctrl-C, with what there is.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure; the exit status."""
    _require("aiohttp", *(["matplotlib"] if arguments.picture else []))
    _refuse_places(arguments)
    import uvloop

    from service.bench.table import table
    from service.bench.target import Target
    from service.bench.workload import Clients, Rate, Workload

    loads: list[Load] = [Rate(rate) for rate in arguments.rate or ()]
    loads = loads or [Clients(count) for count in arguments.clients or DEFAULT_CLIENTS]
    seconds = arguments.duration or (None if arguments.requests else DEFAULT_SECONDS)
    workload = Workload(
        texts=_read_texts(arguments.data),
        requests=arguments.requests,
        duration=seconds,
        warm_up=arguments.warm_up,
        inputs_per_request=arguments.inputs_per_request,
        seed=arguments.seed,
        max_in_flight=arguments.max_in_flight,
    )
    target = Target(
        arguments.url,
        parameters=arguments.parameters,
        model=arguments.model,
        stream=arguments.stream,
        api_key=_read_key(arguments.api_key_file),
        timeout=arguments.timeout,
    )
    _allow_connections(max([workload.max_in_flight, *(load.count for load in loads if isinstance(load, Clients))]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found, interrupted = runner.run(_measure(target, loads, workload, _settings(arguments, workload)))
    if found.points:
        print(table(found))
    if arguments.output:
        arguments.output.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if arguments.picture and any(point.requests for point in found.points):
        from service.bench.picture import draw

        draw(found, arguments.picture)
    if interrupted:
        return 128 + signal.SIGINT
    return 0 if all(point.requests for point in found.points) else 1


async def _measure(target: Target, loads: list[Load], workload: Workload, settings: dict[str, Any]) -> tuple[Run, bool]:
    """Every point until Ctrl-C, and whether that came. A second Ctrl-C ends the program at once."""
    from service.bench.load import measure
    from service.bench.progress import Progress
    from service.bench.report import Run

    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    points: list[Point] = []
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    async with target:
        await target.check(next(workload.draw()))
        model = await target.describe()
        loop.add_signal_handler(signal.SIGINT, interrupt)
        for load in loads:
            if not stop.is_set():
                with Progress(load, workload) as progress:
                    points.append(await measure(target, load, workload, on_reply=progress.on_reply, stop=stop))
    found = Run(
        version=__version__,
        command=shlex.join(["transduce", *sys.argv[1:]]),
        started=started,
        url=target.url,
        model=model,
        settings=settings,
        machine=_machine(),
        points=points,
    )
    return found, stop.is_set()


def _settings(arguments: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """What decides the requests, for the record; no key."""
    names = ("data", "requests", "inputs_per_request", "parameters", "model", "stream", "seed", "timeout", "warm_up")
    settings = {name: getattr(arguments, name) for name in names}
    return settings | {
        "duration": workload.duration,
        "max_in_flight": workload.max_in_flight,
        "texts": len(workload.texts),
    }


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "aiohttp": importlib.metadata.version("aiohttp"),
    }


def _require(*modules: str) -> None:
    """Before a minute of load, not after it."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"{name} is not installed; pip install 'transduce[bench]'")


def _refuse_places(arguments: argparse.Namespace) -> None:
    """Before a minute of load, not after it."""
    for flag, path in (("--output", arguments.output), ("--picture", arguments.picture)):
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise SettingsError(f"{flag} {path}: cannot be written; its directory has to exist")
    if arguments.picture and arguments.picture.suffix not in _PICTURES:
        raise SettingsError(f"--picture {arguments.picture}: its name has to end in {', '.join(_PICTURES)}")


def _read_texts(name: str) -> list[str]:
    from service.bench.workload import read_texts

    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as stream:
            texts = read_texts(stream)
    except OSError as error:
        raise SettingsError(f"cannot open {name}: {error.strerror}") from None
    if not texts:
        raise SettingsError(f"--data {name}: no text in it; a line is a text, blank ones do not count")
    return texts


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file {path}: {error}") from None
    if not key or not key.isascii() or not key.isprintable():
        raise SettingsError(f"--api-key-file {path}: a key is one line of ASCII")
    return key


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files, where it is below what so many connections need."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise SettingsError(f"{count} connections need more open files than this system allows ({hard}); ulimit -n")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

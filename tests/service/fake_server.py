"""The real server around the fake engine: as a program, or in a thread.

The program takes flags, and on standard input the words that open the engine's gates: load, work.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from service.app import create_app
from service.logs import set_up_logs
from service.models import Models
from service.served_model import ServedModel
from service.server import UvicornServer, configure, open_socket, serve
from service.settings import parse_settings
from tests.service.fake_engine import FakeEngine, fake_model


@dataclass
class RunningServer:
    url: str
    port: int
    engine: FakeEngine
    model: ServedModel


@contextlib.contextmanager
def running(engine: FakeEngine, **settings: object) -> Iterator[RunningServer]:
    """A server on a free port, in a thread, with real sockets."""
    model = fake_model(engine, **settings)
    with serving(model) as port:
        yield RunningServer(f"http://127.0.0.1:{port}", port, engine, model)


@contextlib.contextmanager
def serving(served: ServedModel | Models) -> Iterator[int]:
    """The same around any model or models, whose engines are the caller's matter; the port."""
    models = served if isinstance(served, Models) else Models([served])
    listener = open_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = UvicornServer(configure(create_app(models), models))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


def main() -> int:
    settings, _ = parse_settings(sys.argv[1:], {})
    set_up_logs("info")
    engine = FakeEngine(step_seconds=0.002)
    engine.status = "new"
    engine.may_load.clear()
    engine.may_work.clear()
    threading.Thread(target=_obey, args=(engine,), daemon=True).start()
    listener = open_socket(settings.host, settings.port)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    models = Models([replace(fake_model(engine), settings=settings)])
    return serve(create_app(models), models, listener)


def _obey(engine: FakeEngine) -> None:
    with open(0, closefd=False) as words:
        for word in words:
            {"load": engine.may_load, "work": engine.may_work}[word.strip()].set()


if __name__ == "__main__":
    sys.exit(main())

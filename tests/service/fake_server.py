"""The real server around the fake engine: as a program (step seconds, start seconds, flags), or in a thread."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from service.app import create_app
from service.logs import set_up_logs
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
    listener = open_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = UvicornServer(configure(create_app(model), model.settings))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield RunningServer(f"http://127.0.0.1:{port}", port, engine, model)
    finally:
        server.should_exit = True
        thread.join()


def main() -> int:
    settings, _ = parse_settings(sys.argv[3:], {})
    set_up_logs("info")
    engine = FakeEngine(float(sys.argv[1]), start_seconds=float(sys.argv[2]))
    engine.status = "new"
    model = fake_model(engine)
    listener = open_socket(settings.host, settings.port)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    return serve(create_app(model), engine, settings, listener)


if __name__ == "__main__":
    sys.exit(main())

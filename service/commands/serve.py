"""`transduce serve`: the service on a port."""

import argparse
import logging
import os
from typing import TYPE_CHECKING

from service.settings import Settings, add_arguments, read_settings

if TYPE_CHECKING:
    from service.keys import Keys

logger = logging.getLogger("transduce.server")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. Each flag is also an environment variable; a flag goes first.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; the exit status."""
    settings, warnings = read_settings(arguments)
    from service.logs import set_up_logs

    set_up_logs(settings.log_level, settings.log_format)
    for warning in warnings:
        logger.warning("%s", warning)

    from service.app import create_app
    from service.models import load_all
    from service.server import open_socket, serve

    models = load_all(settings)
    tracing = provider = None
    if settings.traces_endpoint:
        from service.tracing import Tracing, provider_for

        provider = provider_for(settings.traces_endpoint)
        tracing = Tracing(provider)
    app = create_app(models, tracing)
    listener = open_socket(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    _announce(settings, app.state.keys, str(host), int(port))
    try:
        status = serve(app, models, listener)
    finally:
        if provider is not None:
            provider.shutdown()  # sends what is left
    if not models.ended:
        # A load, or a call that hangs. The interpreter's own end would stop such a thread where it comes back from
        # ONNX Runtime, and C++ answers that with abort().
        logging.shutdown()
        os._exit(status)
    return status


def _announce(settings: Settings, keys: "Keys", host: str, port: int) -> None:
    """What is in effect, and who may call."""
    words = " ".join(f"{name}={value}" for name, value in settings.shown().items())
    logger.info("settings %s", words)
    place = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d (documentation at /docs); loading the model", place, port)
    if keys.required:
        open_too = ", /metrics" if settings.metrics_without_key else ""
        logger.info("%d keys are let in; without one, /healthz, /readyz%s answer", len(keys.entries), open_too)
    else:
        logger.info("no key is configured: the service is open to everyone who can reach this address")

"""`transduce serve`: the service on a port."""

import argparse
import dataclasses
import logging

from service.settings import Settings, add_arguments, read_settings

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

    set_up_logs(settings.log_level)
    for warning in warnings:
        logger.warning("%s", warning)

    from service.app import create_app
    from service.served_model import load
    from service.server import open_socket, serve

    model = load(settings)
    listener = open_socket(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    _announce(settings, str(host), int(port))
    return serve(create_app(model), model.engine, settings, listener)


def _announce(settings: Settings, host: str, port: int) -> None:
    """What is in effect, and that anyone may call."""
    words = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(settings).items())
    logger.info("settings %s", words)
    place = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d (documentation at /docs); loading the model", place, port)
    logger.info("no key is configured: the service is open to everyone who can reach this address")

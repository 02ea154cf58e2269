"""The flags of `transduce bench`, and what their values may be."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

DEFAULT_CLIENTS = (1, 8, 64)
DEFAULT_SECONDS = 10.0

_Number = TypeVar("_Number", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them. Nothing else is imported before the command runs."""
    add = parser.add_argument
    add("url", metavar="URL", type=_url, help="the server, as in http://127.0.0.1:8000")
    add("--data", required=True, metavar="FILE", help="the texts to send, a line each; - is standard input")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--clients", type=_list_of(_positive_int), default=None, metavar="N,...",
        help="closed loop: so many clients, each sends its next request when its last is answered (default: 1,8,64)",
    )  # fmt: skip
    load.add_argument(
        "--rate", type=_list_of(_positive_float), default=None, metavar="R,...",
        help="open loop: Poisson arrivals, so many requests a second on average, whatever the server does",
    )  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=_positive_int, metavar="N", help="requests of each point that count")
    length.add_argument(
        "--duration", type=_positive_float, metavar="S",
        help=f"seconds of each point that count (default: {DEFAULT_SECONDS:g})",
    )  # fmt: skip
    add(
        "--warm-up", type=_natural_int, metavar="N",
        help="requests of each point before those that count (default: 2 of each client, or 2 seconds of arrivals)",
    )  # fmt: skip
    add("--parameters", type=_object, default={}, metavar="JSON", help="of each request, as in '{\"num_beams\": 4}'")
    add("--inputs-per-request", type=_positive_int, default=1, metavar="N", help="texts in a request (default: 1)")
    add("--model", metavar="NAME", help="the model to ask for, where a server has several")
    add("--stream", action="store_true", help="ask for streams, and measure the time to their first event")
    add("--seed", type=int, default=0, metavar="N", help="of the order of texts and of arrivals (default: 0)")
    add("--timeout", type=_positive_float, default=60.0, metavar="S", help="seconds a request may take (default: 60)")
    add(
        "--max-in-flight", type=_positive_int, default=1024, metavar="N",
        help="requests of an open loop that are open at a time; an arrival beyond fails unsent (default: 1024)",
    )  # fmt: skip
    add("--api-key-file", type=Path, metavar="FILE", help="holds the key that the server wants")
    add("--output", type=Path, metavar="FILE", help="write every figure as JSON")
    add("--picture", type=Path, metavar="FILE", help="draw latency and throughput against load (.png, .svg, .pdf)")


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        fit = False
    if not fit or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server, as http://127.0.0.1:8000 is one")
    if "@" in parts.netloc:
        raise argparse.ArgumentTypeError("an address holds no password; --api-key-file gives a key")
    return text


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, as '{{\"num_beams\": 4}}' is one")
    return value


def _natural_int(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _positive_int(text: str) -> int:
    if (value := _natural_int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and below a million")
    return value


def _list_of(kind: Callable[[str], _Number]) -> Callable[[str], list[_Number]]:
    return lambda text: [kind(part.strip()) for part in text.split(",")]

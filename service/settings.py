"""Every setting, declared once: a field is a flag, an environment variable and a sentence of the manual.

`max_queue` is the flag `--max-queue` and the variable `TRANSDUCE_MAX_QUEUE`; a flag goes before its variable, a
variable before the default. Knows nothing of what the settings do.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from service.errors import SettingsError

PREFIX = "TRANSDUCE_"
DEFAULT_MODEL = str(Path(__file__).parent / "artifacts" / "tatoeba-en-de")
"""The artifact that is shipped with the service."""

_NOTHING: Mapping[str, object] = {}
_NAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*=")

Provider = Literal["auto", "cpu", "cuda"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


def _manual(
    sentence: str, *, low: float | None = None, high: float | None = None, secret: bool = False
) -> dict[str, Any]:
    return {"help": sentence, "low": low, "high": high, "secret": secret}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of the service, with their defaults."""

    model: str = field(
        default=DEFAULT_MODEL,
        metadata=_manual(
            "Artifact to serve, [NAME=]PATH; NAME is what clients call it instead of the manifest's name. Several with "
            "commas, or by the flag again; the first answers requests that name none."
        ),
    )
    host: str = field(
        default="127.0.0.1",
        metadata=_manual("Address to listen on; 0.0.0.0 for every interface."),
    )
    port: int = field(
        default=8000,
        metadata=_manual("TCP port to listen on; 0 takes a free one.", low=0, high=65535),
    )
    provider: Provider = field(
        default="auto",
        metadata=_manual("ONNX Runtime execution provider; auto takes cuda where it can be had."),
    )
    device_id: int = field(default=0, metadata=_manual("CUDA device to use.", low=0))
    workers: int = field(
        default=0,
        metadata=_manual(
            "Engine threads, each with rows of its own; 0 is one for each processor, or one on a GPU.",
            low=0,
            high=1024,
        ),
    )
    threads: int = field(
        default=0,
        metadata=_manual(
            "Threads of one ONNX Runtime call; 0 divides the processors among the workers.",
            low=0,
            high=1024,
        ),
    )
    spinning: bool = field(
        default=False,
        metadata=_manual(
            "Let ONNX Runtime's idle threads spin: quicker on cores of one's own, wasted CPU time elsewhere."
        ),
    )
    max_rows: int = field(
        default=64,
        metadata=_manual("Rows that are decoded at once at most, divided among the workers.", low=1, high=4096),
    )
    max_queue: int = field(
        default=4096,
        metadata=_manual("Inputs that wait at most; more are refused with 429.", low=1),
    )
    max_queue_tokens: int = field(
        default=2**20,
        metadata=_manual(
            "Source tokens that wait at most, targets to be scored included; more are refused with 429.", low=1
        ),
    )
    max_wait: float = field(
        default=0.0,
        metadata=_manual(
            "Seconds to expect in line at most; what would wait longer is refused with 429; 0 is no limit.",
            low=0,
        ),
    )
    max_inputs: int = field(
        default=1024,
        metadata=_manual("Inputs of one call at most; more are refused with 413.", low=1),
    )
    max_connections: int = field(
        default=4096,
        metadata=_manual(
            "Connections that are open at most. For one more the one is closed that has sent nothing whole for the "
            "longest time; where all are being worked for, it is answered 503.",
            low=1,
        ),
    )
    max_body_bytes: int = field(
        default=8 * 2**20,
        metadata=_manual("Size of a request's body at most, in bytes.", low=1024),
    )
    max_bodies_bytes: int = field(
        default=256 * 2**20,
        metadata=_manual(
            "Bytes of the bodies of all requests under way at most; what is more is refused with 429.", low=1024
        ),
    )
    max_answers_bytes: int = field(
        default=256 * 2**20,
        metadata=_manual(
            "Bytes of all large answers at most, from the work for them until they are taken; what could be more is "
            "refused with 429.",
            low=1024,
        ),
    )
    encode_tokens: int = field(
        default=1024,
        metadata=_manual(
            "Source tokens encoded between two decoder steps at most (one input at least).",
            low=1,
        ),
    )
    default_timeout: float = field(
        default=0.0,
        metadata=_manual("Seconds a request may take if it does not say; 0 is no limit.", low=0),
    )
    drain_seconds: float = field(
        default=30.0,
        metadata=_manual("Seconds given to accepted requests after SIGTERM.", low=0),
    )
    api_key_file: str = field(
        default="",
        metadata=_manual("File of the keys that are let in, as transduce key makes them; read again when it changes."),
    )
    api_keys: str = field(
        default="",
        metadata=_manual("The same keys in the setting itself, with commas between them.", secret=True),
    )
    admin_key_file: str = field(
        default="",
        metadata=_manual("File of the keys that open the admin routes, which are not there without one."),
    )
    admin_keys: str = field(
        default="",
        metadata=_manual("The same keys in the setting itself, with commas between them.", secret=True),
    )
    metrics_without_key: bool = field(
        default=False,
        metadata=_manual("Let everyone read /metrics where keys are required."),
    )
    log_level: LogLevel = field(default="info", metadata=_manual("Least serious messages to log."))
    log_format: LogFormat = field(
        default="text", metadata=_manual("Lines of the log: text of names and values, or a JSON object each.")
    )
    traces_endpoint: str = field(
        default="",
        metadata=_manual(
            "URL to which traces are sent by OTLP over HTTP, as http://collector:4318/v1/traces. Needs transduce[otel]."
        ),
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check(spec, getattr(self, spec.name))

    def shown(self) -> dict[str, object]:
        """Every setting by its name, for people to read: of a secret only whether it is set."""
        return {
            spec.name: ("set" if value else "") if spec.metadata["secret"] else value
            for spec in fields(self)
            for value in [getattr(self, spec.name)]
        }

    @property
    def models(self) -> list[tuple[str | None, Path]]:
        """NAME and PATH of each model; NAME is None where the manifest's is to be taken."""
        return [(name, Path(path)) for name, path in map(_split_model, self.model.split(","))]


def add_arguments(
    parser: argparse.ArgumentParser, only: Iterable[str] | None = None, defaults: Mapping[str, object] = _NOTHING
) -> None:
    """One flag for each field (or for those named in `only`); `defaults` are named where they are not the field's own.

    The parser itself has no defaults: a flag that was not given is absent.
    """
    chosen = None if only is None else set(only)
    hints = get_type_hints(Settings)
    for spec in fields(Settings):
        if chosen is not None and spec.name not in chosen:
            continue
        kind, flag = hints[spec.name], "--" + spec.name.replace("_", "-")
        default = _default_text(spec, defaults.get(spec.name, spec.default))
        text = f"{spec.metadata['help']} [{variable(spec.name)}; {default}]".replace("%", "%%")
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(
                flag,
                dest=spec.name,
                action=action,
                default=argparse.SUPPRESS,
                help=text,
            )
        elif spec.name == "model":
            parser.add_argument(
                flag, dest=spec.name, action="append", default=argparse.SUPPRESS, metavar="[NAME=]PATH", help=text
            )
        else:
            metavar = "{" + ",".join(get_args(kind)) + "}" if get_args(kind) else kind.__name__.upper()
            parser.add_argument(
                flag,
                dest=spec.name,
                default=argparse.SUPPRESS,
                metavar=metavar,
                help=text,
            )


def read_settings(
    arguments: argparse.Namespace | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, object] = _NOTHING,
) -> tuple[Settings, list[str]]:
    """Settings from parsed flags, the environment and `defaults`, and warnings for a person to read.

    Raises SettingsError naming the flag or the variable whose value is wrong. An unknown `TRANSDUCE_*` variable is a
    warning, and so is the address that Kubernetes puts into `TRANSDUCE_PORT` for a Service named transduce.
    """
    environ = os.environ if environ is None else environ
    flags: dict[str, object] = {} if arguments is None else vars(arguments)
    known = {spec.name: spec for spec in fields(Settings)}
    hints = get_type_hints(Settings)
    values = dict(defaults)
    warnings: list[str] = []
    for key in sorted(key for key in environ if key.startswith(PREFIX)):
        name, text = key.removeprefix(PREFIX).lower(), environ[key]
        if key == variable("port") and text.startswith(("tcp://", "udp://", "sctp://")):
            warnings.append(
                f"{key} holds the address of a Kubernetes service, not a port: ignored. Set enableServiceLinks: false."
            )
        elif name not in known or key != variable(name):
            warnings.append(f"{key} is not a setting of this program: ignored. See transduce serve --help.")
        elif name not in flags:
            values[name] = _parse(known[name], hints[name], text, key)
    for name, value in flags.items():
        if name in known:
            flag = "--" + name.replace("_", "-")
            value = ",".join(value) if isinstance(value, list) else value
            values[name] = _parse(known[name], hints[name], value, flag) if isinstance(value, str) else value
    return Settings(**values), warnings  # type: ignore[arg-type]  # each value was parsed to its field's type


def parse_settings(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
    """Settings from a command line of flags alone. Raises SettingsError for an unknown flag."""
    parser = _Parser(prog="transduce serve", add_help=False, allow_abbrev=False)
    add_arguments(parser)
    return read_settings(parser.parse_args(list(argv)), environ)


def variable(name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + name.upper()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SettingsError(f"{message}. See transduce serve --help.")


def _default_text(spec: Field[Any], value: object) -> str:
    if spec.name == "model":
        return "default: the artifact shipped with the service"
    assert value is not MISSING
    shown = str(value).lower() if isinstance(value, bool) else value
    return "default: none" if shown == "" else f"default: {shown}"


def _parse(spec: Field[Any], kind: Any, text: str, origin: str) -> object:
    try:
        if kind is bool:
            words = {
                "1": True,
                "true": True,
                "yes": True,
                "on": True,
                "0": False,
                "false": False,
                "no": False,
                "off": False,
            }
            value: object = words[text.strip().lower()]
        elif kind is int:
            value = int(text)
        elif kind is float:
            value = float(text)
        else:
            value = text
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise SettingsError(f"{origin}: {text!r} is not {wanted}.") from None
    _check(spec, value, origin)
    return value


def _check(spec: Field[Any], value: object, origin: str | None = None) -> None:
    origin = origin or spec.name
    choices = get_args(get_type_hints(Settings)[spec.name])
    if choices and value not in choices:
        raise SettingsError(f"{origin}: {value!r} is not one of {', '.join(choices)}.")
    low, high = spec.metadata["low"], spec.metadata["high"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if spec.name == "model" and not all(_split_model(one)[1] for one in str(value).split(",")):
            raise SettingsError(f"{origin}: {value!r} is not [NAME=]PATH.")
    elif not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise SettingsError(f"{origin}: {value} is out of range, it has to be {bounds}.")


def _split_model(text: str) -> tuple[str | None, str]:
    name, path = text.partition("=")[::2] if _NAMED.match(text) else (None, text)
    return name, path

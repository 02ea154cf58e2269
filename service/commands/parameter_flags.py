"""Parameters of a generation as flags: `num_beams` is `--num-beams`, with the same range and the same sentence."""

import argparse
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, get_args

from pydantic import ValidationError

from service.errors import SettingsError
from service.parameters import Parameters

_NAME = re.compile(r"(?:--)?\b(" + "|".join(name for name in Parameters.model_fields if "_" in name) + r")\b")
"""Parameters in a sentence, but for those that are words of the language."""

_METAVARS: dict[type, str] = {bool: "{true,false,never}", int: "N", float: "X"}


def add_parameters(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """One flag for each. One that was not given is absent; one that may hold several texts may come several times."""
    for name in names:
        field = Parameters.model_fields[name]
        sentence = named_as_flags(str(field.description).replace("`", "")).replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(_flag(name), action="store_true", default=argparse.SUPPRESS, help=sentence)
            continue
        kinds = set(_kinds(field.annotation))
        metavar = next((word for kind, word in _METAVARS.items() if kind in kinds), "TEXT")
        default = "" if field.default in (None, [], "") else f" [default: {str(field.default).lower()}]"
        parser.add_argument(
            _flag(name),
            type=partial(_value, name),
            action="append" if list[str] in kinds else "store",
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=sentence + default,
        )


def read_parameters(arguments: argparse.Namespace, names: Iterable[str]) -> Parameters:
    """What was given, of these names; SettingsError for a flag that came too often."""
    given = vars(arguments)
    try:
        return Parameters.model_validate({name: given[name] for name in names if name in given})
    except ValidationError as error:
        found = error.errors()[0]
        raise SettingsError(f"{_flag(str(found['loc'][0]))}: {found['msg']}") from None


def named_as_flags(sentence: str) -> str:
    """The sentence with the parameters that it names as flags."""
    return _NAME.sub(lambda found: _flag(found[1]), sentence)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a field may have."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _value(name: str, text: str) -> Any:
    """What a flag's text says, checked as in a request."""
    kinds = set(_kinds(Parameters.model_fields[name].annotation))
    value: Any = os.fsencode(text).decode("utf-8", errors="replace")  # without the surrogates of argv
    if bool in kinds:
        value = {"true": True, "false": False}.get(text, text)
    elif kinds & {int, float}:
        value = _number(text)
    try:
        Parameters.model_validate({name: value})
    except ValidationError as error:
        message = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise argparse.ArgumentTypeError(named_as_flags(message)) from None
    return value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

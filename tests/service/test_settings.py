"""Each setting is a flag, a variable and a sentence; nothing wrong is taken in silence."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import Settings, add_arguments, parse_settings, read_settings, variable

FIELDS = dataclasses.fields(Settings)


def test_defaults_stand_without_flags_and_variables() -> None:
    """And they are what the contract promises."""
    settings, warnings = parse_settings([], {})
    assert settings == Settings()
    assert warnings == []
    assert (settings.port, settings.host) == (8000, "127.0.0.1")
    assert settings.max_queue >= 1024
    assert settings.max_inputs == 1024
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag_a_variable_and_a_sentence(field: dataclasses.Field[object]) -> None:
    """The help names the variable, and the variable does what the flag does."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    help_text = " ".join(parser.format_help().split())
    flag = "--" + field.name.replace("_", "-")
    assert flag in help_text
    assert variable(field.name) in help_text
    assert str(field.metadata["help"]).endswith(".")
    others = {"bool": "true", "float": "1.5", "Provider": "cpu", "LogLevel": "debug", "LogFormat": "json", "str": "x"}
    other = (
        str(field.default + 1) if isinstance(field.default, int) and field.type == "int" else others[str(field.type)]
    )
    by_variable, warnings = parse_settings([], {variable(field.name): other})
    by_flag, _ = parse_settings([flag] if field.type == "bool" else [flag, other], {})
    assert by_variable == by_flag != Settings()
    assert warnings == []


def test_a_flag_goes_before_its_variable() -> None:
    """And a variable before the default."""
    environ = {"TRANSDUCE_PORT": "1", "TRANSDUCE_MAX_ROWS": "3", "TRANSDUCE_SPINNING": "yes", "HOME": "/"}
    settings, _ = parse_settings(["--port", "2", "--no-spinning"], environ)
    assert (settings.port, settings.max_rows, settings.spinning) == (2, 3, False)


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--max-row", "3"], {}, "unrecognized arguments: --max-row"),
        (["--nonsense"], {}, "--nonsense"),
        (["--max-rows", "0"], {}, "--max-rows: 0 is out of range, it has to be from 1"),
        (["--port", "65536"], {}, "--port: 65536 is out of range, it has to be from 0 to 65535"),
        (["--port", "http"], {}, "--port: 'http' is not a whole number"),
        (["--default-timeout", "nan"], {}, "--default-timeout: nan is out of range"),
        (["--drain-seconds", "soon"], {}, "--drain-seconds: 'soon' is not a number"),
        (["--provider", "tpu"], {}, "--provider: 'tpu' is not one of auto, cpu, cuda"),
        (["--model", ""], {}, "--model: '' is not"),
        (["--model", "name="], {}, "--model: 'name=' is not"),
        ([], {"TRANSDUCE_THREADS": "-1"}, "TRANSDUCE_THREADS: -1 is out of range"),
        ([], {"TRANSDUCE_SPINNING": "perhaps"}, "TRANSDUCE_SPINNING: 'perhaps' is not true or false"),
        ([], {"TRANSDUCE_PORT": ""}, "TRANSDUCE_PORT: '' is not a whole number"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(argv: list[str], environ: dict[str, str], message: str) -> None:
    """The message says which setting, which value, and what would be right."""
    with pytest.raises(SettingsError) as caught:
        parse_settings(argv, environ)
    assert message in str(caught.value)


def test_unknown_variables_are_warnings() -> None:
    """Another program's variable must not stop the service, a misspelt one must not go unseen."""
    settings, warnings = parse_settings([], {"TRANSDUCE_MAX_ROW": "3", "TRANSDUCE_max_rows": "3"})
    assert settings == Settings()
    assert len(warnings) == 2
    assert "TRANSDUCE_MAX_ROW is not a setting" in warnings[0]


def test_the_address_that_kubernetes_injects_is_tolerated() -> None:
    """A Service named transduce makes TRANSDUCE_PORT=tcp://..., and it is not our port."""
    environ = {"TRANSDUCE_PORT": "tcp://10.0.0.1:8000", "TRANSDUCE_PORT_8000_TCP": "tcp://10.0.0.1:8000"}
    settings, warnings = parse_settings([], environ)
    assert settings.port == 8000
    assert "enableServiceLinks" in warnings[0]
    assert len(warnings) == 2


@pytest.mark.parametrize(
    ("model", "name", "path"),
    [
        ("a/b", None, "a/b"),
        ("de=a/b", "de", "a/b"),
        ("./x=1/b", None, "./x=1/b"),
        ("en-de.v2=/x=y", "en-de.v2", "/x=y"),
    ],
)
def test_a_model_may_have_a_name(model: str, name: str | None, path: str) -> None:
    """[NAME=]PATH; what cannot be a name belongs to the path."""
    assert Settings(model=model).models == [(name, Path(path))]


def test_several_models_come_with_commas_or_with_the_flag_again() -> None:
    """In this order: the first answers requests that name none. Each has to be one."""
    wanted = [("de", Path("a/b")), (None, Path("c"))]
    assert parse_settings([], {"TRANSDUCE_MODEL": "de=a/b,c"})[0].models == wanted
    assert parse_settings(["--model", "de=a/b", "--model", "c"], {"TRANSDUCE_MODEL": "x"})[0].models == wanted
    with pytest.raises(SettingsError, match="PATH"):
        parse_settings(["--model", "de=a/b,"], {})


def test_a_command_takes_only_the_settings_it_uses() -> None:
    """Its other arguments stay its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    add_arguments(parser, only=("model", "threads"))
    settings, _ = read_settings(parser.parse_args(["x", "--threads", "3"]), {})
    assert settings == Settings(threads=3)
    assert "--port" not in parser.format_help()


def test_an_object_made_by_hand_is_checked_too() -> None:
    """The bounds are the fields', not the parser's."""
    with pytest.raises(SettingsError, match="max_rows: 0"):
        Settings(max_rows=0)


def test_a_command_may_have_defaults_of_its_own() -> None:
    """A flag and a variable go before them, and its manual names them."""
    defaults = {"max_rows": 256}
    assert read_settings(environ={}, defaults=defaults)[0].max_rows == 256
    assert read_settings(environ={"TRANSDUCE_MAX_ROWS": "8"}, defaults=defaults)[0].max_rows == 8
    assert read_settings(argparse.Namespace(max_rows="9"), {}, defaults)[0].max_rows == 9
    parser = argparse.ArgumentParser()
    add_arguments(parser, ["max_rows"], defaults)
    assert "[TRANSDUCE_MAX_ROWS; default: 256]" in " ".join(parser.format_help().split())

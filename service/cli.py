"""The program `transduce`. Finds its subcommands by entry points, so that no package need import another.

Knows no subcommand: each is a function `register(subparsers)` in the group `transduce.commands`, which adds its parser
and sets `func`, a function from the parsed arguments to an exit status. Nothing heavy is imported before one runs.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from service import __version__
from service.errors import StartupError, TransduceError

GROUP = "transduce.commands"

_OWN = ("serve", "translate", "check", "bench", "key")

_OF_OTHER_PACKAGES = ("train", "evaluate", "export")
"""Named so that an installation of the service alone can say what they need."""

_EXTRA_OF = {
    "onnxruntime": "transduce[cpu]' (or 'transduce[gpu]",
    "model": "transduce[train]",
    "export": "transduce[train]",
    "torch": "transduce[train]",
    "onnx": "transduce[train]",
    "onnxscript": "transduce[train]",
    "sacrebleu": "transduce[train]",
    "matplotlib": "transduce[train]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 failed, 2 wrongly called or cannot start, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="transduce",
        description="Train, export and serve encoder-decoder transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"transduce {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    absent = _register(subparsers)
    if arguments and arguments[0] in absent:
        return _fail(absent[arguments[0]])
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.func(parsed) or 0)
    except ModuleNotFoundError as error:
        if (sentence := _remedy(error)) is None:
            raise
        return _fail(sentence)
    except StartupError as error:
        return _fail(str(error))
    except TransduceError as error:
        return _fail(str(error), status=1)
    except KeyboardInterrupt:
        return 130


def _register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> dict[str, str]:
    """Add every command that is installed; of the others, the sentence that says what they need."""
    absent = {name: _absent(name, "transduce[train]") for name in _OF_OTHER_PACKAGES}
    for point in _commands():
        try:
            register = point.load()
        except ModuleNotFoundError as error:
            if (sentence := _remedy(error)) is None:
                raise
            absent[point.name] = sentence
        else:
            absent.pop(point.name, None)
            register(subparsers)
    for name, sentence in absent.items():
        subparsers.add_parser(name, help=f"not installed here: {sentence.partition('; ')[2]}", add_help=False)
    return absent


def _commands() -> list[EntryPoint]:
    """The commands of every installed package, the service's own first; those even where nothing is installed."""
    found = {name: EntryPoint(name, f"service.commands.{name}:register", GROUP) for name in _OWN}
    found |= {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}
    return list(found.values())


def _remedy(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").partition(".")[0]
    return _absent(package, _EXTRA_OF[package]) if package in _EXTRA_OF else None


def _absent(name: str, extra: str) -> str:
    return f"{name} is not installed; pip install '{extra}'"


def _fail(message: str, status: int = 2) -> int:
    print(f"transduce: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

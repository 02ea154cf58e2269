"""`transduce translate`: a file or standard input, line by line, through the engine that serves."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from service.errors import SettingsError, ValidationFailed
from service.settings import add_arguments, read_settings

_SETTINGS = ("model", "provider", "device_id", "workers", "threads", "spinning", "max_rows", "encode_tokens")
DEFAULTS = {"max_rows": 256, "max_queue_tokens": 2**62}
"""What differs from the service's defaults: nobody waits for a single line, so more of them share a step; and what
waits is bounded in lines, by who reads them.
"""

_PARAMETERS = (
    "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "early_stopping", "do_sample", "temperature",
    "top_k", "top_p", "seed", "repetition_penalty", "no_repeat_ngram_size", "stop", "suppress", "prefix",
)  # fmt: skip
"""Those that make sense where one line comes out of one line."""

_STANDARD_INPUT, _STANDARD_OUTPUT = 0, 1


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "translate",
        help="translate lines of text",
        description="Translate the lines of a file or of standard input: as many lines out as in, in order; "
        "an empty line stays empty.",
        allow_abbrev=False,
    )
    parser.add_argument("--input", default="-", metavar="FILE", help="text, a line each; - is standard input (default)")
    parser.add_argument("--output", default="-", metavar="FILE", help="where to write; - is standard output (default)")
    parser.add_argument("--truncate", action="store_true", help="cut lines that are too long instead of stopping there")
    add_arguments(parser, only=_SETTINGS, defaults=DEFAULTS)
    parser.set_defaults(func=run)
    parse = parser.parse_known_args

    def parse_with_parameters(*args: Any, **options: Any) -> Any:
        # Their flags are made of the HTTP schema, whose library is not loaded for the help of other commands.
        from service.commands.parameter_flags import add_parameters

        parser.parse_known_args = parse  # type: ignore[method-assign]  # the flags are added once
        add_parameters(parser.add_argument_group("generation", "the parameters of POST /v1/generate"), _PARAMETERS)
        return parse(*args, **options)

    # The one call by which argparse enters a subcommand's parser: it has no hook for flags that are added on the way.
    parser.parse_known_args = parse_with_parameters  # type: ignore[method-assign]  # an instance's own, on purpose


def run(arguments: argparse.Namespace) -> int:
    """Translate; the exit status."""
    settings, warnings = read_settings(arguments, defaults=DEFAULTS)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)

    from service.commands.parameter_flags import named_as_flags, read_parameters
    from service.served_model import load_only
    from service.translation import Translation

    model = load_only(settings)
    try:
        translation = Translation(model, read_parameters(arguments, (*_PARAMETERS, "truncate")))
    except ValidationFailed as error:
        raise SettingsError(named_as_flags(str(error))) from None
    with contextlib.ExitStack() as files:
        source = _open(arguments.input, "rb", _STANDARD_INPUT)
        if arguments.input != "-":
            files.enter_context(source)
        # Standard input stays open: a thread may be waiting in it for the next line, and closing would wait for that.
        _refuse_same_file(arguments.input, arguments.output)
        target = files.enter_context(_open(arguments.output, "wb", _STANDARD_OUTPUT))
        model.engine.start()
        try:
            model.engine.wait_ready()
            for line in _with_progress(translation.run(source), arguments):
                target.write(line.encode("utf-8", errors="replace") + b"\n")
                if arguments.output == "-":
                    target.flush()
            target.flush()
        except BrokenPipeError:
            # The reader has gone (`| head`): no fault of anybody's, and what is buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())
            return 128 + signal.SIGPIPE
        finally:
            model.engine.stop()
    return 0


def _open(name: str, mode: str, standard: int) -> BinaryIO:
    try:
        # The descriptor itself and not sys.stdin: a thread may be reading it when the program ends.
        return open(standard if name == "-" else name, mode, closefd=name != "-")  # type: ignore[return-value]  # always binary
    except OSError as error:
        raise SettingsError(f"cannot open {name}: {error.strerror}") from None


def _refuse_same_file(source: str, target: str) -> None:
    if "-" not in (source, target) and os.path.exists(target) and os.path.samefile(source, target):
        raise SettingsError(f"--input and --output are the same file ({target}), which would empty it")


def _with_progress(lines: Iterator[str], arguments: argparse.Namespace) -> Iterator[str]:
    """A progress bar on a terminal, unless the terminal is where the lines go."""
    if not sys.stderr.isatty() or (arguments.output == "-" and sys.stdout.isatty()):
        return lines
    from tqdm import tqdm

    total = None if arguments.input == "-" else _count_lines(arguments.input)
    return iter(tqdm(lines, total=total, unit=" lines", dynamic_ncols=True))


def _count_lines(name: str) -> int:
    with open(name, "rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))

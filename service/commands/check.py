"""`transduce check`: whether an artifact is whole and does, on this machine, what its manifest says."""

import argparse
import sys

from service.errors import TransduceError
from service.settings import add_arguments, read_settings


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "check",
        help="verify an artifact",
        description="Verify an artifact: manifest, files and checksums, graphs against manifest, self-test. "
        "Exit status 0 if all is well, 1 if not.",
        allow_abbrev=False,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="directory of the artifact")
    add_arguments(parser, only=("provider", "device_id", "threads"))
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line per check, and stop at the first that fails."""
    arguments.model = arguments.artifact
    settings, warnings = read_settings(arguments)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)

    from service.served_model import load_only

    check = "manifest, files"
    try:
        model = load_only(settings)
        artifact = model.artifact
        manifest = artifact.manifest
        size = sum((artifact.path / file).stat().st_size for file in manifest.files)
        _line("manifest", f"{artifact.name} version {manifest.version}, format {manifest.format_version}")
        _line("files", f"{len(manifest.files)} files, {size / 1e6:.1f} MB, checksums right")
        _line("tokenizer", f"{manifest.vocab_size} tokens at most")
        check = "graphs, self-test"
        model.engine.start()
        try:
            model.engine.wait_ready()
            facts = ", ".join(f"{key} {value}" for key, value in model.engine.describe().items())
        finally:
            model.engine.stop()
        _line("graphs", f"as the manifest says ({facts})")
        _line("self-test", f"{len(manifest.self_test)} sentences, answers right")
    except TransduceError as error:
        _line(check, f"FAILED: {error}")
        return 1
    return 0


def _line(check: str, found: str) -> None:
    print(f"{check:<18} {found}")

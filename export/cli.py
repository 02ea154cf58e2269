"""`transduce export`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the subcommand. torch and onnx are imported only when it runs."""
    parser = subparsers.add_parser(
        "export",
        help="freeze a checkpoint to an artifact that `transduce serve` serves",
        description="Export a checkpoint of `transduce train` to ONNX graphs and check them against PyTorch on real "
        "sentences. The artifact is written only if the check holds. Exit status 1 if it does not, 2 if the export "
        "cannot be done.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file written by `transduce train`")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="directory to write")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), default="int8",
        help="of the CPU variant; the CUDA variant computes in fp16, or in fp32 if this is fp32 (default: int8)",
    )  # fmt: skip
    parser.add_argument(
        "--sentences", type=Path, required=True, metavar="FILE",
        help="at least 500 sentences to check on, that training did not see: TSV of source, tab, translation; plain or "
        "gzipped",
    )  # fmt: skip
    parser.add_argument("--no-cuda", action="store_true", help="leave out the variant for GPUs")
    parser.add_argument("--overwrite", action="store_true", help="replace ARTIFACT if it exists")
    parser.add_argument("--name", help="name of the model (default: as in the checkpoint)")
    parser.add_argument(
        "--version",
        dest="artifact_version",
        metavar="VERSION",
        help="version of the model (default: as in the checkpoint, or 1)",
    )
    parser.add_argument(
        "--alignment-layer", type=int, metavar="N",
        help="decoder layer, counted from 0, whose attention to the source is the alignment (default: the last)",
    )  # fmt: skip
    parser.set_defaults(func=run_export)


def run_export(arguments: argparse.Namespace) -> int:
    """Export as told; the exit status of the program."""
    from export.errors import ExportError
    from export.exporter import ExportRequest, export_artifact
    from model.checkpoint import CheckpointError
    from model.config import ConfigurationError

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("transduce.export").setLevel(logging.INFO)
    try:
        manifest = export_artifact(
            ExportRequest(
                checkpoint=arguments.checkpoint,
                artifact=arguments.artifact,
                precision=arguments.precision,
                sentences=arguments.sentences,
                cuda=not arguments.no_cuda,
                overwrite=arguments.overwrite,
                name=arguments.name,
                version=arguments.artifact_version,
                alignment_layer=arguments.alignment_layer,
            )
        )
    except (ExportError, CheckpointError, ConfigurationError, OSError) as error:
        print("transduce export:", *str(error).split(), file=sys.stderr)  # other libraries' messages have several lines
        return error.exit_status if isinstance(error, ExportError) else 2
    size = sum(path.stat().st_size for path in arguments.artifact.rglob("*") if path.is_file())
    print(f"{arguments.artifact}: {manifest['name']} version {manifest['version']}, {size / 1e6:.1f} MB")
    return 0

"""manifest.json: what the service has to know of an artifact, and what people want to know of it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.state import state_tensors
from model.checkpoint import Checkpoint

FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def new_manifest(
    checkpoint: Checkpoint, name: str | None, version: str | None, alignment_layer: int | None
) -> dict[str, Any]:
    """The manifest of a checkpoint's artifact, yet without variants, parity, self-test and files.

    None stands for the checkpoint's name and version, and for the last decoder layer. Raises ExportError.
    """
    config, metadata = checkpoint.recipe.model, checkpoint.metadata
    name = name or str(metadata.get("name", ""))
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"{name!r} is no name for an artifact (letters, digits, '.', '_' and '-', at most 100). "
            "Give one with --name."
        )
    last = config.decoder_layers - 1 if config.decoder_layers else None
    if alignment_layer is not None and last is None:
        raise ExportError("an encoder alone has no alignments: leave --alignment-layer out")
    if alignment_layer is not None and last is not None and not 0 <= alignment_layer <= last:
        raise ExportError(
            f"there is no decoder layer {alignment_layer} to take the alignment from: this model has 0 to {last}. "
            "Give one of them with --alignment-layer, or leave it out for the last."
        )
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "version": version or str(metadata.get("version", "1")),
        "description": str(metadata.get("description", "")),
        "languages": {
            side: str(metadata[f"{side}_language"]) for side in ("source", "target") if metadata.get(f"{side}_language")
        },
        "license": str(metadata.get("license", "")),
        "training_data": str(metadata.get("training_data", "")),
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "producer": f"transduce {_own_version()}",
        "architecture": dataclasses.asdict(config),
        "embedding_size": config.d_model,
        "vocab_size": config.vocab_size,
        "max_source_tokens": config.max_source_tokens,
        "max_target_tokens": config.max_target_tokens,
        "special_tokens": {"pad_id": config.pad_id, "bos_id": config.bos_id, "eos_id": config.eos_id},
        "labels": list(config.labels),
        "state": state_tensors(config),
        "alignment_layer": last if alignment_layer is None else alignment_layer,
        "variants": {},
        "parity": {},
        "self_test": [],
        "files": {},
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("transduce")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "(not installed)"


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file under the directory but the manifest, by its path with forward slashes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, indented, in UTF-8."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (directory / "manifest.json").write_text(text + "\n", encoding="utf-8")

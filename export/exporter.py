"""An artifact from a checkpoint: graphs, parity check, manifest. All of it appears at once, or nothing does."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.artifact_decoder import ArtifactDecoder
from export.encoder_parity import ArtifactEncoder, EncoderFigures, measure_encoder
from export.errors import ExportError, ParityError
from export.graphs import write_decoder, write_encoder, write_reorder, write_scorer
from export.manifest import checksums, new_manifest, write_manifest
from export.parity import Figures, measure, reference_translations
from export.profile import CPU, CUDA, Precision, Profile
from export.sentences import Sentences
from model.checkpoint import Checkpoint
from model.transformer import Transformer

logger = logging.getLogger("transduce.export")

SELF_TESTS = 8


@dataclass(frozen=True)
class ExportRequest:
    """What to export, where to, and how."""

    checkpoint: Path
    artifact: Path
    precision: Precision
    sentences: Path
    cuda: bool = True
    overwrite: bool = False
    name: str | None = None
    version: str | None = None
    alignment_layer: int | None = None
    """The decoder layer whose attention to the source is the alignment, counted from 0; None for the last."""


def export_artifact(request: ExportRequest) -> dict[str, Any]:
    """Export, check and write an artifact; returns its manifest. Raises ExportError, and then has written nothing."""
    destination = request.artifact
    if destination.exists() and not request.overwrite:
        raise ExportError(f"{destination} exists. Choose another place, or replace it with --overwrite.")
    checkpoint = Checkpoint.load(request.checkpoint)
    manifest = new_manifest(checkpoint, request.name, request.version, request.alignment_layer)
    sentences = Sentences.read(request.sentences, checkpoint.tokenizer, checkpoint.recipe.model)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the last step is a rename within one file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        partial.chmod(0o755)
        _fill(partial, manifest, checkpoint, request, sentences)
        _put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _fill(
    directory: Path, manifest: dict[str, Any], checkpoint: Checkpoint, request: ExportRequest, sentences: Sentences
) -> None:
    """Write every file of the artifact into the directory. Raises ParityError."""
    model = checkpoint.transformer()
    (directory / "tokenizer.json").write_text(checkpoint.tokenizer.to_str(), encoding="utf-8")
    profiles = {"cpu": CPU[request.precision]} | ({"cuda": CUDA[request.precision]} if request.cuda else {})
    for variant, profile in profiles.items():
        logger.info("exporting the %s variant (%s)", variant, profile.precision)
        manifest["variants"][variant] = _write_graphs(model, profile, manifest["alignment_layer"], variant, directory)
    write_manifest(directory, manifest)

    figures_of: dict[str, Figures] | dict[str, EncoderFigures]
    if model.config.decoder_layers:
        logger.info("translating %d sentences with PyTorch", len(sentences.sources))
        reference = reference_translations(model, checkpoint.tokenizer, sentences)
        decoders = {variant: ArtifactDecoder(directory, variant) for variant in profiles}
        figures_of = {
            variant: measure(model, decoders[variant], profile.precision, checkpoint.tokenizer, sentences, reference)
            for variant, profile in profiles.items()
        }
        manifest["self_test"] = _self_test(sentences, decoders)
    else:
        encoders = {
            variant: ArtifactEncoder(directory / manifest["variants"][variant]["encoder"]) for variant in profiles
        }
        figures_of = {
            variant: measure_encoder(model, encoders[variant], profile.precision, sentences.sources)
            for variant, profile in profiles.items()
        }
        if model.config.labels:
            manifest["self_test"] = _labels_of_self_test(sentences, encoders, model.config.labels)
    failures = []
    for variant, profile in profiles.items():
        figures = figures_of[variant]
        logger.info("%s: %s", variant, figures)
        manifest["parity"][variant] = {
            "precision": profile.precision,
            "weights": "int8" if profile.integer_products else profile.stored,
            "measured_on": "CPUExecutionProvider",
            **figures.describe(),
        }
        failures += [f"{variant}: {failure} (measured: {figures})" for failure in figures.failures()]
    if failures:
        raise ParityError("the graphs differ from the model: " + "; ".join(failures) + ". Nothing was written.")
    manifest["files"] = checksums(directory)
    write_manifest(directory, manifest)


def _write_graphs(
    model: Transformer, profile: Profile, alignment_layer: int | None, variant: str, directory: Path
) -> dict[str, str]:
    """Write the graphs of a variant; returns its entry in the manifest."""
    if model.config.decoder_layers == 0:
        entry = {"encoder": f"{variant}/encoder.onnx"}
        write_encoder(model, profile, directory / entry["encoder"])
        return {"precision": profile.precision, **entry}
    entry = {name: f"{variant}/{name}.onnx" for name in ("encoder", "decoder", "scorer")}
    write_encoder(model, profile, directory / entry["encoder"])
    write_decoder(model, profile, directory / entry["decoder"])
    assert alignment_layer is not None
    write_scorer(model, profile, alignment_layer, directory / entry["decoder"], directory / entry["scorer"])
    if variant == "cuda":
        entry["reorder"] = f"{variant}/reorder.onnx"
        write_reorder(model.config, profile, directory / entry["reorder"])
    return {"precision": profile.precision, **entry}


def _self_test(sentences: Sentences, decoders: dict[str, ArtifactDecoder]) -> list[dict[str, Any]]:
    """Sentences from the shortest to the longest, with each variant's greedy answer."""
    chosen = _for_self_test(sentences)
    answers = {
        variant: decoder.greedy([sentences.sources[i] for i in chosen], batch_rows=1)
        for variant, decoder in decoders.items()
    }
    return [
        {
            "source": sentences.texts[i],
            "source_ids": sentences.sources[i],
            "target_ids": {variant: generated[place].ids for variant, generated in answers.items()},
        }
        for place, i in enumerate(chosen)
    ]


def _labels_of_self_test(
    sentences: Sentences, encoders: dict[str, ArtifactEncoder], labels: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The same with each variant's label."""
    chosen = _for_self_test(sentences)
    found = {
        variant: [labels[encoder.labels([sentences.sources[i]])[0]] for i in chosen]
        for variant, encoder in encoders.items()
    }
    return [
        {
            "source": sentences.texts[i],
            "source_ids": sentences.sources[i],
            "labels": {variant: answers[place] for variant, answers in found.items()},
        }
        for place, i in enumerate(chosen)
    ]


def _for_self_test(sentences: Sentences) -> list[int]:
    """Numbers of sentences from the shortest to the longest."""
    order = sorted(range(len(sentences.sources)), key=lambda i: len(sentences.sources[i]))
    return [order[round(n * (len(order) - 1) / (SELF_TESTS - 1))] for n in range(SELF_TESTS)]


def _put_in_place(partial: Path, destination: Path) -> None:
    """Rename the finished directory to its place; what stood there is removed only after that worked."""
    if not destination.exists():
        os.rename(partial, destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent)) / "artifact"
    os.rename(destination, old)
    try:
        os.rename(partial, destination)
    except OSError:
        os.rename(old, destination)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)

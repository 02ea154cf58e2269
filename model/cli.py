"""`transduce train` and `transduce evaluate`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ConfigurationError, TransformerConfig
from model.recipe import read_recipe

if TYPE_CHECKING:  # torch is imported only when a command runs
    from model.checkpoint import Checkpoint
    from model.evaluation import Evaluation


def register_train(subparsers: Any) -> None:
    """Add `train`. torch is imported only when it runs."""
    train = subparsers.add_parser(
        "train",
        help="train a transformer on parallel text or on labelled text",
        description="Train a transformer on parallel text, or on text with labels. "
        "A stopped run continues from OUTPUT/last.pt with --resume.",
    )
    train.add_argument(
        "--recipe", type=Path, required=True, help="TOML file with the tables [model], [training], [metadata]"
    )
    train.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="one TSV file (source, tab, target) or two aligned files; plain or gzipped",
    )  # fmt: skip
    train.add_argument("--valid", type=Path, nargs="+", metavar="FILE", help="validation pairs, in the same form")
    train.add_argument(
        "--holdout", type=float, default=0.0, metavar="SHARE",
        help="without --valid: hold back this share of the sentences for validation, and as much for OUTPUT/test.tsv",
    )  # fmt: skip
    train.add_argument("--output", type=Path, required=True, help="directory of the run: checkpoints, log, picture")
    train.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="begin with the weights and the tokenizer of this model"
    )
    train.add_argument(
        "--teacher", type=Path, nargs="+", default=[], metavar="CHECKPOINT",
        help="learn from this model's distributions, or from the mean of several models' "
        "(training.distillation_weight), with their tokenizer",
    )  # fmt: skip
    train.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="change one field of the recipe (TOML value)",
    )
    train.add_argument("--threads", type=int, default=0, help="CPU threads (0: as many as there are cores)")
    train.set_defaults(func=run_train)


def register_evaluate(subparsers: Any) -> None:
    """Add `evaluate`. torch is imported only when it runs."""
    evaluate = subparsers.add_parser(
        "evaluate",
        help="BLEU, chrF and speed of a checkpoint or an artifact",
        description="Translate the sources of a file and score them by sacrebleu against all references there.",
    )
    evaluate.add_argument(
        "model", type=Path, nargs="+", metavar="MODEL",
        help="a checkpoint of `transduce train`, or the directory of an artifact; several checkpoints of one tokenizer "
        "translate together, by the mean of their probabilities",
    )  # fmt: skip
    evaluate.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="one TSV file (source, tab, reference) or two aligned files; plain or gzipped",
    )  # fmt: skip
    evaluate.add_argument(
        "--measure", choices=("bleu", "retrieval", "accuracy"),
        help="BLEU of translations, which a checkpoint or an artifact can be asked for; of a checkpoint, in per cent: "
        "retrieval of each source's translation among the first 1,000, or accuracy of labels "
        "(default: what the model is for)",
    )  # fmt: skip
    evaluate.add_argument(
        "--bleu-tokenize", choices=("13a", "intl", "char", "zh", "none"), default="13a",
        help="sacrebleu's tokenisation (default 13a); none for texts that are tokenised already",
    )  # fmt: skip
    evaluate.add_argument(
        "--output", type=Path, metavar="FILE", help="write the translations, a line for each usable pair of --data"
    )
    evaluate.add_argument("--num-beams", type=int, default=1, help="beam width; 1 is greedy (default)")
    evaluate.add_argument(
        "--length-penalty", type=float, default=1.0, help="exponent of the length that scores are divided by"
    )
    evaluate.add_argument("--samples", type=int, default=5, help="print so many translations beside their references")
    evaluate.add_argument("--limit", type=int, default=0, help="only the first so many sources (0: all)")
    evaluate.add_argument("--threads", type=int, default=0, help="CPU threads (0: as many as there are cores)")
    evaluate.set_defaults(func=run_evaluate)


def _purpose(config: TransformerConfig) -> str:
    """What a model is measured by."""
    return "accuracy" if config.labels else "bleu" if config.decoder_layers else "retrieval"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def run_train(arguments: argparse.Namespace) -> int:
    """Train as told; the exit status of the program."""
    import torch
    from torch import distributed
    from tqdm.contrib.logging import logging_redirect_tqdm

    from model.checkpoint import Checkpoint, CheckpointError
    from model.data import BadRows, Corpus, DataError, grouped_references, read_pairs, split_of
    from model.devices import start_processes
    from model.tokenizer import tokenizer_from_json, train_tokenizer
    from model.training import Trainer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logger = logging.getLogger("transduce.train")
    run: Path = arguments.output
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe, metadata = read_recipe(arguments.recipe, arguments.set)
        last = Checkpoint.load(run / "last.pt") if arguments.resume else None
        start = Checkpoint.load(arguments.init) if arguments.init else None
        teachers = [Checkpoint.load(path) for path in arguments.teacher]
        if (arguments.valid is None) == (arguments.holdout == 0.0):
            raise ConfigurationError("give either --valid FILE or --holdout SHARE")
        if not 0.0 <= arguments.holdout < 0.5:
            raise ConfigurationError(f"--holdout must be at least 0 and below 0.5, not {arguments.holdout}")
        if last is None and (run / "last.pt").exists():
            raise ConfigurationError(
                f"{run} holds a run already: continue it with --resume, or choose another --output"
            )
        if arguments.threads < 0:
            raise ConfigurationError(f"--threads must be at least 0, not {arguments.threads}")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        run.mkdir(parents=True, exist_ok=True)
        device = start_processes()

        bad = BadRows()
        share = arguments.holdout
        corpus_path = run / "corpus.bin" if rank == 0 else run / f"corpus.{rank}.bin"
        held: dict[str, list[tuple[str, str]]] = {"valid": [], "test": []}

        def training_pairs() -> Any:
            for source, target in read_pairs(tuple(arguments.data), bad):
                split = split_of(source, share) if share else "train"
                if split == "train":
                    yield source, target
                else:
                    held[split].append((source, target))

        corpus = Corpus.write(corpus_path, training_pairs())
        if arguments.valid:
            held["valid"] = list(read_pairs(tuple(arguments.valid), bad))
        if bad.counts:
            logger.warning("left out: %s", bad)
        if not held["valid"]:
            raise DataError("no validation pair: raise --holdout, or give --valid")
        if rank == 0:
            for name, pairs in held.items():
                if pairs:
                    (run / f"{name}.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in pairs), encoding="utf-8")
        given = [checkpoint.tokenizer for checkpoint in (last, start, *teachers) if checkpoint]
        if len({tokenizer.to_str() for tokenizer in given}) > 1:
            raise ConfigurationError("the tokenizers of --init, --teacher and the run differ: ids would not fit")
        if given:
            tokenizer = given[0]
        else:
            # One process learns it and the others get it: they must not differ by a single merge.
            spelt = [""]
            if rank == 0:
                learnt = train_tokenizer(corpus.texts(), recipe.model.vocab_size, recipe.training.spaces)
                spelt = [learnt.to_str()]
            if distributed.is_initialized():
                distributed.broadcast_object_list(spelt)
            tokenizer = tokenizer_from_json(spelt[0])
        labels = recipe.model.labels
        if recipe.training.loss == "classification" and not labels:
            labels = tuple(sorted({target for _, target in corpus.pairs()}))
        if labels:
            _check_labels(labels, {target for _, target in (*corpus.pairs(), *held["valid"])})
        recipe = replace(recipe, model=replace(recipe.model, vocab_size=tokenizer.get_vocab_size(), labels=labels))
        if last and last.recipe.model != recipe.model:
            raise ConfigurationError(f"{run}/last.pt was trained with another [model]: {last.recipe.model}")
        trainer = Trainer(
            recipe,
            corpus,
            tokenizer,
            grouped_references(held["valid"]),
            run,
            metadata,
            device,
            start=None if last else start,
            teachers=[teacher.transformer() for teacher in teachers],
        )
        if last:
            trainer.resume(last)
        logger.info(
            "%d pairs, %d validation sentences, %d parameters, on %s, %d process(es)",
            len(corpus), len(trainer.validation), trainer.model.num_parameters(), device, trainer.world,
        )  # fmt: skip
        with logging_redirect_tqdm():
            trainer.run()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except (ConfigurationError, DataError, CheckpointError) as error:
        print(f"transduce train: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _check_labels(labels: tuple[str, ...], found: set[str]) -> None:
    if unknown := sorted(found - set(labels)):
        raise ConfigurationError(f"labels: {unknown[0]!r} stands in the data and not in the recipe's labels {labels}")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Print scores and samples; the exit status of the program."""
    import torch

    from model.checkpoint import Checkpoint, CheckpointError
    from model.data import BadRows, DataError, grouped_references, read_pairs

    paths: list[Path] = arguments.model
    try:
        for name, least in (("num_beams", 1), ("samples", 0), ("limit", 0), ("threads", 0)):
            if (value := getattr(arguments, name)) < least:
                raise DataError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        bad = BadRows()
        pairs = list(read_pairs(tuple(arguments.data), bad))
        references = grouped_references(pairs)
        if bad.counts:
            print(f"left out: {bad}", file=sys.stderr)
        if arguments.limit:
            references = dict(list(references.items())[: arguments.limit])
        if not references:
            raise DataError("no usable pair to evaluate on")
        if directory := next((path for path in paths if path.is_dir()), None):
            if len(paths) > 1:
                raise DataError(f"{directory} is a directory: only checkpoints translate together")
            if arguments.measure not in (None, "bleu"):
                raise DataError(f"--measure {arguments.measure} is of a checkpoint, not of an artifact")
            evaluation_by = _evaluation_by_artifact(directory, arguments)
        else:
            checkpoints = [Checkpoint.load(path) for path in paths]
            measure = arguments.measure or _purpose(checkpoints[0].recipe.model)
            if measure != "bleu":
                if len(paths) > 1:
                    raise DataError(f"--measure {measure} is of one checkpoint, not of several together")
                print(_measured(checkpoints[0], paths[0], measure, references))
                return 0
            evaluation_by = _evaluation_by_checkpoints(checkpoints, paths, arguments)
        if arguments.output:
            try:
                arguments.output.write_text("")  # whether it can be written is known before all is translated
            except OSError as error:
                raise DataError(f"--output {arguments.output}: {error.strerror}") from error
    except (DataError, CheckpointError) as error:
        print(f"transduce evaluate: {_one_line(error)}", file=sys.stderr)
        return 2
    evaluation = evaluation_by(references, arguments.bleu_tokenize)
    translations = dict(zip(references, evaluation.translations, strict=True))
    if arguments.output:
        lines = (translations[source] for source, _ in pairs if source in translations)
        arguments.output.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    for source, refs in list(references.items())[: arguments.samples]:
        print(f"  source       {source}\n  translation  {translations[source]}\n  reference    {' | '.join(refs)}\n")
    print(f"beam {arguments.num_beams}  {evaluation}")
    return 0


def _evaluation_by_artifact(
    directory: Path, arguments: argparse.Namespace
) -> Callable[[dict[str, list[str]], str], Evaluation]:
    """What scores an artifact's translations of sources against their references, tokenised as sacrebleu is told."""
    # The one place where model/ reaches for export/: an artifact is judged by what its graphs give.
    from export.artifact_decoder import ArtifactDecoder
    from model.data import DataError
    from model.evaluation import evaluate
    from model.tokenizer import tokenizer_from_json

    if not (directory / "manifest.json").is_file():
        raise DataError(f"{directory} is no artifact: it has no manifest.json")
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    if "decoder" not in manifest["variants"]["cpu"]:
        raise DataError(f"{directory} has no decoder: it cannot translate")
    decoder = ArtifactDecoder(directory, threads=arguments.threads)
    tokenizer = tokenizer_from_json((directory / "tokenizer.json").read_text(encoding="utf-8"))

    def translate(sources: list[list[int]]) -> list[list[int]]:
        found = decoder.beam(sources, arguments.num_beams, arguments.length_penalty)
        return [hypotheses[0].ids for hypotheses in found]

    return partial(evaluate, translate, tokenizer, decoder.eos_id, manifest["max_source_tokens"])


def _evaluation_by_checkpoints(
    checkpoints: list[Checkpoint], paths: list[Path], arguments: argparse.Namespace
) -> Callable[[dict[str, list[str]], str], Evaluation]:
    """The same of a checkpoint, or of what several translate together."""
    from model.data import DataError
    from model.evaluation import evaluate, translator
    from model.search import Ensemble

    tokenizer = checkpoints[0].tokenizer
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if not checkpoint.recipe.model.decoder_layers:
            raise DataError(f"{path} has no decoder: it cannot translate")
        if checkpoint.tokenizer.to_str() != tokenizer.to_str():
            raise DataError(f"{path} has another tokenizer than {paths[0]}: its probabilities are of other tokens")
    models = [checkpoint.transformer() for checkpoint in checkpoints]
    model = Ensemble(models) if len(models) > 1 else models[0]
    translate = translator(model, arguments.num_beams, arguments.length_penalty)
    return partial(evaluate, translate, tokenizer, model.config.eos_id, model.config.max_source_tokens)


def _measured(checkpoint: Checkpoint, path: Path, measure: str, references: dict[str, list[str]]) -> str:
    """A line that says a checkpoint's accuracy or retrieval."""
    from model.data import DataError
    from model.evaluation import RETRIEVED_AMONG, accuracy, retrieval

    model = checkpoint.transformer()
    if measure == "retrieval":
        found = retrieval(model, checkpoint.tokenizer, references)
        return f"retrieval {found:.2f} % among {min(len(references), RETRIEVED_AMONG)} translations"
    if not model.config.labels:
        raise DataError(f"{path} is no classifier: it has no labels")
    return f"accuracy {accuracy(model, checkpoint.tokenizer, references):.2f} % of {len(references)} texts"

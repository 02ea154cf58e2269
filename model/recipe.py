"""How a run trains a transformer, and the recipe of both: frozen records, read from one TOML file.

Knows nothing of torch: a recipe can be read, checked and printed where torch is not installed.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from model.config import ConfigurationError, TransformerConfig, check

T = TypeVar("T")

LOSSES = ("translation", "classification", "contrastive")


@dataclass(frozen=True)
class TrainingConfig:
    """How a run learns. Steps are optimizer updates; tokens are counted with padding."""

    seed: int = 1
    batch_tokens: int = 4096
    """Largest number of source, or of target, tokens in a batch of one process, padding included."""
    optimizer: Literal["adam", "muon"] = "adam"
    """adam: (0.9, 0.98, 1e-9), as the paper. muon: Muon (Jordan et al., 2024) for matrices, Adam for the rest."""
    learning_rate: float = 1e-3
    """The highest rate, reached at the end of the warm-up; then it falls with the inverse square root of the step."""
    warmup_steps: int = 1000
    cooldown_steps: int = 0
    """The last so many steps bring the rate linearly to zero (0: none). Counts back from max_steps."""
    max_steps: int = 10000
    max_epochs: int = 0
    """Stop after so many passes over the data (0: no limit)."""
    weight_decay: float = 0.0
    loss: str = "translation"
    """translation: cross-entropy of the target's tokens; classification: of labels, which stand for targets;
    contrastive: InfoNCE of the vectors of sources and targets alone; package.module:function: one of your own."""
    contrastive_weight: float = 0.0
    """Of an InfoNCE loss (van den Oord et al., 2018; negatives from the batch) beside translation: the encoder's mean
    vectors of a text and of its translation become alike."""
    contrastive_temperature: float = 0.05
    distillation_weight: float = 0.0
    """Share of a teacher's distribution (Hinton et al., 2015) in the loss of translation, the rest being the data's."""
    distillation_temperature: float = 1.0
    distillation_top: int = 0
    """Teachers read the corpus once, before the first step, and so many of each distribution's tokens are kept; what
    they leave over is even among the others. 0: they read each batch, and all tokens count."""
    r_drop: float = 0.0
    """Weight alpha of the divergence between two passes of each batch, which differ by their dropout (Liang et al.,
    2021). Each step costs two; the paper's weight for translation is 5."""
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it (0: never)."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, validated and saved instead of the last ones (0: none)."""
    average_checkpoints: int = 1
    """How many of the last checkpoints the final weights average."""
    validate_every: int = 1000
    """Steps between validations; each one writes a checkpoint."""
    patience: int = 0
    """Stop after so many validations without a better BLEU (0: never)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products under autocast, and of Muon's; where the device lacks it, fp32, and the log says so."""
    lowercase_share: float = 0.0
    """Share of the training pairs whose source is lower-cased."""
    unpunctuated_share: float = 0.0
    """Share of the training pairs whose source loses its final punctuation (half of these all of its punctuation)."""
    spaces: Literal["before", "after"] = "before"
    """Whether the tokenizer, where it is learnt, has a word's token hold the space before it or the one after it.
    Before it suits text as people write it: a compound begins with the same token as the word by itself. After it suits
    text in which punctuation stands apart from words: a compound ends with the same token as the word by itself."""
    bpe_dropout: float = 0.0
    """Chance that a merge is left out each time a training text is cut into tokens (Provilkov et al., 2020): words in
    ever other pieces, which keeps a small corpus from being learnt by heart."""
    join_share: float = 0.0
    """Share of the training pairs that are joined with others to a paragraph of two to `join_most` sentences."""
    join_most: int = 8
    pool_pairs: int = 16384
    """So many shuffled pairs are tokenised and sorted by length at a time."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_steps", "validate_every", "average_checkpoints", "pool_pairs"):
            check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "cooldown_steps", "max_epochs", "patience", "distillation_top"):
            check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in (
            "lowercase_share", "unpunctuated_share", "join_share", "label_smoothing", "ema_decay", "bpe_dropout"
        ):  # fmt: skip
            check(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1", getattr(self, name))
        for name in ("learning_rate", "contrastive_temperature", "distillation_temperature"):
            check(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        check(
            self.loss in LOSSES or all(self.loss.partition(":")),
            "loss",
            f"one of {', '.join(LOSSES)}, or package.module:function",
            self.loss,
        )
        check(0.0 <= self.distillation_weight <= 1.0, "distillation_weight", "from 0 to 1", self.distillation_weight)
        if self.distillation_top:
            check(
                self.distillation_weight > 0, "distillation_top", "0 without distillation_weight", self.distillation_top
            )
            for name in ("bpe_dropout", "join_share", "lowercase_share", "unpunctuated_share"):
                check(
                    getattr(self, name) == 0,
                    name,
                    "0 with distillation_top: what is kept of a text is only of use where it comes again as it is",
                    getattr(self, name),
                )
        for name in ("contrastive_weight", "r_drop"):
            check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("contrastive_weight", "distillation_weight", "r_drop"):
            check(
                self.loss == "translation" or getattr(self, name) == 0,
                name,
                f"0 where loss is {self.loss}",
                getattr(self, name),
            )
        for name in ("clip_norm", "weight_decay"):
            check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        check(
            self.cooldown_steps <= self.max_steps,
            "cooldown_steps",
            f"at most max_steps ({self.max_steps})",
            self.cooldown_steps,
        )
        check(self.join_most >= 2, "join_most", "at least 2", self.join_most)
        check(self.optimizer in ("adam", "muon"), "optimizer", "'adam' or 'muon'", self.optimizer)
        check(self.spaces in ("before", "after"), "spaces", "'before' or 'after'", self.spaces)
        check(self.precision in ("bf16", "fp32"), "precision", "'bf16' or 'fp32'", self.precision)


@dataclass(frozen=True)
class Recipe:
    """Everything a training run is decided by, but the data: one TOML file."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        model, training = self.model, self.training
        encodes_targets = training.loss == "contrastive" or training.contrastive_weight > 0
        if training.loss == "translation":
            check(model.decoder_layers > 0, "decoder_layers", "at least 1 where loss is translation", 0)
        if encodes_targets:
            check(
                model.max_target_tokens <= model.max_source_tokens,
                "max_target_tokens",
                f"at most max_source_tokens ({model.max_source_tokens}) where a loss compares vectors of both sides",
                model.max_target_tokens,
            )
        check(
            training.distillation_top < model.vocab_size,
            "distillation_top",
            f"below vocab_size ({model.vocab_size})",
            training.distillation_top,
        )
        check(
            training.r_drop == 0 or model.dropout > 0 or model.word_dropout > 0,
            "r_drop",
            "0 where dropout and word_dropout are 0: passes are equal",
            training.r_drop,
        )
        if training.loss == "classification":
            check(
                model.decoder_layers == 0,
                "decoder_layers",
                "0 where loss is classification, which is of the encoder alone",
                model.decoder_layers,
            )
            check(training.join_share == 0, "join_share", "0 where loss is classification", training.join_share)

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> Self:
        """A recipe from plain tables, as in TOML or in a checkpoint. Unknown tables and fields are refused."""
        check(
            set(tables) <= {"model", "training"}, "recipe", "made of the tables [model] and [training]", sorted(tables)
        )
        return cls(
            model=_record(TransformerConfig, tables.get("model", {}), "model"),
            training=_record(TrainingConfig, tables.get("training", {}), "training"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain tables that from_dict reads back."""
        return dataclasses.asdict(self)


def _record(kind: type[T], table: dict[str, Any], where: str) -> T:
    """Build the dataclass from a table, with each value of the type its default has."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in table.items():
        check(name in known, f"{where}.{name}", f"one of {', '.join(known)}", name)
        wanted = type(known[name].default)
        if wanted is tuple:
            fits = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            check(fits, f"{where}.{name}", "a list of texts", value)
            continue
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        check(fits, f"{where}.{name}", f"of type {wanted.__name__}", value)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})


def read_recipe(path: Path, changes: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe in a file and its [metadata], after changes TABLE.FIELD=VALUE, which --set gives.

    Raises ConfigurationError.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    for change in changes:
        name, equals, value = change.partition("=")
        table, dot, key = name.partition(".")
        if not (equals and dot):
            raise ConfigurationError(f"--set {change}: expected TABLE.FIELD=VALUE, as in training.max_steps=1000")
        try:
            tables.setdefault(table, {})[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"--set {change}: {value!r} is no TOML value; texts need quotes") from error
    metadata = tables.pop("metadata", {})
    try:
        return Recipe.from_dict(tables), metadata
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error

"""What a transformer is made of, and how a run trains it: two frozen records, read from one TOML recipe.

Knows nothing of torch: a configuration can be read, checked and printed where torch is not installed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

T = TypeVar("T")

Activation: TypeAlias = Literal["gelu", "relu", "geglu", "swiglu"]
Norm: TypeAlias = Literal["layer_norm", "rms_norm"]


class ConfigurationError(ValueError):
    """A recipe that cannot work. The message names the field and what it allows."""


def _check(condition: bool, field_name: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigurationError(f"{field_name} must be {rule}, not {value!r}")


@dataclass(frozen=True)
class TransformerConfig:
    """The encoder-decoder of Vaswani et al. (2017), "Attention Is All You Need", and its options."""

    vocab_size: int = 8000
    d_model: int = 256
    num_heads: int = 4
    d_ff: int = 0
    """Width of the feed-forward layer; 0 means 4 * d_model."""
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    activation: Activation = "gelu"
    """Of the feed-forward layer. geglu and swiglu (Shazeer, 2020): a linear layer times the GELU or SiLU of another, so
    one matrix more; a d_ff of 8/3 * d_model costs as much with a gate as 4 * d_model does without."""
    norm: Norm = "layer_norm"
    """LayerNorm (Ba et al., 2016), or RMSNorm (Zhang and Sennrich, 2019), which has neither mean nor bias."""
    pre_norm: bool = False
    """False: LayerNorm(x + Sublayer(x)), as in the paper. True: x + Sublayer(LayerNorm(x)), and a last LayerNorm."""
    share_embeddings: bool = True
    """One matrix for source embedding, target embedding and output projection (Press and Wolf, 2017)."""
    max_source_tokens: int = 512
    max_target_tokens: int = 256
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_heads", "encoder_layers", "decoder_layers"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_source_tokens", "max_target_tokens"):
            _check(getattr(self, name) >= 2, name, "at least 2", getattr(self, name))
        _check(
            self.d_model % self.num_heads == 0, "d_model", f"a multiple of num_heads ({self.num_heads})", self.d_model
        )
        _check(self.d_model % 2 == 0, "d_model", "even (each sine has its cosine)", self.d_model)
        _check(self.d_ff >= 0, "d_ff", "0 (4 * d_model) or more", self.d_ff)
        _check(0.0 <= self.dropout < 1.0, "dropout", "at least 0 and below 1", self.dropout)
        for name, kind in (("activation", Activation), ("norm", Norm)):
            _check(
                getattr(self, name) in get_args(kind), name, "one of " + ", ".join(get_args(kind)), getattr(self, name)
            )
        special = {self.pad_id, self.bos_id, self.eos_id}
        _check(
            len(special) == 3,
            "pad_id, bos_id and eos_id",
            "three different ids",
            (self.pad_id, self.bos_id, self.eos_id),
        )
        _check(all(0 <= i < self.vocab_size for i in special), "special ids", "below vocab_size", sorted(special))

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def feed_forward_width(self) -> int:
        """Width of the feed-forward layer, with the default resolved."""
        return self.d_ff or 4 * self.d_model


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
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, validated and saved instead of the last ones (0: none)."""
    average_checkpoints: int = 1
    """How many of the last checkpoints the final weights average."""
    validate_every: int = 1000
    """Steps between validations; each one writes a checkpoint."""
    patience: int = 0
    """Stop after so many validations without a better BLEU (0: never)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products under autocast; where the device lacks it, fp32, and the log says so."""
    lowercase_share: float = 0.0
    """Share of the training pairs whose source is lower-cased."""
    unpunctuated_share: float = 0.0
    """Share of the training pairs whose source loses its final punctuation (half of these all of its punctuation)."""
    join_share: float = 0.0
    """Share of the training pairs that are joined with others to a paragraph of two to `join_most` sentences."""
    join_most: int = 8
    pool_pairs: int = 16384
    """So many shuffled pairs are tokenised and sorted by length at a time."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_steps", "validate_every", "average_checkpoints", "pool_pairs"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "cooldown_steps", "max_epochs", "patience"):
            _check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("lowercase_share", "unpunctuated_share", "join_share", "label_smoothing", "ema_decay"):
            _check(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1", getattr(self, name))
        _check(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _check(self.clip_norm > 0, "clip_norm", "above 0", self.clip_norm)
        _check(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _check(
            self.cooldown_steps <= self.max_steps,
            "cooldown_steps",
            f"at most max_steps ({self.max_steps})",
            self.cooldown_steps,
        )
        _check(self.join_most >= 2, "join_most", "at least 2", self.join_most)
        _check(self.optimizer in ("adam", "muon"), "optimizer", "'adam' or 'muon'", self.optimizer)
        _check(self.precision in ("bf16", "fp32"), "precision", "'bf16' or 'fp32'", self.precision)


@dataclass(frozen=True)
class Recipe:
    """Everything a training run is decided by, but the data: one TOML file."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> Self:
        """A recipe from plain tables, as in TOML or in a checkpoint. Unknown tables and fields are refused."""
        _check(
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
        _check(name in known, f"{where}.{name}", f"one of {', '.join(known)}", name)
        wanted = type(known[name].default)
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        _check(fits, f"{where}.{name}", f"of type {wanted.__name__}", value)
    return kind(**table)

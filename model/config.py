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
PositionsKind: TypeAlias = Literal["sinusoidal", "relative_bias", "rotary"]
EncoderAttention: TypeAlias = Literal["full", "window", "linear", "performer"]
DecoderAttention: TypeAlias = Literal["full", "window", "linear"]
LayerSharing: TypeAlias = Literal["none", "all", "sequence", "cycle", "cycle_reversed"]


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
    """0 for an encoder alone, which classifies or gives vectors."""
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
    positions: PositionsKind = "sinusoidal"
    """sinusoidal: added to the embeddings, as in the paper. relative_bias: learnt biases of the self-attentions' scores
    by bucket of distance, one table for a stack (Raffel et al., 2020, "T5"). rotary: queries and keys of
    self-attentions are rotated (Su et al., 2021)."""
    relative_buckets: int = 32
    relative_max_distance: int = 128
    """Distances from here on share the last bucket."""
    num_kv_heads: int = 0
    """Heads of keys and values, each for num_heads / num_kv_heads query heads (Ainslie et al., 2023): 1 is multi-query,
    0 means num_heads."""
    encoder_attention: EncoderAttention = "full"
    """full; window: sliding window and global tokens (Beltagy et al., 2020); linear (Katharopoulos et al., 2020);
    performer: random features of the softmax (Choromanski et al., 2021). The last three cost time in proportion to
    the source's length."""
    encoder_window: int = 256
    """Each position attends to so many others, half on either side; where encoder_attention is window."""
    global_tokens: int = 1
    """The first so many source tokens attend to all and are attended to by all; where encoder_attention is window."""
    performer_features: int = 0
    """Random features of a head; 0 means twice its width."""
    decoder_attention: DecoderAttention = "full"
    """Of the target to itself. window: each position sees so many, itself included, and the state is a ring of that
    size; linear: the state is a sum, of one size whatever the target's length."""
    decoder_window: int = 64
    share_layers: LayerSharing = "none"
    """Layers that use the same weights: all of a stack (Lan et al., 2020, "ALBERT"), or so many different ones in one
    of the orders of Takase and Kiyono (2021): sequence 112233, cycle 123123, cycle_reversed 123321."""
    different_encoder_layers: int = 0
    different_decoder_layers: int = 0
    """Where share_layers is sequence, cycle or cycle_reversed."""
    labels: tuple[str, ...] = ()
    """What a classifier on the encoder tells apart; a run with the loss classification finds them in its data."""
    max_source_tokens: int = 512
    max_target_tokens: int = 256
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_heads", "encoder_layers"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(self.decoder_layers >= 0, "decoder_layers", "at least 1, or 0 for an encoder alone", self.decoder_layers)
        _check(
            self.decoder_layers > 0 or self.share_embeddings,
            "share_embeddings",
            "true where decoder_layers is 0",
            self.share_embeddings,
        )
        _check(
            not self.labels or self.decoder_layers == 0,
            "decoder_layers",
            "0 for a classifier, which is an encoder with labels",
            self.decoder_layers,
        )
        _check(
            len(set(self.labels)) == len(self.labels) != 1 and all(self.labels),
            "labels",
            "two or more different texts, or none",
            list(self.labels),
        )
        for name in ("max_source_tokens", "max_target_tokens"):
            _check(getattr(self, name) >= 2, name, "at least 2", getattr(self, name))
        _check(
            self.d_model % self.num_heads == 0, "d_model", f"a multiple of num_heads ({self.num_heads})", self.d_model
        )
        _check(self.d_model % 2 == 0, "d_model", "even (each sine has its cosine)", self.d_model)
        _check(self.d_ff >= 0, "d_ff", "0 (4 * d_model) or more", self.d_ff)
        _check(0.0 <= self.dropout < 1.0, "dropout", "at least 0 and below 1", self.dropout)
        for name, kind in _CHOICES.items():
            _check(
                getattr(self, name) in get_args(kind), name, "one of " + ", ".join(get_args(kind)), getattr(self, name)
            )
        self._check_attention()
        self._check_sharing("different_encoder_layers", self.encoder_layers)
        self._check_sharing("different_decoder_layers", self.decoder_layers)
        special = {self.pad_id, self.bos_id, self.eos_id}
        _check(
            len(special) == 3,
            "pad_id, bos_id and eos_id",
            "three different ids",
            (self.pad_id, self.bos_id, self.eos_id),
        )
        _check(all(0 <= i < self.vocab_size for i in special), "special ids", "below vocab_size", sorted(special))

    def _check_attention(self) -> None:
        _check(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            f"0 or a divisor of num_heads ({self.num_heads})",
            self.num_kv_heads,
        )
        rotates = self.positions == "rotary"
        _check(
            not rotates or self.d_head % 2 == 0,
            "positions",
            f"something else where heads have an odd width (d_model / num_heads is {self.d_head})",
            self.positions,
        )
        _check(
            self.positions == "sinusoidal"
            or not {self.encoder_attention, self.decoder_attention} & {"linear", "performer"},
            "positions",
            "sinusoidal where an attention is linear or performer, which have no scores of pairs",
            self.positions,
        )
        _check(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
            "relative_buckets",
            "a multiple of 4",
            self.relative_buckets,
        )
        _check(
            self.relative_max_distance > self.relative_buckets // 2,
            "relative_max_distance",
            f"above half of relative_buckets ({self.relative_buckets})",
            self.relative_max_distance,
        )
        _check(
            self.encoder_window >= 2 and self.encoder_window % 2 == 0,
            "encoder_window",
            "even and at least 2",
            self.encoder_window,
        )
        _check(
            0 <= self.global_tokens <= self.encoder_window // 2,
            "global_tokens",
            f"from 0 to half of encoder_window ({self.encoder_window})",
            self.global_tokens,
        )
        _check(self.decoder_window >= 1, "decoder_window", "at least 1", self.decoder_window)
        _check(
            self.performer_features >= 0,
            "performer_features",
            "0 (twice a head's width) or more",
            self.performer_features,
        )

    def _check_sharing(self, name: str, layers: int) -> None:
        different = getattr(self, name)
        if self.share_layers in ("none", "all") or layers == 0:
            _check(different == 0, name, f"0 where share_layers is {self.share_layers}", different)
            return
        _check(1 <= different <= layers, name, f"from 1 to the stack's layers ({layers})", different)
        if self.share_layers == "sequence":
            _check(layers % different == 0, name, f"a divisor of the stack's layers ({layers})", different)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def random_features(self) -> int:
        """Of a performer's head, with the default resolved."""
        return self.performer_features or 2 * self.d_head

    @property
    def encoder_order(self) -> list[int]:
        """Which of the different layers stands at each place of the encoder."""
        return _layer_order(self.share_layers, self.different_encoder_layers, self.encoder_layers)

    @property
    def decoder_order(self) -> list[int]:
        """The same of the decoder."""
        return _layer_order(self.share_layers, self.different_decoder_layers, self.decoder_layers)

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def feed_forward_width(self) -> int:
        """Width of the feed-forward layer, with the default resolved."""
        return self.d_ff or 4 * self.d_model


_CHOICES = {
    "activation": Activation,
    "norm": Norm,
    "positions": PositionsKind,
    "encoder_attention": EncoderAttention,
    "decoder_attention": DecoderAttention,
    "share_layers": LayerSharing,
}


def _layer_order(sharing: LayerSharing, different: int, layers: int) -> list[int]:
    """Takase and Kiyono (2021), "Lessons on Parameter Sharing across Layers in Transformers", algorithm 1."""
    if sharing == "none":
        return list(range(layers))
    if sharing == "all" or layers == 0:
        return [0] * layers
    if sharing == "sequence":
        return [place * different // layers for place in range(layers)]
    order = [place % different for place in range(layers)]
    if sharing == "cycle_reversed":
        turn = different * (-(-layers // different) - 1)  # where the last round begins
        if turn:
            order[turn:] = [different - 1 - n for n in order[turn:]]
    return order


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
    r_drop: float = 0.0
    """Weight alpha of the divergence between two passes of each batch, which differ by their dropout (Liang et al.,
    2021). Each step costs two; the paper's weight for translation is 5."""
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
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "cooldown_steps", "max_epochs", "patience"):
            _check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in (
            "lowercase_share", "unpunctuated_share", "join_share", "label_smoothing", "ema_decay", "bpe_dropout"
        ):  # fmt: skip
            _check(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1", getattr(self, name))
        for name in ("learning_rate", "contrastive_temperature", "distillation_temperature"):
            _check(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        _check(
            self.loss in LOSSES or all(self.loss.partition(":")),
            "loss",
            f"one of {', '.join(LOSSES)}, or package.module:function",
            self.loss,
        )
        _check(0.0 <= self.distillation_weight <= 1.0, "distillation_weight", "from 0 to 1", self.distillation_weight)
        for name in ("contrastive_weight", "r_drop"):
            _check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("contrastive_weight", "distillation_weight", "r_drop"):
            _check(
                self.loss == "translation" or getattr(self, name) == 0,
                name,
                f"0 where loss is {self.loss}",
                getattr(self, name),
            )
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

    def __post_init__(self) -> None:
        model, training = self.model, self.training
        encodes_targets = training.loss == "contrastive" or training.contrastive_weight > 0
        if training.loss == "translation":
            _check(model.decoder_layers > 0, "decoder_layers", "at least 1 where loss is translation", 0)
        if encodes_targets:
            _check(
                model.max_target_tokens <= model.max_source_tokens,
                "max_target_tokens",
                f"at most max_source_tokens ({model.max_source_tokens}) where a loss compares vectors of both sides",
                model.max_target_tokens,
            )
        _check(
            training.r_drop == 0 or model.dropout > 0,
            "r_drop",
            "0 where dropout is 0: passes are equal",
            training.r_drop,
        )
        if training.loss == "classification":
            _check(
                model.decoder_layers == 0,
                "decoder_layers",
                "0 where loss is classification, which is of the encoder alone",
                model.decoder_layers,
            )
            _check(training.join_share == 0, "join_share", "0 where loss is classification", training.join_share)

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
        if wanted is tuple:
            fits = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            _check(fits, f"{where}.{name}", "a list of texts", value)
            continue
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        _check(fits, f"{where}.{name}", f"of type {wanted.__name__}", value)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})

"""What a transformer is made of: a frozen record, and the refusal of one that cannot work.

Knows nothing of torch: a configuration can be read, checked and printed where torch is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Activation: TypeAlias = Literal["gelu", "relu", "geglu", "swiglu"]
Norm: TypeAlias = Literal["layer_norm", "rms_norm"]
PositionsKind: TypeAlias = Literal["sinusoidal", "relative_bias", "rotary"]
EncoderAttention: TypeAlias = Literal["full", "window", "linear", "performer"]
DecoderAttention: TypeAlias = Literal["full", "window", "linear"]
LayerSharing: TypeAlias = Literal["none", "all", "sequence", "cycle", "cycle_reversed"]


class ConfigurationError(ValueError):
    """A recipe that cannot work. The message names the field and what it allows."""


def check(condition: bool, field_name: str, rule: str, value: object) -> None:
    """Raise ConfigurationError, which says what the field must be, unless the condition holds."""
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
    word_dropout: float = 0.0
    """Share of the tokens of both sides whose embedding is zero in a training step, its position apart (Gal and
    Ghahramani, 2016; Sennrich and Zhang, 2019): a small corpus is learnt by heart later."""
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
    rotary_cross_attention: bool = False
    """With rotary positions: those of cross-attention too, so that where to look in the source depends on how far a
    token stands from the target's own place."""
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
            check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        check(self.decoder_layers >= 0, "decoder_layers", "at least 1, or 0 for an encoder alone", self.decoder_layers)
        check(
            self.decoder_layers > 0 or self.share_embeddings,
            "share_embeddings",
            "true where decoder_layers is 0",
            self.share_embeddings,
        )
        check(
            not self.labels or self.decoder_layers == 0,
            "decoder_layers",
            "0 for a classifier, which is an encoder with labels",
            self.decoder_layers,
        )
        check(
            len(set(self.labels)) == len(self.labels) != 1 and all(self.labels),
            "labels",
            "two or more different texts, or none",
            list(self.labels),
        )
        for name in ("max_source_tokens", "max_target_tokens"):
            check(getattr(self, name) >= 2, name, "at least 2", getattr(self, name))
        check(
            self.d_model % self.num_heads == 0, "d_model", f"a multiple of num_heads ({self.num_heads})", self.d_model
        )
        check(self.d_model % 2 == 0, "d_model", "even (each sine has its cosine)", self.d_model)
        check(self.d_ff >= 0, "d_ff", "0 (4 * d_model) or more", self.d_ff)
        for name in ("dropout", "word_dropout"):
            check(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1", getattr(self, name))
        for name, kind in _CHOICES.items():
            check(
                getattr(self, name) in get_args(kind), name, "one of " + ", ".join(get_args(kind)), getattr(self, name)
            )
        self._check_attention()
        self._check_sharing("different_encoder_layers", self.encoder_layers)
        self._check_sharing("different_decoder_layers", self.decoder_layers)
        special = {self.pad_id, self.bos_id, self.eos_id}
        check(
            len(special) == 3,
            "pad_id, bos_id and eos_id",
            "three different ids",
            (self.pad_id, self.bos_id, self.eos_id),
        )
        check(all(0 <= i < self.vocab_size for i in special), "special ids", "below vocab_size", sorted(special))

    def _check_attention(self) -> None:
        check(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            f"0 or a divisor of num_heads ({self.num_heads})",
            self.num_kv_heads,
        )
        rotates = self.positions == "rotary"
        check(
            not rotates or self.d_head % 2 == 0,
            "positions",
            f"something else where heads have an odd width (d_model / num_heads is {self.d_head})",
            self.positions,
        )
        check(
            self.positions == "sinusoidal"
            or not {self.encoder_attention, self.decoder_attention} & {"linear", "performer"},
            "positions",
            "sinusoidal where an attention is linear or performer, which have no scores of pairs",
            self.positions,
        )
        check(
            rotates or not self.rotary_cross_attention,
            "rotary_cross_attention",
            "false where positions are not rotary",
            self.rotary_cross_attention,
        )
        check(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
            "relative_buckets",
            "a multiple of 4",
            self.relative_buckets,
        )
        check(
            self.relative_max_distance > self.relative_buckets // 2,
            "relative_max_distance",
            f"above half of relative_buckets ({self.relative_buckets})",
            self.relative_max_distance,
        )
        check(
            self.encoder_window >= 2 and self.encoder_window % 2 == 0,
            "encoder_window",
            "even and at least 2",
            self.encoder_window,
        )
        check(
            0 <= self.global_tokens <= self.encoder_window // 2,
            "global_tokens",
            f"from 0 to half of encoder_window ({self.encoder_window})",
            self.global_tokens,
        )
        check(self.decoder_window >= 1, "decoder_window", "at least 1", self.decoder_window)
        check(
            self.performer_features >= 0,
            "performer_features",
            "0 (twice a head's width) or more",
            self.performer_features,
        )

    def _check_sharing(self, name: str, layers: int) -> None:
        different = getattr(self, name)
        if self.share_layers in ("none", "all") or layers == 0:
            check(different == 0, name, f"0 where share_layers is {self.share_layers}", different)
            return
        check(1 <= different <= layers, name, f"from 1 to the stack's layers ({layers})", different)
        if self.share_layers == "sequence":
            check(layers % different == 0, name, f"a divisor of the stack's layers ({layers})", different)

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

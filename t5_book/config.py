"""The choices that make a T5: of one stack, and of the whole model.

Built in chapter 9, "The encoder: a residual stream through a stack of
blocks" (chapters/encoder.md) and chapter 11, "The whole T5: embeddings, two
stacks, a head and a loss" (chapters/t5.md). Edit the chapter, not this
file.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields

from t5_book.attention import ATTENTIONS
from t5_book.checks import check_choice, check_flag, check_integer, check_number
from t5_book.feed_forward import FEED_FORWARDS
from t5_book.relative_position import check_buckets

__all__ = ["StackConfig", "T5Config"]


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What encoder and decoder have in common, besides their width.

    Raises:
        ValueError: if a value is none that a stack can be built with.
    """

    dropout: float = 0.0  # probability, in each of T5's five places
    feed_forward: str = "relu"  # T5 1.0; "gated-gelu": T5 1.1
    num_buckets: int = 32  # buckets of the position bias
    max_distance: int = 128  # where the scale of its buckets ends
    bias_per_layer: bool = False  # a bias table for each block: UMT5
    # How attention is computed. Models that differ in nothing else are equal.
    attention: str = field(default="plain", compare=False)

    def __post_init__(self):
        check_number("dropout", self.dropout, 0, 1)
        check_choice("feed_forward", self.feed_forward, FEED_FORWARDS)
        check_integer("num_buckets", self.num_buckets, 1)
        check_integer("max_distance", self.max_distance, 1)
        check_flag("bias_per_layer", self.bias_per_layer)
        check_choice("attention", self.attention, ATTENTIONS)
        # The encoder's two sides each get half; the decoder's one side gets all.
        check_buckets(True, self.num_buckets, self.max_distance)
        check_buckets(False, self.num_buckets, self.max_distance)


@dataclass(frozen=True, kw_only=True)
class StackConfig(StackOptions):
    """The sizes and options of one stack: an encoder or a decoder."""

    dim: int  # features of a vector in the residual stream
    depth: int  # number of blocks
    heads: int  # heads of each attention
    dim_head: int  # features of a head; times heads need not be dim
    mlp_dim: int  # hidden features of the feed-forward layer

    def __post_init__(self):
        super().__post_init__()
        for name in ("dim", "depth", "heads", "dim_head", "mlp_dim"):
            check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class T5Config(StackOptions):
    """Every choice that makes a T5, as the keywords of ``T5``.

    Raises:
        ValueError: if a value is none that a T5 can be built with.
    """

    dim: int  # features of a vector between embedding and head
    enc_num_tokens: int  # size of the vocabulary of the source
    enc_depth: int  # number of blocks
    enc_heads: int  # heads of each attention
    enc_dim_head: int  # features of a head; times heads need not be dim
    enc_mlp_mult: float  # hidden features over dim; 8/3 * 768 is 2048
    dec_num_tokens: int  # these five: the same for target and decoder
    dec_depth: int
    dec_heads: int
    dec_dim_head: int
    dec_mlp_mult: float
    tie_token_emb: bool = True  # one embedding for source and target
    tie_head: bool = True  # the target's embedding is the head, too
    scale_logits: bool | None = None  # by dim**-0.5; None: as tie_head
    pad_id: int = 0  # read where a label is -100, written after the end
    eos_id: int = 1  # ends a text
    start_id: int = 0  # what the decoder reads first

    def __post_init__(self):
        super().__post_init__()
        check_integer("dim", self.dim, 1)
        for side in ("enc", "dec"):
            for name in ("num_tokens", "depth", "heads", "dim_head"):
                name = f"{side}_{name}"
                check_integer(name, getattr(self, name), 1)
            name = f"{side}_mlp_mult"
            # less than one half of 1/dim would leave no hidden feature
            check_number(name, getattr(self, name), 0.5 / self.dim, math.inf)
        for name in ("tie_token_emb", "tie_head"):
            check_flag(name, getattr(self, name))
        if self.scale_logits is not None:
            check_flag("scale_logits", self.scale_logits)
        for name in ("pad_id", "eos_id", "start_id"):
            check_integer(name, getattr(self, name), 0)
            if getattr(self, name) >= self.dec_num_tokens:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but dec_num_tokens is "
                    f"{self.dec_num_tokens}; pass an id of that vocabulary"
                )
        if self.tie_token_emb and self.enc_num_tokens != self.dec_num_tokens:
            raise ValueError(
                "tie_token_emb=True shares one table, but enc_num_tokens is "
                f"{self.enc_num_tokens} and dec_num_tokens is {self.dec_num_tokens}; "
                "make them equal or pass tie_token_emb=False"
            )

    @property
    def encoder(self) -> StackConfig:
        """Sizes and options of the encoder."""
        return self._stack("enc")

    @property
    def decoder(self) -> StackConfig:
        """Sizes and options of the decoder."""
        return self._stack("dec")

    def _stack(self, side: str) -> StackConfig:
        """The part of the configuration that one side needs."""
        return StackConfig(
            dim=self.dim,
            depth=getattr(self, f"{side}_depth"),
            heads=getattr(self, f"{side}_heads"),
            dim_head=getattr(self, f"{side}_dim_head"),
            mlp_dim=round(self.dim * getattr(self, f"{side}_mlp_mult")),
            **{field.name: getattr(self, field.name) for field in fields(StackOptions)},
        )

    @property
    def logit_scale(self) -> float:
        """What the decoder's vectors are multiplied by before the head."""
        scaled = self.tie_head if self.scale_logits is None else self.scale_logits
        return self.dim**-0.5 if scaled else 1.0

    def to_json(self) -> str:
        """Write all fields as JSON."""
        # numbers of numpy have .item()
        return json.dumps(asdict(self), indent=2, default=lambda number: number.item())

    @classmethod
    def from_json(cls, text: str) -> "T5Config":
        """Read what ``to_json`` wrote; ValueError on unknown fields."""
        values = json.loads(text)
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"T5Config has no {unknown}; it has {known}")
        return cls(**values)

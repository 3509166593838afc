"""The whole T5: its configuration, the released sizes, and the model.

Built in chapter 11, "Assemble T5" (chapters/t5.md). Edit the chapter, not
this file.
"""

import json
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5_book.decoder import Decoder
from t5_book.encoder import Encoder, check_ids

__all__ = [
    "PRESETS",
    "T5",
    "T5Config",
]


@dataclass(frozen=True)
class T5Config:
    """Every choice that makes a T5. ValueError if it makes none.

    Built in chapter 11, "Assemble T5" (paper, sections 2.1 and 3.1).
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
    dropout: float = 0.0  # probability, in each of T5's five places
    tie_token_emb: bool = True  # one embedding for source and target
    feed_forward: str = "relu"  # T5 1.0; "gated-gelu": T5 1.1
    tie_head: bool = True  # the target's embedding is the head, too
    scale_logits: bool | None = None  # by dim**-0.5; None: as tie_head
    num_buckets: int = 32  # buckets of the position bias
    max_distance: int = 128  # distance that opens the last bucket
    bias_per_layer: bool = False  # a bias table for each block: UMT5
    pad_id: int = 0  # read where a label is -100, written after the end
    eos_id: int = 1  # ends a text
    start_id: int = 0  # what the decoder reads first

    def __post_init__(self):
        if self.scale_logits is None:
            object.__setattr__(self, "scale_logits", self.tie_head)
        self.check()

    def check(self) -> None:
        """Refuse what cannot be built."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.endswith("_id") else 1
            wrong = type(value) is not int or value < least
            if field.type is int and wrong:
                raise ValueError(
                    f"{field.name} is {value!r}; pass an int >= {least}"
                )
            if least == 0 and value >= self.dec_num_tokens:
                known = f"dec_num_tokens is {self.dec_num_tokens}"
                raise ValueError(f"{field.name} is {value}, but {known}")
        source, target = self.enc_num_tokens, self.dec_num_tokens
        if self.tie_token_emb and source != target:
            raise ValueError(
                "tie_token_emb=True shares one table, but enc_num_tokens "
                f"is {source} and dec_num_tokens is {target}; make them "
                "equal or pass tie_token_emb=False"
            )

    def to_json(self) -> str:
        """Write all fields as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "T5Config":
        """Read what ``to_json`` wrote; ValueError on unknown fields."""
        values = json.loads(text)
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"T5Config has no {unknown}; it has {known}")
        return cls(**values)

    def stack(self, side: str) -> dict:
        """Arguments of the encoder (``"enc"``) or decoder (``"dec"``)."""
        own = "depth", "heads", "dim_head", "mlp_mult"
        values = {name: getattr(self, f"{side}_{name}") for name in own}
        shared = "dim", "dropout", "feed_forward", "num_buckets"
        shared += "max_distance", "bias_per_layer"
        return values | {name: getattr(self, name) for name in shared}


# dim, hidden features, depth of encoder and decoder, heads, dim_head
_T5 = {
    "small": (512, 2048, 6, 6, 8, 64),
    "base": (768, 3072, 12, 12, 12, 64),
    "large": (1024, 4096, 24, 24, 16, 64),
    "3b": (1024, 16384, 24, 24, 32, 128),
    "11b": (1024, 65536, 24, 24, 128, 128),
}
_V1_1 = {
    "small": (512, 1024, 8, 8, 6, 64),
    "base": (768, 2048, 12, 12, 12, 64),
    "large": (1024, 2816, 24, 24, 16, 64),
    "xl": (2048, 5120, 24, 24, 32, 64),
    "xxl": (4096, 10240, 24, 24, 64, 64),
}
_BYT5 = {
    "small": (1472, 3584, 12, 4, 6, 64),
    "base": (1536, 3968, 18, 6, 12, 64),
    "large": (1536, 3840, 36, 12, 16, 64),
    "xl": (2560, 6720, 36, 12, 32, 64),
    "xxl": (4672, 12352, 36, 12, 64, 64),
}
_UMT5 = {size: row for size, row in _V1_1.items() if size != "large"}


def _keywords(num_tokens, dim, mlp, enc_depth, dec_depth, heads, dim_head):
    """The keywords of ``T5`` for one released size."""
    sizes = {"dim": dim, "enc_depth": enc_depth, "dec_depth": dec_depth}
    for side in ("enc_", "dec_"):
        sizes |= {f"{side}num_tokens": num_tokens, f"{side}heads": heads}
        sizes |= {f"{side}dim_head": dim_head, f"{side}mlp_mult": mlp / dim}
    return sizes


_GATED = {"feed_forward": "gated-gelu", "tie_head": False}
_FAMILIES = {
    "t5": (_T5, 32128, {}),
    "t5-v1_1": (_V1_1, 32128, _GATED),
    "flan-t5": (_V1_1, 32128, _GATED),
    "mt5": (_V1_1, 250112, _GATED),
    "byt5": (_BYT5, 384, _GATED),
    "umt5": (_UMT5, 256384, _GATED | {"bias_per_layer": True}),
}
PRESETS: dict[str, dict] = {
    f"{family}-{size}": _keywords(num_tokens, *row) | extra
    for family, (rows, num_tokens, extra) in _FAMILIES.items()
    for size, row in rows.items()
}


class T5(nn.Module):
    """The text-to-text transformer; ``config`` has ``T5Config``'s fields.

    Built in chapter 11, "Assemble T5" (paper, section 2.1; head and
    initialisation of mesh-tensorflow, ``transformer.py``).
    """

    def __init__(self, **config):
        super().__init__()
        self.config = config = T5Config(**config)
        self.enc_emb = nn.Embedding(config.enc_num_tokens, config.dim)
        self.dec_emb = self.enc_emb
        if not config.tie_token_emb:
            self.dec_emb = nn.Embedding(config.dec_num_tokens, config.dim)
        self.encoder = Encoder(**config.stack("enc"))
        self.decoder = Decoder(**config.stack("dec"))
        self.head = nn.Linear(config.dim, config.dec_num_tokens, bias=False)
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)
        if config.tie_head:
            self.head.weight = self.dec_emb.weight

    def encode(self, src: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read ``src [b s]`` and give the memory ``[b s dim]``.

        ``mask`` is bool ``[b s]``, True at real tokens, or ``[b s s]``.
        """
        check_ids("source", src, self.config.enc_num_tokens)
        return self.encoder(self.enc_emb(src), mask)

    def decode(
        self, tgt: Tensor, memory: Tensor, mask: Tensor | None = None,
        tgt_mask: Tensor | None = None, cache: list | None = None,
    ) -> Tensor:
        """Read ``tgt [b t]``; return logits ``[b t dec_num_tokens]``.

        ``mask`` is the *source's*, ``[b s]`` or ``[b t s]``; ``tgt_mask``
        (for padding on the left alone) and ``cache`` are the decoder's.
        """
        check_ids("target", tgt, self.config.dec_num_tokens)
        x = self.decoder(self.dec_emb(tgt), memory, mask=tgt_mask,
                         memory_mask=mask, cache=cache)
        if self.config.scale_logits:
            x = x * self.config.dim**-0.5
        return self.head(x)

    def forward(
        self, src: Tensor, tgt: Tensor, mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[b t dec_num_tokens]`` for what follows each ``tgt``.

        ``src [b s]`` and ``tgt [b t]`` are ids, ``tgt`` with a start token
        (see ``shift_right``); ``mask [b s]`` and ``tgt_mask [b t]`` are
        bool, True at real tokens; default: all. ValueError for a mask of
        pairs: ``encode`` and ``decode`` need one each.
        """
        if mask is not None and mask.ndim == 3:
            raise ValueError(f"mask is {tuple(mask.shape)}; pass (b, s)")
        return self.decode(tgt, self.encode(src, mask), mask, tgt_mask)

    def shift_right(self, labels: Tensor) -> Tensor:
        """What the decoder reads to write ``labels [b t]``."""
        start = torch.full_like(labels[:, :1], self.config.start_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_id)

    def loss(
        self, src: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy, in nats for each label that counts.

        ``labels [b t]`` are ids, padded on the right with -100, which does
        not count; the rest is as in ``forward``.
        """
        real = labels.masked_fill(labels == -100, self.config.pad_id)
        check_ids("label", real, self.config.dec_num_tokens)
        logits = self(src, self.shift_right(labels), mask).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten().long())

    def generate(self, src: Tensor, mask: Tensor | None = None, *,
                 num_beams: int = 1, **options) -> Tensor:
        """Write ``[b n]`` by ``generate``; with beams, ``beam_search``."""
        from t5_book import beam_search, generate

        if num_beams == 1:
            return generate(self, src, mask, **options)
        options["num_beams"] = num_beams
        return beam_search(self, src, mask, **options).ids

    @classmethod
    def from_pretrained(cls, name_or_path, *, dtype=None, device=None):
        """Load a released T5, as ``t5_book.load_pretrained`` says."""
        from t5_book.pretrained import load_pretrained

        options = {"dtype": dtype, "device": device, "kind": cls}
        return load_pretrained(name_or_path, **options)

    def save_pretrained(self, folder) -> None:
        """Write this model's files, as ``t5_book.save_pretrained`` says."""
        from t5_book.pretrained import save_pretrained

        save_pretrained(self, folder)

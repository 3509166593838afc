"""The whole T5: from ids of a source and a target to logits and loss.

Built in chapter 11, "The whole T5: embeddings, two stacks, a head and a
loss" (chapters/t5.md). Edit the chapter, not this file.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5_book.checks import check_ids, check_mask, check_vectors
from t5_book.config import T5Config
from t5_book.decoder import Decoder, DecoderCache
from t5_book.encoder import Encoder

__all__ = ["T5"]


def _signature() -> inspect.Signature:
    """The fields of ``T5Config`` as keywords, those without a default first."""
    fields = inspect.signature(T5Config).parameters.values()
    return inspect.Signature(
        sorted(fields, key=lambda field: field.default is not field.empty)
    )


class T5(nn.Module):
    """The text-to-text transformer of Raffel et al. 2019.

    Its keywords are the fields of ``T5Config``, which says what each means;
    ``PRESETS`` has those of the released models.

    Raises:
        ValueError: if the keywords do not make a T5.
        TypeError: if one is missing or unknown.

    Source: paper, section 2.1; initialisation of mesh-tensorflow and, for an
    untied head, t5x, ``network.py``.
    """

    # So that help(T5) and editors show the keywords, which T5Config names once.
    __signature__ = _signature()

    def __init__(self, **keywords):
        super().__init__()
        config = T5Config(**keywords)
        self.config = config
        self.enc_emb = nn.Embedding(config.enc_num_tokens, config.dim)
        self.dec_emb = self.enc_emb
        if not config.tie_token_emb:
            self.dec_emb = nn.Embedding(config.dec_num_tokens, config.dim)
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config.decoder)
        self.head = nn.Linear(config.dim, config.dec_num_tokens, bias=False)
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)
        if config.tie_head:
            self.head.weight = self.dec_emb.weight
            # load_state_dict(assign=True) gives the head a tensor of its own.
            self.register_load_state_dict_post_hook(_tie_again)

    def encode(self, src: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """Read the source.

        Args:
            src: ids ``[b s]``.
            src_mask: bool ``[b s]``, True at real tokens, or ``[b s s]``, True
                where two may meet; default: all real.

        Returns:
            The memory ``[b s dim]``, for ``decode``.

        Raises:
            TypeError, ValueError, IndexError: as ``check_ids`` and ``check_mask``.
        """
        check_ids("source", src, self.config.enc_num_tokens)
        check_mask("source", src_mask, src.shape[1], src.shape)
        return self.encoder(self.enc_emb(src), src_mask)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Read the target, looking at the source.

        Args:
            tgt: ids ``[b t]``, a start token first (see ``shift_right``); with
                a cache, only what is new.
            memory: ``[b s dim]``, from ``encode``; or pass a cache instead.
            src_mask: bool ``[b s]``, True at real tokens of the source, or
                ``[b t s]`` for pairs; default: all real.
            tgt_mask: bool ``[b t]``, True at real tokens of the target, or
                ``[b t t]`` for pairs; default: all real. Padding on the right
                needs none: nothing attends to what comes later.
            cache: ``decoder.new_cache(memory, src_mask)``.

        Returns:
            Logits ``[b t dec_num_tokens]`` for what follows each token.

        Raises:
            TypeError, ValueError, IndexError: as ``check_ids`` and
                ``check_mask``; ValueError if not exactly one of ``memory`` and
                ``cache`` is given, or if ``memory`` is of another batch.
        """
        check_ids("target", tgt, self.config.dec_num_tokens)
        b, t = tgt.shape
        if (memory is None) == (cache is None):
            raise ValueError("pass either memory or a cache made from it, and not both")
        if cache is None:
            check_vectors("memory", memory, (b, None, self.config.dim))
            check_mask("source", src_mask, t, (b, memory.shape[1]))
            check_mask("target", tgt_mask, t, (b, t))
        else:
            if src_mask is not None:
                raise ValueError("the cache holds the source's mask; pass no src_mask")
            check_mask("target", tgt_mask, t, (b, cache.length + t))
        x = self.decoder(self.dec_emb(tgt), memory, src_mask, tgt_mask, cache)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Score every token of the vocabulary against ``x [... dim]``."""
        return self.head(x * self.config.logit_scale)  # [... v]

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits for what follows each token of the target.

        Args:
            src: ids of the source ``[b s]``.
            tgt: ids of the target ``[b t]``, a start token first (see
                ``shift_right``).
            mask: bool ``[b s]``, True at real tokens of the **source**;
                default: all real.
            tgt_mask: bool ``[b t]``, True at real tokens of the target;
                default: all real.

        Returns:
            Logits ``[b t dec_num_tokens]``.

        Raises:
            TypeError, ValueError, IndexError: as ``encode`` and ``decode``.
                A mask of pairs is refused: those need one for each attention.
        """
        if isinstance(mask, Tensor) and mask.ndim == 3:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; pass (batch, source length), or "
                "call encode and decode with a mask of pairs each"
            )
        return self.decode(tgt, self.encode(src, mask), mask, tgt_mask)

    def shift_right(self, labels: Tensor) -> Tensor:
        """What the decoder reads to write ``labels [b t]``: ids ``[b t]``."""
        start = torch.full_like(labels[:, :1], self.config.start_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_id)

    def loss(self, src: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy, in nats for each label that counts.

        Args:
            src: ids of the source ``[b s]``.
            labels: ids ``[b t]``, padded on the right with -100, which does
                not count.
            mask: bool ``[b s]``, True at real tokens of the source; default:
                all real.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError, IndexError: as ``forward``.
        """
        known = labels.masked_fill(labels == -100, self.config.pad_id)
        check_ids("label", known, self.config.dec_num_tokens)
        logits = self(src, self.shift_right(labels), mask)  # [b t v]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten().long())


def _tie_again(model: nn.Module, _) -> None:
    """Make the target's embedding the head again, after weights were loaded."""
    model.head.weight = model.dec_emb.weight

"""T5 on one page: the whole model of Raffel et al. 2019, for reading.

It imports nothing from this package and gives the same logits, loss,
gradients and greedy texts. What the package has in addition is in its other
modules: checks of what you pass in, two vocabularies, beam search, packed
rows, released weights.

Built in chapter 11, "The whole T5: embeddings, two stacks, a head and a
loss" (chapters/t5.md). Edit the chapter, not this file.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = []


@dataclass(frozen=True)
class Config:
    """The sizes of t5-small, unless you say otherwise."""

    vocab_size: int = 32128
    dim: int = 512  # features of a vector in the residual stream
    mlp_dim: int = 2048  # hidden features of the feed-forward layers
    enc_depth: int = 6  # blocks of the encoder
    dec_depth: int = 6  # blocks of the decoder
    heads: int = 8
    dim_head: int = 64  # heads * dim_head need not be dim
    dropout: float = 0.0
    gated: bool = False  # T5 1.1: a gated GELU ...
    tie_head: bool = True  # ... and False here, for a head of its own
    bias_per_layer: bool = False  # UMT5: a bias table for each block
    num_buckets: int = 32
    max_distance: int = 128
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        # half precision would lose the small squares
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # no mean is subtracted and no bias is added: that is all of RMSNorm
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(self.weight.dtype)


class PositionBias(nn.Module):
    """One learned number for each head and each bucket of distances."""

    def __init__(self, config: Config, bidirectional: bool):
        super().__init__()
        self.config, self.bidirectional = config, bidirectional
        self.table = nn.Embedding(config.num_buckets, config.heads)
        nn.init.xavier_uniform_(self.table.weight)

    def forward(self, queries: int, keys: int) -> Tensor:
        key = torch.arange(keys, device=self.table.weight.device)
        query = key[keys - queries :]  # the queries are the last positions
        relative = key[None, :] - query[:, None]  # [q k], negative to the left
        if self.bidirectional:  # the encoder: half of the buckets to each side
            buckets, distance = self.config.num_buckets // 2, relative.abs()
        else:  # the decoder never looks to the right
            buckets, distance = self.config.num_buckets, (-relative).clamp(min=0)
        # near distances get a bucket each, far ones share: two for each doubling
        exact = buckets // 2
        scale = math.log(self.config.max_distance / exact)
        far = (distance.clamp(min=exact).float() / exact).log() / scale
        far = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = torch.where(distance < exact, distance, far)
        if self.bidirectional:
            bucket = bucket + buckets * (relative > 0)
        return self.table(bucket).permute(2, 0, 1)[None]  # [1 h q k]


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.q = nn.Linear(config.dim, inner, bias=False)
        self.k = nn.Linear(config.dim, inner, bias=False)
        self.v = nn.Linear(config.dim, inner, bias=False)
        self.o = nn.Linear(inner, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        # T5 does not divide its scores by sqrt(dim_head): q starts smaller
        nn.init.normal_(self.q.weight, std=(config.dim * config.dim_head) ** -0.5)
        nn.init.normal_(self.k.weight, std=config.dim**-0.5)
        nn.init.normal_(self.v.weight, std=config.dim**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def split_heads(self, x: Tensor) -> Tensor:  # [b n (h d)] -> [b h n d]
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        # apart from forward, so that generation can keep them
        return self.split_heads(self.k(context)), self.split_heads(self.v(context))

    def forward(self, x: Tensor, keys_values, mask=None, bias=None) -> Tensor:
        keys, values = keys_values  # each [b h k d]
        scores = self.split_heads(self.q(x)) @ keys.mT  # [b h q k]
        if bias is not None:
            scores = scores + bias
        if mask is not None:  # bool, broadcasts to [b h q k], True = attend
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = self.dropout(scores.softmax(-1))
        mixed = weights @ values  # [b h q d]
        return self.o(mixed.transpose(1, 2).flatten(2))  # [b q dim]


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gated = config.gated
        self.wi_0 = nn.Linear(config.dim, config.mlp_dim, bias=False)
        nn.init.normal_(self.wi_0.weight, std=config.dim**-0.5)
        if config.gated:
            self.wi_1 = nn.Linear(config.dim, config.mlp_dim, bias=False)
            nn.init.normal_(self.wi_1.weight, std=config.dim**-0.5)
        self.wo = nn.Linear(config.mlp_dim, config.dim, bias=False)
        nn.init.normal_(self.wo.weight, std=config.mlp_dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:  # the tanh form is what T5 1.1 was trained with
            hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        else:
            hidden = F.relu(self.wi_0(x))
        return self.wo(self.dropout(hidden))


class Block(nn.Module):
    """Self-attention; in the decoder cross-attention; feed-forward."""

    def __init__(self, config: Config, is_decoder: bool):
        super().__init__()
        self.self_norm = RMSNorm(config)
        self.self_attention = Attention(config)
        if is_decoder:
            self.cross_norm = RMSNorm(config)
            self.cross_attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, bias, source=None, source_mask=None, past=None):
        # each sublayer reads a normed copy of the stream and adds what it finds
        y = self.self_norm(x)
        keys, values = self.self_attention.keys_values(y)
        if past is not None:  # generation: what was read before comes first
            if past:
                keys = torch.cat([past["keys"], keys], dim=2)  # [b h k d]
                values = torch.cat([past["values"], values], dim=2)
            past.update(keys=keys, values=values)
        x = x + self.dropout(self.self_attention(y, (keys, values), mask, bias))
        if source is not None:
            y = self.cross_attention(self.cross_norm(x), source, source_mask)
            x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    """The encoder or the decoder: blocks, and a norm after the last."""

    def __init__(self, config: Config, is_decoder: bool):
        super().__init__()
        depth = config.dec_depth if is_decoder else config.enc_depth
        tables = depth if config.bias_per_layer else 1  # one serves all blocks
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(depth))
        self.biases = nn.ModuleList(
            PositionBias(config, bidirectional=not is_decoder) for _ in range(tables)
        )
        self.norm, self.dropout = RMSNorm(config), nn.Dropout(config.dropout)

    def forward(self, x, mask, keys, sources=None, source_mask=None, pasts=None):
        biases = [bias(x.shape[1], keys) for bias in self.biases]  # each [1 h q k]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            bias = biases[i if len(biases) > 1 else 0]
            source = None if sources is None else sources[i]
            past = None if pasts is None else pasts[i]
            x = block(x, mask, bias, source, source_mask, past)
        return self.dropout(self.norm(x))


class T5(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)  # std 1
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)
        if config.tie_head:
            self.head.weight = self.embedding.weight

    def encode(self, src: Tensor, src_mask: Tensor | None = None):
        """Ids ``[b s]`` to what each block of the decoder reads of them, and a mask."""
        mask = None if src_mask is None else src_mask[:, None, None, :]  # [b 1 1 s]
        memory = self.encoder(self.embedding(src), mask, src.shape[1])  # [b s dim]
        sources = [
            block.cross_attention.keys_values(memory) for block in self.decoder.blocks
        ]
        return sources, mask

    def decode(self, tgt: Tensor, sources, source_mask=None, pasts=None, keys=None):
        """Ids ``[b t]`` to logits ``[b t v]`` for what follows each of them."""
        q, k = tgt.shape[1], keys or tgt.shape[1]
        causal = torch.ones(q, k, dtype=torch.bool, device=tgt.device).tril(k - q)
        x = self.embedding(tgt)
        x = self.decoder(x, causal, k, sources, source_mask, pasts)  # [b t dim]
        if self.config.tie_head:  # a table of std 1 makes the logits too large
            x = x * self.config.dim**-0.5
        return self.head(x)

    def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor | None = None):
        return self.decode(tgt, *self.encode(src, src_mask))

    def loss(self, src: Tensor, labels: Tensor, src_mask: Tensor | None = None):
        """Mean cross-entropy in nats; labels ``[b t]`` of -100 do not count."""
        start = torch.full_like(labels[:, :1], self.config.start_id)
        tgt = torch.cat([start, labels[:, :-1]], dim=1)  # shifted one to the right
        tgt = tgt.masked_fill(tgt == -100, self.config.pad_id)
        logits = self(src, tgt, src_mask)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def generate(self, src: Tensor, src_mask=None, max_new_tokens: int = 64) -> Tensor:
        """Write greedily: ids ``[b n]``, each row ended by eos and padded."""
        sources, source_mask = self.encode(src, src_mask)
        pasts = [{} for _ in self.decoder.blocks]
        tgt = torch.full_like(src[:, :1], self.config.start_id)
        done = torch.zeros_like(tgt, dtype=torch.bool)
        for n in range(1, max_new_tokens + 1):
            # the cache holds what was read, so only the last token is new
            logits = self.decode(tgt[:, -1:], sources, source_mask, pasts, keys=n)
            token = logits[:, -1].argmax(-1, keepdim=True)  # [b 1]
            token = token.masked_fill(done, self.config.pad_id)
            tgt = torch.cat([tgt, token], dim=1)
            done = done | (token == self.config.eos_id)
            if done.all():
                break
        return tgt[:, 1:]

"""The same model twice, ours and that of ``transformers``, for the benchmarks."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from t5_book import T5

# Sizes of the models, both stacks alike; 64 features a head only in t5-small's.
SHAPES = {
    "d128": dict(dim=128, heads=8, dim_head=16, depth=4, mlp_dim=512, vocab=8000),
    "d256": dict(dim=256, heads=8, dim_head=32, depth=4, mlp_dim=1024, vocab=8000),
    "long": dict(dim=128, heads=8, dim_head=16, depth=2, mlp_dim=512, vocab=8000),
    "t5-small": dict(dim=512, heads=8, dim_head=64, depth=6, mlp_dim=2048, vocab=32128),
}


def ours(shape: str, attention: str) -> T5:
    """Our model in one of the shapes."""
    sizes = SHAPES[shape]
    side = dict(
        num_tokens=sizes["vocab"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        dim_head=sizes["dim_head"],
        mlp_mult=sizes["mlp_dim"] / sizes["dim"],
    )
    both = {f"{s}_{name}": value for s in ("enc", "dec") for name, value in side.items()}
    return T5(dim=sizes["dim"], attention=attention, **both)


def theirs(shape: str, attention: str) -> nn.Module:
    """Theirs, without dropout as ours is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

    sizes = SHAPES[shape]
    config = transformers.T5Config(
        vocab_size=sizes["vocab"],
        d_model=sizes["dim"],
        d_kv=sizes["dim_head"],
        num_heads=sizes["heads"],
        num_layers=sizes["depth"],
        d_ff=sizes["mlp_dim"],
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
        attn_implementation=attention,
    )
    return transformers.T5ForConditionalGeneration(config)


def batch(shape: str, b: int, s: int, t: int, padded: bool):
    """Ids of sources and targets, and a mask or None."""
    generator = torch.Generator().manual_seed(0)
    high = SHAPES[shape]["vocab"]
    src = torch.randint(2, high, (b, s), generator=generator)
    labels = torch.randint(2, high, (b, t), generator=generator)
    if not padded:
        return src, labels, None
    lengths = torch.linspace(0.75, 1, b).mul(s).long()  # rows of different lengths
    return src, labels, torch.arange(s)[None, :] < lengths[:, None]


def loss(model: nn.Module, src, labels, mask):
    """The loss of either model."""
    if isinstance(model, T5):
        return model.loss(src, labels, mask)
    mask = None if mask is None else mask.long()
    return model(input_ids=src, attention_mask=mask, labels=labels).loss


def training_step(
    model: nn.Module, src, labels, mask, bf16: bool = False
) -> Callable[[], None]:
    """Forward, backward and a step of the same fused AdamW for both."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, src, labels, mask)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def encode(model: nn.Module, src, mask) -> Callable[[], object]:
    """The encoder alone, for inference."""
    model.eval()

    @torch.inference_mode()
    def work():
        if isinstance(model, T5):
            return model.encode(src, mask)
        mask_there = None if mask is None else mask.long()
        return model.encoder(input_ids=src, attention_mask=mask_there)

    return work


def build(name: str, shape: str) -> nn.Module:
    """``"ours plain"``, ``"theirs sdpa"``, …: the model of that name."""
    whose, attention = name.split()
    return {"ours": ours, "theirs": theirs}[whose](shape, attention)


def main(arguments: list[str] | None = None) -> int:
    """Print how many weights the models of each shape have."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    for shape in SHAPES:
        models = ours(shape, "plain"), theirs(shape, "sdpa")
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        print(shape, *counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())

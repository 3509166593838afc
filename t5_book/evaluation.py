"""Evaluation: loss and accuracy of a model on held-out batches.

Built in chapter 20, "A training loop that can be stopped and resumed"
(chapters/training.md). Edit the chapter, not this file.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from t5_book.batches import Batch
from t5_book.inference import evaluation_view
from t5_book.packing import PackedBatch, batch_logits

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch | PackedBatch]) -> dict:
    """Measure a ``T5`` on batches, without dropout.

    Args:
        model: the ``T5``, in any mode; its mode is left alone.
        batches: what to measure it on; labels of -100 don't count.

    Returns:
        ``loss``, nats per target token, and ``accuracy``, the share of
        target tokens whose most likely choice is right, teacher-forced.

    Raises:
        ValueError: if the batches hold no label that counts.
    """
    loss, right, count = 0.0, 0, 0
    device = next(model.parameters()).device
    model = evaluation_view(model)
    for batch in batches:
        batch = batch.to(device)
        real = batch.labels != -100
        labels = batch.labels[real].long()  # [n]
        logits = batch_logits(model, batch)[real]  # [n v]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(dim=-1) == labels).sum().item()
        count += len(labels)
    if count == 0:
        raise ValueError("no label to measure; are the batches used up?")
    return {"loss": loss / count, "accuracy": right / count}

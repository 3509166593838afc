"""Losses: cross-entropy as T5 was trained with it.

Built in chapter 20, "A training loop that can be stopped and resumed"
(chapters/training.md). Edit the chapter, not this file.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5_book.batches import Batch
from t5_book.checks import check_ids
from t5_book.packing import PackedBatch, batch_logits

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean cross-entropy in nats, with label smoothing and z-loss as in t5x.

    Args:
        logits: ``[b t v]``.
        labels: ``[b t]``, -100 where one doesn't count.
        label_smoothing: probability that the other ids share; default 0. The
            entropy of such a target is subtracted, so that the best possible
            loss is 0.
        z_loss: weight of log(Z) squared, where Z is the sum of the exponentials
            of the logits; default 0. Google's codes train with 1e-4.

    Returns:
        A scalar, in float32 or float64.

    Raises:
        ValueError: if the shapes don't fit, or if the smoothing would make the
            label less likely than the others.
        TypeError, IndexError: if the labels are no ids of the vocabulary.

    Source: t5x, ``losses.py``; the mean is PyTorch's.
    """
    v = logits.shape[-1]
    if logits.shape[:-1] != labels.shape or not 0 <= label_smoothing < (v - 1) / v:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}, "
            f"and label_smoothing is {label_smoothing}; pass logits (b, t, v), labels "
            f"(b, t) and 0 <= label_smoothing < {(v - 1) / v:.3g}"
        )
    real = labels != -100
    check_ids("label", labels.masked_fill(~real, 0), v)
    # A long sum in half precision would lose most of its digits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # PyTorch spreads its smoothing over all ids, the label included.
    spread = label_smoothing * v / (v - 1)
    flat = logits.flatten(0, -2), labels.flatten().long()
    loss = F.cross_entropy(*flat, label_smoothing=spread)
    if label_smoothing:
        on, off = 1 - label_smoothing, label_smoothing / (v - 1)
        loss = loss + on * math.log(on) + label_smoothing * math.log(off)
    if z_loss:
        log_z = logits.logsumexp(dim=-1)  # [b t]
        loss = loss + z_loss * log_z[real].square().mean()
    return loss


def batch_loss(
    model: nn.Module,
    batch: Batch | PackedBatch,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """``cross_entropy`` of a ``T5`` on a batch, padded or packed."""
    logits = batch_logits(model, batch)  # [b t v]
    return cross_entropy(logits, batch.labels, label_smoothing, z_loss)

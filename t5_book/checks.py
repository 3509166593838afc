"""Checks at the door: refuse what can't work, and say what would.

The public calls of the model use them once, on what the caller passes in. What
is inside trusts its callers.

Built in chapter 9, "The encoder: a residual stream through a stack of
blocks" (chapters/encoder.md) and chapter 11, "The whole T5: embeddings, two
stacks, a head and a loss" (chapters/t5.md). Edit the chapter, not this
file.
"""

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = []


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse what is not an integer of at least ``least``, by ValueError."""
    try:
        # numpy's integers are welcome; True is an int in Python, and isn't here
        good = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} is {value!r}; pass an integer, {least} or more")


def check_flag(name: str, value: object) -> None:
    """Refuse what is not True or False, by ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; pass True or False")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is not one of ``choices``, by ValueError."""
    if value not in list(choices):
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; pass one of {known}")


def check_number(name: str, value: object, least: float, below: float) -> None:
    """Refuse what is not a number with ``least <= value < below``, by ValueError."""
    try:
        good = not isinstance(value, str | bool) and least <= float(value) < below
    except TypeError:
        good = False
    if not good:
        wanted = f"{least:g} or more"
        if below < math.inf:
            wanted = f"from {least:g} to less than {below:g}"
        raise ValueError(f"{name} is {value!r}; pass a number, {wanted}")


def check_ids(name: str, ids: Tensor, num_tokens: int) -> None:
    """Refuse ids that an embedding table of ``num_tokens`` rows lacks.

    Ids on the CPU are compared with the table. On a GPU that would mean to
    wait for it at every call, so there only type and shape are checked.

    Args:
        name: what to call the ids in the error, such as ``"source"``.
        ids: should be int32 or int64, ``[b n]``.
        num_tokens: rows of the table.

    Raises:
        TypeError: if ``ids`` is no tensor of integers.
        ValueError: if it is not a batch with at least one example and token.
        IndexError: if an id is negative, or ``num_tokens`` or more.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{name} ids are {type(ids)}; pass torch.tensor([ids]) for a batch of one"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} ids are {ids.dtype}; pass ids.long()")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"{name} ids have shape {tuple(ids.shape)}; pass (batch, length) "
            "with at least one example and one token"
        )
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= num_tokens:
        raise IndexError(
            f"{name} ids run from {low} to {high}, but the vocabulary "
            f"holds 0 to {num_tokens - 1}"
        )


def check_mask(
    name: str, mask: Tensor | None, queries: int, ids_shape: tuple[int, int]
) -> None:
    """Refuse a mask that does not fit the sequence that it hides.

    Args:
        name: what to call the sequence in the error, such as ``"source"``.
        mask: should be bool, ``[b k]`` or, for each query, ``[b q k]``; or None.
        queries: number of queries ``q`` that attend to the sequence.
        ids_shape: ``(b, k)`` of the sequence.

    Raises:
        TypeError: if ``mask`` is no boolean tensor.
        ValueError: if its shape is another.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask)
        raise TypeError(
            f"{name} mask is {kind}; pass a boolean tensor, True where a token "
            "is real: mask.bool()"
        )
    b, k = ids_shape
    if tuple(mask.shape) not in ((b, k), (b, queries, k)):
        raise ValueError(
            f"{name} mask has shape {tuple(mask.shape)} but the {name} ids have shape "
            f"{(b, k)}; pass a mask of that shape, or of {(b, queries, k)} for pairs"
        )


def check_vectors(
    name: str, x: Tensor, shape: tuple[int | None, int | None, int]
) -> None:
    """Refuse what is not ``[b n dim]``; None in ``shape`` stands for any number.

    Raises:
        ValueError: if the shape is another.
    """
    fits = x.ndim == 3 and all(
        want in (None, have) for have, want in zip(x.shape, shape)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; pass {shape}, where None is any number"
        )

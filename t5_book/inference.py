"""Inference beside training: a view of a model, in evaluation mode.

Built in chapter 12, "Generating text: greedy decoding and sampling"
(chapters/generation.md). Edit the chapter, not this file.
"""

import copy
from functools import partial

from torch import nn

__all__ = []


def evaluation_view(model: nn.Module) -> nn.Module:
    """A model to compute with in evaluation mode, whatever mode it is in.

    Nothing of ``model`` is touched, so that other threads can go on
    training with it.

    Returns:
        ``model`` itself if all of it is in evaluation mode, so don't change
        that while the view is in use. Otherwise a copy of its modules, with
        the same weights, buffers, hooks and settings: not copies of them.
        A part compiled with ``torch.compile`` runs uncompiled in the view.
    """
    if not any(part.training for part in model.modules()):
        return model
    of_torch = vars(nn.Module()).keys() - {"_modules"}
    memo = {}
    for part in model.modules():
        for name, value in vars(part).items():
            if name in of_torch or not leads_to_modules(value):
                memo[id(value)] = value
    for part in list(model.modules()):
        # A compiled copy would be compiled again, each time.
        if hasattr(part, "_orig_mod"):
            memo[id(part)] = copy.deepcopy(part._orig_mod, memo)
    return copy.deepcopy(model, memo).eval()


def leads_to_modules(value: object) -> bool:
    """Whether this is a module, a method of one, or holds any of these."""
    if isinstance(value, partial):
        value = [value.func, *value.args, value.keywords]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(leads_to_modules(one) for one in value)
    return isinstance(getattr(value, "__self__", value), nn.Module)

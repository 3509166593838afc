"""Checkpoints: the whole state of a training run, in one file.

Built in chapter 19, "A training loop that can be stopped and resumed"
(chapters/training.md). Edit the chapter, not this file.
"""

import errno
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = []

PARTS = {
    "step": int,
    "history": list,
    "model": dict,
    "optimizers": list,
    "places": list,  # in which optimizer and group each parameter is
    "rng": Tensor,
    "cuda_rng": list,
}


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint; until it's complete, the old one stays."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint, on the CPU, without running code from the file.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is damaged, or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file breaks in many ways
        # A good file that can't be read is another matter. But torch looks for
        # the end of a file that was cut short before its beginning: EINVAL.
        unread = isinstance(error, OSError) and error.errno != errno.EINVAL
        if unread or isinstance(error, MemoryError):
            raise
        raise ValueError(
            f"{path} is damaged or not a checkpoint of a Trainer "
            f"({type(error).__name__}); use another folder for a new run"
        ) from error
    found = state if isinstance(state, dict) else {}
    lacking = [
        name for name, kind in PARTS.items() if not isinstance(found.get(name), kind)
    ]
    if lacking:
        raise ValueError(
            f"{path} is not a checkpoint of a Trainer: it has no {', '.join(lacking)}; "
            "use another folder for a new run"
        )
    return state


def places_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    """Say in which optimizer and group each parameter is, in their order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = []
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            place = f"optimizer {i} ({type(optimizer).__name__}), group {j}"
            found = [names.get(p, "a parameter of no name") for p in group["params"]]
            for name in found or ["nothing"]:
                places.append(f"{name} in {place}")
    return places


def check_fit(
    path: Path, state: dict, model: nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    """Refuse a checkpoint of another model, other optimizers or more GPUs.

    Raises:
        ValueError: if it does not fit.
    """
    own, saved = model.state_dict(), state["model"]
    for name in own | saved:
        here, there = _describe(own.get(name)), _describe(saved.get(name))
        if here != there:
            raise ValueError(
                f"{path} is of another model: {name} is {there} in the file and "
                f"{here} here; make the model as it was, or use another folder"
            )
    places = places_of(model, optimizers)
    pairs = zip_longest(state["places"], places, fillvalue="missing")
    for number, (there, here) in enumerate(pairs):
        if here != there:
            raise ValueError(
                f"{path} is of other optimizers: parameter {number} of the file is "
                f"{there}, and here {here}; make them as they were, or use another "
                "folder"
            )
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(
            f"{path} has the state of {len(state['optimizers'])} optimizers, and "
            f"{len(optimizers)} are here; make them as they were"
        )
    gpus = torch.cuda.device_count()
    if len(state["cuda_rng"]) > gpus:
        raise ValueError(
            f"{path} has the random state of {len(state['cuda_rng'])} GPUs, and "
            f"{gpus} are here; resume where there are as many"
        )


def _describe(weight):
    """Type and shape of a weight."""
    if not isinstance(weight, Tensor):
        return "missing"
    return f"{weight.dtype} {tuple(weight.shape)}"

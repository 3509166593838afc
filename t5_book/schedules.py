"""Schedules: factors on the learning rates, from the step.

Built in chapter 18, "Optimizers: Adafactor and Muon"
(chapters/optimizers.md) and chapter 20, "A training loop that can be
stopped and resumed" (chapters/training.md). Edit the chapter, not this
file.
"""

from collections.abc import Callable

from t5_book.checks import check_integer

__all__ = ["inverse_sqrt_schedule", "linear_schedule"]


def inverse_sqrt_schedule(warmup: int = 10_000) -> Callable[[int], float]:
    """Stay at 1 for ``warmup`` steps, then fall as one over the root of the step.

    With a rate of ``1 / sqrt(warmup)`` this is the paper's schedule.
    ``adafactor`` has it built in and needs no other.

    Args:
        warmup: the paper's ``k``; default 10,000.

    Returns:
        A function from the step, counted from 0, to the factor by which
        every learning rate is multiplied.

    Raises:
        ValueError: if ``warmup`` is less than 1.

    Source: paper, section 3.1.2.
    """
    check_integer("warmup", warmup, 1)
    return lambda step: (warmup / max(step, warmup)) ** 0.5


def linear_schedule(steps: int, warmup: int) -> Callable[[int], float]:
    """Climb to 1 in ``warmup`` steps, then fall to 0 at ``steps``.

    Args:
        steps: length of the run.
        warmup: length of the climb, from 1 to ``steps - 1``.

    Returns:
        A function from the step, counted from 0, to the factor by which
        every learning rate is multiplied.

    Raises:
        ValueError: if ``warmup`` is not between 1 and ``steps - 1``.
    """
    if not 1 <= warmup < steps:
        raise ValueError(
            f"warmup is {warmup} in a run of {steps} steps; pass 1 to {steps - 1}"
        )

    def factor(step: int) -> float:
        up, down = (step + 1) / warmup, (steps - step) / (steps - warmup)
        return max(0.0, min(up, down))

    return factor

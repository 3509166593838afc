"""Optimizers: how far each weight of T5 goes at each step.

Built in chapter 17, "Decide how far to step" (chapters/optimizers.md). Edit
the chapter, not this file.
"""

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

__all__ = ["Adafactor", "Muon", "adafactor", "muon_adamw", "orthogonalize"]


class _PerParameter(Optimizer):
    """Call ``update(p, group)`` for each parameter with a gradient."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step. ``closure`` is ignored."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)


class Adafactor(_PerParameter):
    """Steps in proportion to the weights; squares kept as row and column.

    Matrices with a side below 128 and vectors keep every square. There is
    no momentum and no decay. It computes in the type of the weights.

    Args:
        params: parameters, or parameter groups of them.
        lr: relative size of a step; default 0.001, for fine-tuning.
        warmup: if given, step ``n + 1`` is ``lr / sqrt(max(n, warmup))``.

    Raises:
        ValueError: if ``warmup`` is less than 1.

    Built in chapter 17, "Decide how far to step" (Shazeer and Stern 2018;
    code of t5x, ``adafactor.py``).
    """

    def __init__(self, params, lr: float = 1e-3, warmup: int | None = None):
        if warmup is not None and warmup < 1:
            raise ValueError(f"warmup is {warmup}; pass 1 or more, or None")
        super().__init__(params, {"lr": lr, "warmup": warmup})

    def track(self, p: Tensor, name: str, new: Tensor) -> Tensor:
        """Take ``new`` into a running mean for ``p``; return the mean."""
        mean = self.state[p].setdefault(name, torch.zeros_like(new))
        return mean.lerp_(new, self.state[p]["step"] ** -0.8)

    def normalize(self, p: Tensor) -> Tensor:
        """Divide the gradient of ``p`` by the root of its mean square."""
        tiny = max(1e-30, torch.finfo(p.dtype).tiny)
        square = p.grad.square() + tiny
        if p.ndim != 2 or min(p.shape) < 128:
            return p.grad * self.track(p, "squares", square).rsqrt()
        rows = self.track(p, "rows", square.mean(dim=1, keepdim=True))
        columns = self.track(p, "columns", square.mean(dim=0))
        return p.grad * (rows / rows.mean()).rsqrt() * columns.rsqrt()

    def update(self, p: Tensor, group: dict) -> None:
        """Step with one parameter ``p`` of any shape."""
        state, rate = self.state[p], group["lr"]
        steps_before = state.get("step", 0)
        state["step"] = steps_before + 1
        if group["warmup"] is not None:
            rate = rate * max(steps_before, group["warmup"]) ** -0.5
        step = self.normalize(p)
        step = step / _rms(step).clamp(min=1)
        p.sub_(rate * _rms(p).clamp(min=1e-3) * step)


def _rms(x: Tensor) -> Tensor:
    """Root of the mean square of all numbers."""
    return x.square().mean().sqrt()


def adafactor(
    model: nn.Module, warmup: int | None = 10_000
) -> list[Optimizer]:
    """Make the paper's optimizer, with its schedule built in.

    Args:
        model: its parameters that require a gradient are trained.
        warmup: steps at a constant rate, the paper's ``k``; default
            10,000. After ``n`` steps the relative step size is
            ``1 / sqrt(max(n, warmup))``. None: always 0.001, the paper's
            choice for fine-tuning.

    Returns:
        A list of one ``Adafactor``.

    Built in chapter 17, "Decide how far to step" (paper, section 3.1.2).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-3 if warmup is None else 1.0
    return [Adafactor(trained, rate, warmup)]


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Bring all singular values near 1 and keep the singular vectors.

    Args:
        matrix: ``[n m]``, or a stack of such matrices, ``[... n m]``.
        rounds: of the iteration; default 5. Singular values above 1 % of
            the matrix's norm then end between 0.65 and 1.25.

    Returns:
        ``[... n m]``.

    Built in chapter 17, "Decide how far to step" (Jordan et al. 2024).
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon(_PerParameter):
    """Momentum whose steps are orthogonalized, for matrices.

    It computes in the type of the weights. ``torch.optim.Muon`` takes the
    same steps in bfloat16, which is slow where the processor lacks it.

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate; default 0.005.
        momentum: share of the old mean in the new; default 0.95.
        rounds: see ``orthogonalize``; default 5.

    Built in chapter 17, "Decide how far to step" (Jordan et al. 2024).
    """

    def __init__(
        self, params, lr: float = 5e-3, momentum: float = 0.95, rounds=5
    ):
        defaults = {"lr": lr, "momentum": momentum, "rounds": rounds}
        super().__init__(params, defaults)

    def update(self, p: Tensor, group: dict) -> None:
        """Step with one matrix ``p [n m]``."""
        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(mean, group["momentum"])
        scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
        step = orthogonalize(ahead, group["rounds"])
        p.add_(step, alpha=-group["lr"] * scale)


def muon_adamw(
    model: nn.Module,
    lr: float = 5e-3,
    embedding_lr: float = 0.05,
    table_lr: float = 0.3,
    rounds: int = 3,
) -> list[Optimizer]:
    """Make optimizers that learn fast on a small scale.

    Args:
        model: a ``T5``; parameters that require a gradient are trained.
        lr: Muon's rate, for the matrices of the blocks; default 0.005.
        embedding_lr: AdamW's rate for embeddings, head and norms; default
            0.05, for embeddings of size 1 as T5 has them.
        table_lr: AdamW's rate for the tables of relative position biases,
            which are on the scale of attention scores; default 0.3.
        rounds: of Muon's iteration; default 3, which cost less than 5.

    Returns:
        A ``Muon`` and an ``AdamW``.

    Built in chapter 17, "Decide how far to step".
    """
    matrices, tables, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if ".biases." in name:
            tables.append(p)
        elif ".blocks." in name and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    groups = [
        {"params": others, "lr": embedding_lr},
        {"params": tables, "lr": table_lr},
    ]
    adamw = AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=lr, rounds=rounds), adamw]

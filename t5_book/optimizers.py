"""Optimizers: Adafactor, Muon, and how a T5 shares its weights among them.

Built in chapter 18, "Optimizers: Adafactor and Muon"
(chapters/optimizers.md). Edit the chapter, not this file.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from t5_book.decoder import DecoderBlock
from t5_book.encoder import EncoderBlock
from t5_book.relative_position import RelativePositionBias

__all__ = ["Adafactor", "Muon", "adafactor", "muon_adamw"]


def _wide(x: Tensor) -> Tensor:
    """The numbers in float32, or in float64 if that's what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms(x: Tensor) -> Tensor:
    """Root mean square of all numbers."""
    return x.square().mean().sqrt()


def _running_mean(state: dict, name: str, new: Tensor, weight: float) -> Tensor:
    """Take ``new`` into a mean of the state with this weight; return the mean."""
    if name not in state:
        state[name] = torch.zeros_like(new)
    return state[name].lerp_(new, weight)


class _PerParameter(Optimizer):
    """Call ``update(P, G, state, group)`` for each parameter with a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """Take one step.

        Args:
            closure: computes loss and gradients anew; called first.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, _wide(p.grad), self.state[p], group)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        # PyTorch has rounded the means to the dtype of the weights; undo it.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)


class Adafactor(_PerParameter):
    """Steps in proportion to the weights; squares kept as row and column.

    Matrices with a side below 128, and all that are no matrices, keep every
    square. There is no momentum and no weight decay. The state is float32
    (float64 for such weights). Keep the weights in float32, too: in half
    precision a small step rounds to nothing.

    Args:
        params: parameters, or parameter groups of them.
        lr: relative size of a step; default 0.001, for fine-tuning.
        warmup: if given, the step after ``n`` others has the relative size
            ``lr / sqrt(max(n, warmup))``; default None, always ``lr``.

    Raises:
        ValueError: if ``warmup`` is less than 1.

    Source: Shazeer and Stern 2018; t5x, ``adafactor.py``.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, warmup: int | None = None):
        if warmup is not None and warmup < 1:
            raise ValueError(f"warmup is {warmup}; pass 1 or more, or None")
        super().__init__(params, {"lr": lr, "warmup": warmup})

    def update(self, P: Tensor, G: Tensor, state: dict, group: dict) -> None:
        """Take a step with one parameter ``P`` and its gradient ``G``."""
        n = state.get("step", 0)
        t = state["step"] = n + 1
        # All of the first square, ever less of the later ones.
        weight = t**-0.8
        # So that a gradient of zero is not divided by zero.
        square = G.square() + 1e-30

        # Below 128 there is little to save.
        if G.ndim == 2 and min(G.shape) >= 128:
            R = _running_mean(state, "rows", square.mean(dim=1, keepdim=True), weight)
            C = _running_mean(state, "columns", square.mean(dim=0), weight)
            A = G * (R / R.mean()).rsqrt() * C.rsqrt()  # [n m]
        else:
            A = G * _running_mean(state, "squares", square, weight).rsqrt()
        # When gradients suddenly grow, the means lag behind and A is too large.
        A = A / _rms(A).clamp(min=1)

        rho = group["lr"]
        if group["warmup"] is not None:
            rho = rho * max(n, group["warmup"]) ** -0.5
        # In proportion to the weights, but weights of zero must be able to leave.
        P.sub_(rho * _rms(_wide(P)).clamp(min=1e-3) * A)


def adafactor(model: nn.Module, warmup: int | None = 10_000) -> list[Optimizer]:
    """Make the paper's optimizer for a model, with its schedule built in.

    Args:
        model: its parameters that require a gradient are trained.
        warmup: the paper's ``k``, steps at a constant rate; default 10,000,
            for pre-training. After ``n`` steps the relative size of a step
            is ``1 / sqrt(max(n, warmup))``. None: always 0.001, the paper's
            choice for fine-tuning.

    Returns:
        A list of one ``Adafactor``.

    Source: paper, section 3.1.2.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-3 if warmup is None else 1.0
    return [Adafactor(trained, rate, warmup)]


# a, b and c: Jordan et al. 2024
_ORTHOGONALIZING = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Bring all singular values near 1 and keep the singular vectors.

    Args:
        matrix: ``[n m]``, or a stack of such matrices, ``[... n m]``.
        rounds: of the iteration; default 5. Singular values above 1 % of
            the matrix's norm then end between 0.65 and 1.25.

    Returns:
        ``[... n m]``.

    Source: Jordan et al. 2024.
    """
    a, b, c = _ORTHOGONALIZING
    # Turned on its side, a tall matrix has a small X X^T.
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        XXt = X @ X.mT  # [... n n]
        X = a * X + (b * XXt + c * XXt @ XXt) @ X
    return X.mT if tall else X


class Muon(_PerParameter):
    """Momentum whose steps are orthogonalized, for matrices.

    The state is float32 (float64 for such weights), and so is the
    computation. ``torch.optim.Muon`` takes the same steps in bfloat16, which
    is slow on processors without it.

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate; default 0.005.
        momentum: share of the old mean in the new; default 0.95.
        rounds: as in ``orthogonalize``; default 5.

    Raises:
        ValueError: if a parameter is no matrix.

    Source: Jordan et al. 2024.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 5e-3,
        momentum: float = 0.95,
        rounds: int = 5,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "rounds": rounds})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"a parameter has shape {tuple(p.shape)}, but Muon is for "
                        "matrices; give it to another optimizer"
                    )

    def update(self, P: Tensor, G: Tensor, state: dict, group: dict) -> None:
        """Take a step with one matrix ``P [n m]`` and its gradient ``G``."""
        momentum = group["momentum"]
        mean = _running_mean(state, "mean", G, 1 - momentum)
        # Nesterov: where the mean will be after another gradient like this one.
        ahead = G.lerp(mean, momentum)
        # A tall step spreads the same length over more output features.
        scale = max(1, P.shape[0] / P.shape[1]) ** 0.5
        step = orthogonalize(ahead, group["rounds"])
        P.add_(step, alpha=-group["lr"] * scale)


def muon_adamw(
    model: nn.Module,
    lr: float = 5e-3,
    embedding_lr: float = 0.05,
    table_lr: float = 0.3,
    rounds: int = 3,
) -> list[Optimizer]:
    """Make optimizers that train a small T5 in few steps.

    Args:
        model: a ``T5``; parameters that require a gradient are trained.
        lr: Muon's rate, for the matrices of the blocks; default 0.005.
        embedding_lr: AdamW's rate for embeddings, head and norms; default
            0.05, for embeddings of size 1 as T5 has them.
        table_lr: AdamW's rate for the tables of relative position biases,
            which are on the scale of attention scores; default 0.3.
        rounds: of Muon's iteration; default 3, which cost less than 5.

    Returns:
        A ``Muon`` and an ``AdamW``. One that has nothing to train is left out.

    Raises:
        ValueError: if no parameter requires a gradient.
    """
    in_blocks, in_tables = set(), set()
    for module in model.modules():
        if isinstance(module, RelativePositionBias):
            in_tables.update(module.parameters())
        elif isinstance(module, EncoderBlock | DecoderBlock):
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    in_blocks.add(part.weight)

    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")
    matrices = [p for p in trained if p in in_blocks]
    tables = [p for p in trained if p in in_tables]
    others = [p for p in trained if p not in in_blocks | in_tables]

    optimizers = []
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, rounds=rounds))
    if others or tables:
        groups = [
            {"params": others, "lr": embedding_lr},
            {"params": tables, "lr": table_lr},
        ]
        # Adam's usual 0.999 would average over 1,000 steps, more than a short
        # training run has; 0.98 averages over 50.
        optimizers.append(AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers

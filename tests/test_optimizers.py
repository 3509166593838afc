"""Adafactor, Muon, and how a T5's weights are shared among optimizers."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from t5_book.optimizers import Adafactor, Muon, adafactor, muon_adamw, orthogonalize
from t5_book.relative_position import RelativePositionBias
from tests.conftest import refuses, small_t5

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

class Reference:
    """Adafactor as t5x computes it, for one array, in float64.

    ``t5x/adafactor.py``, ``apply_param_gradient``: its heuristic factors a
    matrix with two sides of at least 128.
    """

    def __init__(self, start):
        self.p = start.double().numpy().copy()
        self.step, self.row, self.column, self.v = 0, 0.0, 0.0, 0.0

    def update(self, gradient, rate):
        gradient = gradient.double().numpy()
        decay = 1 - (self.step + 1.0) ** -0.8
        squared = gradient**2 + 1e-30
        self.v = decay * self.v + (1 - decay) * squared
        y = gradient * self.v**-0.5
        if self.p.ndim == 2 and min(self.p.shape) >= 128:
            mean = squared.mean(axis=1, keepdims=True)
            self.row = decay * self.row + (1 - decay) * mean
            mean = squared.mean(axis=0, keepdims=True)
            self.column = decay * self.column + (1 - decay) * mean
            y = gradient * (self.row / self.row.mean()) ** -0.5 * self.column**-0.5
        y /= max(1.0, np.sqrt(np.mean(y**2)) / 1.0)
        scale = max(1e-3, np.sqrt(np.mean(self.p**2)))
        self.p = self.p - rate * scale * y
        self.step += 1


# Sides of 128 and more, one below, both below; weights of size 1, as
# embeddings, and so small that the step has its least size; vectors.
ARRAYS = {
    "tall": ((300, 128), 0.05),
    "wide": ((129, 200), 1.0),
    "square": ((128, 128), 1e-5),
    "short side": ((127, 400), 0.05),
    "table": ((32, 8), 0.2),
    "embedding": ((500, 130), 1.0),
    "gains": ((64,), 1.0),
    "long vector": ((300,), 1e-4),
}


def random_gradients(shape, steps=20):
    """Gradients whose size, rows and columns differ by much."""
    for step in range(steps):
        gradient = torch.randn(shape, dtype=torch.float64)
        for axis, side in enumerate(shape):
            sizes = torch.logspace(-2, 1, side, dtype=torch.float64)[torch.randperm(side)]
            gradient *= sizes if axis == len(shape) - 1 else sizes[:, None]
        gradient[0] = 0  # a token that does not occur
        yield gradient * 10.0 ** (step % 5 - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("warmup", [None, 4])
def test_adafactor_takes_the_steps_of_t5x(name, dtype, warmup):
    shape, size = ARRAYS[name]
    start = size * torch.randn(shape, dtype=dtype)
    reference, p = Reference(start), nn.Parameter(start.clone())
    optimizer = Adafactor([p]) if warmup is None else Adafactor([p], 0.7, warmup)
    for n, gradient in enumerate(random_gradients(shape)):
        p.grad = gradient.to(dtype)
        optimizer.step()
        reference.update(p.grad, 1e-3 if warmup is None else 0.7 * max(n, warmup) ** -0.5)
        error = np.abs(p.detach().double().numpy() - reference.p).max()
        moved = np.abs(reference.p - start.numpy()).max()
        digits = torch.finfo(dtype).eps
        rounding = digits * np.abs(reference.p).max() * (n + 1)
        assert moved > 100 * rounding
        assert error <= rounding + 100 * digits * moved, n + 1


@pytest.mark.parametrize("shape", [(6,), (130, 140)])
def test_adafactor_follows_half_precision_gradients_as_t5x_does(shape):
    """t5x: gradient and state in float32, the new weights rounded once."""
    p = nn.Parameter(torch.randn(shape).bfloat16())
    reference, optimizer = Reference(p.detach()), Adafactor([p], lr=0.02)
    for n in range(200):
        reference.p = p.detach().double().numpy().copy()
        p.grad = (torch.randn(shape) * (10 if n < 50 else 1)).bfloat16()
        optimizer.step()
        reference.update(p.grad, 0.02)
        new, ours = torch.from_numpy(reference.p), p.detach().double()
        rounded = new.bfloat16().double()
        # Where the exact result lies half way, either neighbour will do.
        assert not ((ours - rounded).abs() > 1e-2 * new.abs()).any()
        assert (ours != rounded).double().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 130), (200, 8), (9,), (6, 130, 140)])
def test_adafactor_without_gradient_stands_still(dtype, shape):
    """As the rows of an embedding do whose tokens are not in the batch."""
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad, optimizer = torch.ones_like(p), Adafactor([p], lr=0.1)
    p.grad[5] = p.grad[..., 7] = 0
    optimizer.step()
    assert torch.equal(p == 1, p.grad == 0) and (p <= 1).all()
    sizes = {k: v.numel() for k, v in optimizer.state[p].items() if k != "step"}
    factored = {"rows": 200, "columns": 130}
    assert sizes == (factored if shape == (200, 130) else {"squares": p.numel()})
    p.grad, before = torch.zeros_like(p), p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 2


def test_adafactor_has_the_papers_rates():
    layer = nn.Linear(2, 2)
    for [optimizer], lr, warmup in [
        (adafactor(layer), 1.0, 10_000),  # at first 0.01
        (adafactor(layer, warmup=4), 1.0, 4),
        (adafactor(layer, warmup=None), 1e-3, None),
    ]:
        [group] = optimizer.param_groups
        assert (group["lr"], group["warmup"]) == (lr, warmup)
    for warmup in (0, -3):
        refuses(lambda: adafactor(layer, warmup=warmup), f"warmup is {warmup}")


# --- Adafactor and Muon ---------------------------------------------------


@pytest.mark.parametrize("make", [partial(Adafactor, lr=0.3, warmup=2), Muon])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_goes_on_exactly_from_its_state(make, dtype):
    starts = [torch.randn(130, 140), torch.randn(5, 140), torch.randn(140, 3)]
    grads = [[torch.randn_like(p) for p in starts] for _ in range(6)]

    def train(params, optimizer, grads):
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad.to(dtype)
            optimizer.step()

    straight = [nn.Parameter(p.to(dtype)) for p in starts]
    optimizer = make(straight)
    train(straight, optimizer, grads[:3])
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    other = type(optimizer)(resumed)  # its options come from the state
    other.load_state_dict(optimizer.state_dict())
    train(straight, optimizer, grads[3:])
    train(resumed, other, grads[3:])
    for a, b in zip(straight, resumed):
        assert a.dtype == dtype and torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert (torch.as_tensor(other.state[b][name]) == value).all()
            if name != "step":  # the means are float32 at least
                wide = torch.promote_types(dtype, torch.float32)
                assert value.dtype == other.state[b][name].dtype == wide


@pytest.mark.parametrize("make", [Adafactor, Muon])
def test_a_closure_is_called_first_and_its_loss_returned(make):
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = make([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == 12 and losses == sorted(losses, reverse=True)
    assert p.requires_grad and optimizer.step() is None


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 6, 4)])
def test_orthogonalize_keeps_directions_and_evens_out_their_size(shape):
    matrix = torch.randn(shape)
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert ((values > 0.65) & (values < 1.25)).all()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ result @ vh.mT  # diagonal, if the directions are kept
    diagonal = torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(inner, diagonal, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_muon_steps_as_torch_does(shape):
    ours, theirs = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    reference = torch.optim.Muon([theirs], lr=5e-3, weight_decay=0.0)
    optimizers = Muon([ours]), reference
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - 1).abs().max()  # torch computes in bfloat16
    assert (ours - theirs).abs().max() < 0.05 * moved


def test_muon_refuses_what_is_no_matrix():
    refuses(lambda: Muon([nn.Parameter(torch.ones(3, 4, 5))]), "(3, 4, 5)", "matrices")


# --- Groups ---------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [{}, {"feed_forward": "gated-gelu"}, {"bias_per_layer": True, "tie_token_emb": True}],
)
def test_the_groups_of_a_t5_by_name(extra):
    model = small_t5(depth=2, **extra)
    muon, adamw = muon_adamw(model, lr=0.1, embedding_lr=0.2, table_lr=0.7)
    groups = [*muon.param_groups, *adamw.param_groups]
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.7]
    assert groups[0]["rounds"] == 3 and groups[1]["betas"] == (0.9, 0.98)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    every = list(names.values())
    tables = [name for name in every if ".biases." in name]
    matrices = [name for name in every if ".blocks." in name and "norm" not in name]
    others = [name for name in every if name not in tables + matrices]
    assert found == [matrices, others, tables]


@pytest.mark.parametrize(
    "trained, kinds",
    [
        ("enc_emb", ["AdamW"]),
        ("biases", ["AdamW"]),
        ("norm", ["AdamW"]),
        ("attention", ["Muon", "AdamW"]),  # AdamW for its norm
        ("attention.q", ["Muon"]),
    ],
)
def test_frozen_weights_and_optimizers_with_nothing_to_train_are_left_out(trained, kinds):
    model = small_t5()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    for optimizers, types in [(muon_adamw(model), kinds), (adafactor(model), ["Adafactor"])]:
        assert [type(optimizer).__name__ for optimizer in optimizers] == types
        groups = [group for o in optimizers for group in o.param_groups]
        assert {id(p) for group in groups for p in group["params"]} == wanted
    refuses(lambda: muon_adamw(model.requires_grad_(False)), "no parameter")


def test_types_and_not_names_decide():
    """Blocks elsewhere than in a stack; a linear layer's bias is no matrix."""
    block, table = small_t5().encoder.blocks[0], RelativePositionBias(2)
    block.feed_forward.wi = nn.Linear(16, 32)
    muon, adamw = muon_adamw(nn.ModuleDict({"layer": block, "where": table}))
    others, tables = [group["params"] for group in adamw.param_groups]
    assert len(muon.param_groups[0]["params"]) == 6
    assert tables == [table.table.weight]
    norms = block.attention_norm, block.feed_forward_norm
    expected = [block.feed_forward.wi.bias, *[norm.weight for norm in norms]]
    assert {id(p) for p in others} == {id(p) for p in expected}

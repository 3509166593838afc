"""Adafactor, Muon, parameter groups, and the schedules."""

from functools import partial

import numpy as np
import pytest
import torch

from t5_book import T5
from t5_book.optimizers import (
    Adafactor,
    Muon,
    adafactor,
    muon_adamw,
    orthogonalize,
)
from t5_book.relative_position import RelativePositionBias
from t5_book.schedules import inverse_sqrt_schedule
from tests.test_training import small_t5

# --- Adafactor ------------------------------------------------------------


class Reference:
    """Adafactor as t5x computes it, for one array, in float64.

    ``t5x/adafactor.py``, ``apply_param_gradient``: its heuristic factors an
    array with two sides of at least 128 over the two largest.
    """

    def __init__(self, start):
        self.p = start.double().numpy().copy()
        self.step, self.row, self.column, self.v = 0, 0.0, 0.0, 0.0

    def update(self, gradient, rate):
        gradient = gradient.double().numpy()
        decay = 1 - (self.step + 1.0) ** -0.8
        squared = gradient**2 + 1e-30
        sides = sorted(self.p.shape)
        if len(sides) > 1 and sides[-2] >= 128:
            small, large = np.argsort(self.p.shape)[-2:]
            mean = squared.mean(axis=large, keepdims=True)
            self.row = decay * self.row + (1 - decay) * mean
            mean = squared.mean(axis=small, keepdims=True)
            self.column = decay * self.column + (1 - decay) * mean
            row = (self.row / self.row.mean()) ** -0.5
            y = gradient * row * self.column**-0.5
        else:
            self.v = decay * self.v + (1 - decay) * squared
            y = gradient * self.v**-0.5
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
    "stack": ((3, 130, 140), 0.1),
}


def random_gradients(shape, steps=20):
    """Gradients whose size, rows and columns differ by much."""
    for step in range(steps):
        gradient = torch.randn(shape, dtype=torch.float64)
        for axis, side in enumerate(shape):
            sizes = torch.logspace(-2, 1, side, dtype=torch.float64)
            sizes = sizes[torch.randperm(side)]
            gradient *= sizes.unflatten(0, [-1] + [1] * (len(shape) - axis - 1))
        gradient[0] = 0  # a token that does not occur
        yield gradient * 10.0 ** (step % 5 - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in ARRAYS if n != "stack"])
@pytest.mark.parametrize("warmup", [None, 4])
def test_adafactor_takes_the_steps_of_t5x(name, dtype, warmup):
    torch.manual_seed(0)
    shape, size = ARRAYS[name]
    start = size * torch.randn(shape, dtype=dtype)
    reference, p = Reference(start), torch.nn.Parameter(start.clone())
    lr = 1e-3 if warmup is None else 0.7
    optimizer = Adafactor([p], lr=lr, warmup=warmup)
    for n, gradient in enumerate(random_gradients(shape)):
        p.grad = gradient.to(dtype)
        optimizer.step()
        rate = lr if warmup is None else lr * max(n, warmup) ** -0.5
        reference.update(p.grad, rate)
        error = np.abs(p.detach().double().numpy() - reference.p).max()
        moved = np.abs(reference.p - start.numpy()).max()
        digits = torch.finfo(dtype).eps
        rounding = digits * np.abs(reference.p).max() * (n + 1)
        assert moved > 100 * rounding
        assert error <= rounding + 100 * digits * moved, n + 1


@pytest.mark.parametrize(
    "name, kept",
    [
        ("tall", {"rows": 300, "columns": 128}),
        ("short side", {"squares": 127 * 400}),
        ("gains", {"squares": 64}),
        ("stack", {"squares": 3 * 130 * 140}),
    ],
)
def test_adafactor_factors_matrices_with_two_long_sides(name, kept):
    p = torch.nn.Parameter(torch.randn(ARRAYS[name][0]))
    p.grad, optimizer = torch.randn_like(p), Adafactor([p])
    optimizer.step()
    state = dict(optimizer.state[p])
    assert state.pop("step") == 1
    assert {name: state[name].numel() for name in state} == kept


@pytest.mark.parametrize("shape", [(128, 128), (300, 150), (40,)])
def test_adafactor_agrees_with_torch_where_it_should(shape):
    """Where torch's factors what t5x factors, and its other epsilons (it
    clips squares at 1e-14 and adds nothing) are too small to matter."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = (
        Adafactor([ours], lr=0.05),
        torch.optim.Adafactor([theirs], lr=0.05),
    )
    for _ in range(20):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).abs().max()
    assert (ours - theirs).abs().max() < 1e-5 * moved


def test_adafactor_does_not_divide_by_zero():
    """Rows and columns, then everything, without a gradient."""
    p = torch.nn.Parameter(torch.ones(200, 130))
    optimizer = Adafactor([p], lr=0.1)
    p.grad = torch.ones(200, 130)
    p.grad[7] = p.grad[:, 9] = 0
    optimizer.step()
    assert (p[7] == 1).all() and (p[:, 9] == 1).all() and (p < 1).any()
    assert p.isfinite().all()
    p.grad, before = torch.zeros_like(p), p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("warmup", [4, None])
def test_adafactor_steps_by_the_papers_schedules(warmup):
    layer = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.ones_(layer.weight)
    [optimizer] = adafactor(layer, warmup=warmup)
    for n in range(12):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.ones(3, 4)
        optimizer.step()
        step = ((before - layer.weight) / before).detach()
        rate = 1e-3 if warmup is None else max(n, 4) ** -0.5
        torch.testing.assert_close(
            step, torch.full((3, 4), rate), atol=1e-6, rtol=1e-4
        )


def test_the_rate_before_the_ten_thousandth_step_is_one_percent():
    [optimizer] = adafactor(torch.nn.Linear(2, 2))
    [group] = optimizer.param_groups
    assert group["lr"] * group["warmup"] ** -0.5 == pytest.approx(0.01)


@pytest.mark.parametrize("warmup", [1, 5, 10_000])
def test_the_papers_schedule_is_that_of_adafactor(warmup):
    factor = inverse_sqrt_schedule(warmup)
    for n in (0, 1, 4, 5, 6, 9_999, 10_000, 40_000, 10**6):
        rate = warmup**-0.5 * factor(n)
        assert rate == pytest.approx(max(n, warmup) ** -0.5, rel=1e-12)
    assert factor(0) == factor(warmup) == 1
    assert inverse_sqrt_schedule()(40_000) == 0.5
    with pytest.raises(ValueError, match="warmup is 0"):
        inverse_sqrt_schedule(0)


@pytest.mark.parametrize("make", [partial(Adafactor, lr=0.3, warmup=2), Muon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_run_goes_on_exactly_from_its_saved_state(tmp_path, make, dtype):
    torch.manual_seed(0)
    starts = [torch.randn(130, 140), torch.randn(5, 140), torch.randn(140, 3)]
    grads = [[torch.randn_like(p) for p in starts] for _ in range(6)]

    def train(params, optimizer, grads):
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad.to(dtype)
            optimizer.step()

    straight = [torch.nn.Parameter(p.to(dtype)) for p in starts]
    optimizer = make(straight)
    train(straight, optimizer, grads[:3])
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    train(straight, optimizer, grads[3:])
    other = type(optimizer)(resumed)  # its options come from the file
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(resumed, other, grads[3:])
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert (torch.as_tensor(other.state[b][name]) == value).all()


def test_what_is_loaded_is_a_copy():
    one, two = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    first, second = Muon([one]), Muon([two])
    one.grad = two.grad = torch.eye(4)
    first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    assert not torch.equal(first.state[one]["mean"], second.state[two]["mean"])


@pytest.mark.parametrize(
    "weights, means",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("make", [Adafactor, Muon])
def test_means_are_float32_at_least(make, weights, means):
    p = torch.nn.Parameter(torch.ones(130, 140, dtype=weights))
    p.grad, optimizer = torch.ones_like(p), make([p])
    optimizer.step()
    assert p.dtype == weights
    kept = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    assert kept and all(mean.dtype == means for mean in kept)


@pytest.mark.parametrize("shape", [(6,), (130, 140)])
def test_adafactor_follows_half_precision_gradients_as_t5x_does(shape):
    """t5x: gradient and state in float32, the new weights rounded once."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape).bfloat16())
    reference, optimizer = Reference(p.detach()), Adafactor([p], lr=0.02)
    for n in range(200):
        reference.p = p.detach().double().numpy().copy()
        p.grad = (torch.randn(shape) * (10 if n < 50 else 1)).bfloat16()
        optimizer.step()
        reference.update(p.grad, 0.02)
        new = torch.from_numpy(reference.p)
        rounded = new.bfloat16().double()
        # Where the exact result lies half way, either neighbour will do.
        off = (p.detach().double() - rounded).abs() > 1e-2 * new.abs()
        assert not off.any()
        assert (p.detach().double() != rounded).double().mean() < 0.01


@pytest.mark.parametrize("warmup", [0, -3])
def test_a_warmup_of_no_steps_is_an_error(warmup):
    with pytest.raises(ValueError, match=f"warmup is {warmup}; pass 1"):
        adafactor(torch.nn.Linear(2, 2), warmup=warmup)


@pytest.mark.parametrize("make", [Adafactor, Muon])
def test_a_closure_is_called_first_and_its_loss_returned(make):
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = make([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == 12 and losses == sorted(losses, reverse=True)
    assert p.requires_grad and optimizer.step() is None


# --- Groups, Muon, the schedules ------------------------------------------


def test_every_weight_is_trained_once_and_tables_apart():
    model = small_t5()
    muon, adamw = muon_adamw(model, lr=0.1, embedding_lr=0.2, table_lr=0.7)
    groups = [*muon.param_groups, *adamw.param_groups]
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.7]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    tables = {
        id(module.table.weight)
        for module in model.modules()
        if isinstance(module, RelativePositionBias)
    }
    assert {id(p) for p in groups[2]["params"]} == tables
    assert all(p.ndim == 2 for p in groups[0]["params"])
    assert id(model.enc_emb.weight) in map(id, groups[1]["params"])


def test_frozen_weights_stay_out_of_the_optimizers():
    model = small_t5()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("biases" not in name)
    muon, adamw = muon_adamw(model)
    assert adamw.param_groups[1]["params"] == []
    trained = adafactor(model)[0].param_groups[0]["params"]
    assert all(parameter.requires_grad for parameter in trained)


@pytest.mark.parametrize("trained, kinds", [
    ("enc_emb", ["AdamW"]),
    ("biases", ["AdamW"]),
    ("norm", ["AdamW"]),
    ("attention", ["Muon", "AdamW"]),  # AdamW for its norm
    ("attention.q", ["Muon"]),
])
def test_an_optimizer_without_parameters_is_left_out(trained, kinds):
    model = small_t5()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    optimizers = muon_adamw(model)
    assert [type(optimizer).__name__ for optimizer in optimizers] == kinds
    groups = [group for o in optimizers for group in o.param_groups]
    found = {id(p) for group in groups for p in group["params"]}
    assert found == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_model_that_is_frozen_whole_is_an_error():
    with pytest.raises(ValueError, match="no parameter"):
        muon_adamw(small_t5().requires_grad_(False))


@pytest.mark.parametrize("extra", [
    {},
    {"feed_forward": "gated-gelu", "tie_head": False},
    {"bias_per_layer": True, "tie_token_emb": True},
])
def test_the_groups_of_a_t5_by_name(extra):
    torch.manual_seed(0)
    sides = {
        f"{side}_{key}": value
        for side in ("enc", "dec")
        for key, value in dict(
            num_tokens=16, depth=2, heads=2, dim_head=8, mlp_mult=2
        ).items()
    }
    model = T5(dim=16, **sides | extra)
    muon, adamw = muon_adamw(model)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, others, tables = [
        [names[id(p)] for p in group["params"]]
        for group in (*muon.param_groups, *adamw.param_groups)
    ]
    every = list(names.values())
    assert tables == [name for name in every if ".biases." in name]
    assert matrices == [
        name for name in every if ".blocks." in name and "norm" not in name
    ]
    assert others == [n for n in every if n not in tables + matrices]


def test_types_and_not_names_decide():
    """Blocks elsewhere than in a stack; a linear layer's bias is no matrix."""
    block, table = small_t5().encoder.blocks[0], RelativePositionBias(2)
    block.feed_forward.wi = torch.nn.Linear(16, 32)
    model = torch.nn.ModuleDict({"layer": block, "where": table})
    muon, adamw = muon_adamw(model)
    others, tables = [group["params"] for group in adamw.param_groups]
    assert len(muon.param_groups[0]["params"]) == 6
    assert tables == [table.table.weight]
    assert {id(p) for p in others} == {
        id(block.feed_forward.wi.bias),
        id(block.attention_norm.weight),
        id(block.feed_forward_norm.weight),
    }


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*matrices"):
        Muon([torch.nn.Parameter(torch.ones(3, 4, 5))])


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 6, 4)])
def test_orthogonalize_keeps_directions_and_evens_out_their_size(shape):
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    ours, theirs = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = (
        Muon([ours], lr=0.01),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0),
    )
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - 1).abs().max()  # torch computes in bfloat16
    assert (ours - theirs).abs().max() < 0.05 * moved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200, 200), (200, 8), (9,)])
def test_adafactor_without_gradient_stands_still(dtype, shape):
    """As the rows of an embedding do whose tokens are not in the batch."""
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    p.grad[5] = 0
    Adafactor([p], lr=0.1).step()
    assert p.isfinite().all() and (p[5] == 1).all() and (p[4] < 1).all()

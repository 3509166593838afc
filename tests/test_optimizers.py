"""Chapter 17: Adafactor, Muon, parameter groups, and the schedule."""

import pytest
import torch
from test_training import small_t5

from t5_book.optimizers import (
    Muon,
    adafactor,
    linear_schedule,
    muon_adamw,
    orthogonalize,
)
from t5_book.relative_position import RelativePositionBias


def test_adafactor_steps_by_the_papers_schedule():
    layer = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.ones_(layer.weight)
    [optimizer] = adafactor(layer, warmup=4)
    for t in range(1, 12):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.ones(3, 4)
        optimizer.step()
        step = (before - layer.weight) / before
        expected = torch.full((3, 4), max(t, 4) ** -0.5)
        torch.testing.assert_close(step.detach(), expected, atol=1e-4, rtol=0)


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
    assert muon_adamw(model)[1].param_groups[1]["params"] == []
    trained = adafactor(model)[0].param_groups[0]["params"]
    assert all(parameter.requires_grad for parameter in trained)


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


def test_the_schedule_climbs_and_falls_to_zero():
    factor = linear_schedule(steps=10, warmup=4)
    values = [factor(step) for step in range(12)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[3:11] == sorted(values[3:11], reverse=True)
    assert values[10:] == [0, 0]


@pytest.mark.parametrize("warmup", [0, 10, 11])
def test_a_warmup_outside_the_training_is_an_error(warmup):
    with pytest.raises(ValueError, match=f"warmup is {warmup} .* 10 steps"):
        linear_schedule(steps=10, warmup=warmup)

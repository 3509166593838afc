"""Feed-forward layers against those of ``transformers``."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from t5_book.feed_forward import FEED_FORWARDS
from tests.conftest import SIZES, difference

DIM, HIDDEN = SIZES["dim"], 2 * SIZES["dim"]
REFERENCES = {"relu": T5DenseActDense, "gated-gelu": T5DenseGatedActDense}
BOTH = pytest.mark.parametrize("name", sorted(REFERENCES))


def make_pair(name, size=3.0):
    """Ours and the reference with the same random weights."""
    torch.manual_seed(0)
    config = ReferenceConfig(
        d_model=DIM, d_ff=HIDDEN, feed_forward_proj=name, dropout_rate=0.0
    )
    ours, reference = FEED_FORWARDS[name](DIM, HIDDEN), REFERENCES[name](config)
    for weight in ours.parameters():
        weight.data *= size  # 3, so that the two forms of the GELU differ
    reference.load_state_dict(ours.state_dict())
    return ours.eval(), reference.eval()


def hidden_units(name, layer, x):
    """The units in front of the dropout, by the formula."""
    if name == "relu":
        return F.relu(layer.wi(x))
    return F.gelu(layer.wi_0(x), approximate="tanh") * layer.wi_1(x)


# --- Agreement ------------------------------------------------------------


@BOTH
def test_agrees_with_transformers(name):
    ours, reference = make_pair(name)
    x = torch.randn(3, 40, DIM, dtype=torch.float64)
    assert difference(ours.double()(x), reference.double()(x)) <= 1e-13


@BOTH
def test_agrees_in_float32(name):
    ours, reference = make_pair(name, size=1.0)
    x = torch.randn(3, 40, DIM)
    assert difference(ours(x), reference(x)) <= 1e-5


def test_every_layer_is_compared():
    assert set(FEED_FORWARDS) == set(REFERENCES)


# --- Properties -----------------------------------------------------------


@BOTH
def test_each_token_is_on_its_own(name):
    ours, _ = make_pair(name)
    x = torch.randn(3, 9, DIM)
    changed = x.clone()
    changed[1, 4] = 9.0
    moved = (ours(x) - ours(changed)).abs().amax(dim=-1) > 1e-4
    assert moved.nonzero().tolist() == [[1, 4]]


@BOTH
def test_dropout_falls_on_the_hidden_units(name):
    torch.manual_seed(0)
    layer = FEED_FORWARDS[name](64, 64, dropout=0.5)
    nn.init.eye_(layer.wo.weight)
    x = torch.randn(50, 64)
    out, units = layer(x), hidden_units(name, layer, x)
    kept = out != 0
    assert torch.allclose(out, 2 * units * kept, atol=1e-6)
    assert 0.45 < kept.sum() / (units != 0).sum() < 0.55
    assert torch.allclose(layer.eval()(x), units)
    # Not on the features that come out: all of them are a little wrong.
    nn.init.normal_(layer.wo.weight)
    assert (layer.train()(x) != 0).all()


@BOTH
def test_nothing_is_dropped_by_default(name):
    layer = FEED_FORWARDS[name](8, 16)
    x = torch.randn(3, 8)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@BOTH
def test_weights_are_drawn_as_t5_draws_them(name):
    torch.manual_seed(0)
    layer = FEED_FORWARDS[name](512, 3 * 512)
    weights = dict(layer.named_parameters())
    inner = {"relu": ["wi"], "gated-gelu": ["wi_0", "wi_1"]}[name]
    expected = {f"{matrix}.weight": 512**-0.5 for matrix in inner}
    expected["wo.weight"] = (3 * 512) ** -0.5
    assert set(weights) == set(expected)  # and no bias
    for matrix, std in expected.items():
        assert abs(weights[matrix].std() / std - 1) < 0.01, matrix

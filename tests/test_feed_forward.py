"""Feed-forward layers (chapter 8) against those of ``transformers``."""

import pytest
import torch
from hugging_face import LENGTHS, SIZES, difference
from torch import nn
from torch.nn import functional as F
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import (
    T5DenseActDense,
    T5DenseGatedActDense,
)

from t5_book.feed_forward import (
    FEED_FORWARDS,
    FeedForward,
    GatedFeedForward,
    make_feed_forward,
)

DIM, HIDDEN = SIZES["dim"], 2 * SIZES["dim"]
SHAPES = sorted({(b, n) for n in LENGTHS for b in (3, n, SIZES["heads"])})
REFERENCES = {"relu": T5DenseActDense, "gated-gelu": T5DenseGatedActDense}
KINDS = pytest.mark.parametrize("kind", sorted(REFERENCES))


def make_pair(kind, size=3.0):
    """Ours and the reference with the same random weights."""
    torch.manual_seed(0)
    config = ReferenceConfig(
        d_model=DIM, d_ff=HIDDEN, feed_forward_proj=kind, dropout_rate=0.0
    )
    ours, reference = make_feed_forward(kind, DIM, 2), REFERENCES[kind](config)
    for weight in ours.parameters():
        weight.data *= size  # so that the two forms of the GELU differ
    reference.load_state_dict(ours.state_dict())
    return ours.eval(), reference.eval()


# --- Agreement ------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("batch, length", SHAPES)
def test_agrees_with_transformers(kind, batch, length):
    ours, reference = make_pair(kind)
    x = torch.randn(batch, length, DIM, dtype=torch.float64)
    assert difference(ours.double()(x), reference.double()(x)) <= 1e-13


@KINDS
def test_agrees_in_float32(kind):
    ours, reference = make_pair(kind, size=1.0)
    x = torch.randn(3, 40, DIM)
    assert difference(ours(x), reference(x)) <= 1e-5


def test_every_kind_is_compared():
    assert set(FEED_FORWARDS) == set(REFERENCES)


# --- Properties -----------------------------------------------------------


@KINDS
def test_each_token_is_on_its_own(kind):
    ours, _ = make_pair(kind)
    x = torch.randn(3, 9, DIM)
    changed = x.clone()
    changed[1, 4] = 9.0
    moved = (ours(x) - ours(changed)).abs().amax(dim=-1) > 1e-4
    assert moved.nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize(
    "make, hidden",
    [
        (FeedForward, lambda m, x: F.relu(m.wi(x))),
        (
            GatedFeedForward,
            lambda m, x: F.gelu(m.wi_0(x), approximate="tanh") * m.wi_1(x),
        ),
    ],
)
def test_dropout_falls_on_the_hidden_units(make, hidden):
    torch.manual_seed(0)
    layer = make(64, 64, dropout=0.5)
    nn.init.eye_(layer.wo.weight)
    x = torch.randn(50, 64)
    out, units = layer(x), hidden(layer, x)
    kept = out != 0
    assert torch.allclose(out, 2 * units * kept, atol=1e-6)
    assert 0.45 < kept.sum() / (units != 0).sum() < 0.55
    assert torch.allclose(layer.eval()(x), units)
    # Not on the features that come out: all of them are a little wrong.
    nn.init.normal_(layer.wo.weight)
    assert (layer.train()(x) != 0).all()


def test_weights_are_drawn_as_t5_draws_them():
    torch.manual_seed(0)
    names = {"relu": ["wi"], "gated-gelu": ["wi_0", "wi_1"]}
    for kind, inner in names.items():
        layer = make_feed_forward(kind, 512, 3)
        weights = dict(layer.named_parameters())
        expected = {f"{name}.weight": 512**-0.5 for name in inner}
        expected["wo.weight"] = (3 * 512) ** -0.5
        assert set(weights) == set(expected)  # and no bias
        for name, std in expected.items():
            assert abs(weights[name].std() / std - 1) < 0.01, name


# --- The factory ----------------------------------------------------------


@pytest.mark.parametrize(
    "dim, mlp_mult, hidden",
    [
        (768, 4, 3072),
        (768, 8 / 3, 2048),
        (768, 2.6667, 2048),
        (1024, 2.75, 2816),
        (1472, 3584 / 1472, 3584),
        (1536, 2.5833, 3968),  # cut off, it would be 3967
        (704, 960 / 704, 960),  # cut off, it would be 959
        (8, 0.1, 1),
    ],
)
@KINDS
def test_hidden_size_is_rounded(kind, dim, mlp_mult, hidden):
    layer = make_feed_forward(kind, dim, mlp_mult)
    assert layer.wo.weight.shape == (dim, hidden)


@KINDS
def test_dropout_reaches_the_layer(kind):
    assert make_feed_forward(kind, 8, 4, 0.25).dropout.p == 0.25
    assert make_feed_forward(kind, 8, 4).dropout.p == 0.0


@pytest.mark.parametrize("kind", ["swish", "gated-relu", "", None])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError) as error:
        make_feed_forward(kind, 8, 4)
    assert repr(kind) in str(error.value)
    assert "'relu' or 'gated-gelu'" in str(error.value)


@pytest.mark.parametrize("mlp_mult", [0, -4, 0.01])
def test_a_layer_without_hidden_units_is_refused(mlp_mult):
    with pytest.raises(ValueError, match=f"mlp_mult={mlp_mult} times dim=8"):
        make_feed_forward("relu", 8, mlp_mult)

"""Feed-forward layers against those of ``transformers``."""

import pytest
import torch
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from t5_book.feed_forward import FEED_FORWARDS
from tests.conftest import difference

REFERENCES = {"relu": T5DenseActDense, "gated-gelu": T5DenseGatedActDense}


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_agrees_with_transformers(name):
    """Ours as it is in training: by default it drops nothing."""
    config = ReferenceConfig(d_model=48, d_ff=96, feed_forward_proj=name)
    ours, reference = FEED_FORWARDS[name](48, 96), REFERENCES[name](config).eval()
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(3, 40, 48)
    assert difference(ours(x), reference(x)) <= 1e-5
    for weight in ours.parameters():
        weight.data *= 3  # so that the two forms of the GELU differ
    reference.load_state_dict(ours.state_dict())
    x = x.double()
    assert difference(ours.double()(x), reference.double()(x)) <= 1e-13

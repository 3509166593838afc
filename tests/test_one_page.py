"""The model on one page gives what the package gives."""

import ast
from pathlib import Path

import pytest
import torch

from t5_book import one_page_t5, rms_norm
from t5_book.generation import generate
from t5_book.presets import PRESETS
from t5_book.t5 import T5
from tests.conftest import make_ending_writers, padded, small_t5, sources, with_ids

# Tied with ReLU; untied and gated, of uneven depths; a bias table per layer.
FAMILIES = ["t5", "byt5", "umt5"]


def page_of(model: T5) -> one_page_t5.T5:
    """The page with the sizes of ``model``, and fresh weights."""
    config, defaults = model.config, vars(one_page_t5.Config())
    sizes = {name: getattr(config, name, old) for name, old in defaults.items()}
    sizes |= dict(vocab_size=config.enc_num_tokens, heads=config.enc_heads)
    sizes |= dict(dim_head=config.enc_dim_head, mlp_dim=config.encoder.mlp_dim)
    sizes["gated"] = config.feed_forward == "gated-gelu"
    return one_page_t5.T5(one_page_t5.Config(**sizes))


def page_name(name: str) -> str:
    """The page's name for a weight of ours."""
    if name.startswith("encoder"):
        name = name.replace("attention_norm", "self_norm")
        name = name.replace(".attention.", ".self_attention.")
    return name.replace("enc_emb", "embedding").replace(".wi.", ".wi_0.")


@pytest.fixture(params=FAMILIES)
def both(request):
    """The page and the package with the same random weights, in float64."""
    model = make_ending_writers(request.param)[0]
    model = with_ids(model, pad_id=3, dropout=0.2)
    page, weights = page_of(model), model.state_dict()
    del weights["dec_emb.weight"]
    page.load_state_dict({page_name(name): w for name, w in weights.items()})
    return page.double().eval(), model


def test_logits_loss_and_gradients(both):
    page, model = both
    for s, t in [(1, 9), (9, 1), (10, 40), (140, 10), (40, 140)]:
        src, labels, mask, _ = padded(3, s, t, high=60)
        labels[0, t // 2 + 1 :] = labels[1, ::3] = -100
        tgt = model.shift_right(labels)
        assert (page(src, tgt, mask) - model(src, tgt, mask)).abs().max() <= 1e-12
        losses = [each.loss(src, labels, mask) for each in both]
        assert abs(losses[0] - losses[1]) <= 1e-12
        for each, loss in zip(both, losses):
            each.zero_grad()
            loss.backward()
        slopes = {name: weight.grad for name, weight in page.named_parameters()}
        for name, weight in model.named_parameters():
            assert (slopes[page_name(name)] - weight.grad).abs().max() <= 1e-12, name


def test_greedy_texts(both):
    page, model = both
    for inputs in (sources(), sources()[:1]):  # with a mask and without
        written = generate(model, *inputs, max_new_tokens=30)
        assert torch.equal(page.generate(*inputs, max_new_tokens=30), written)
        ends = (written == model.config.eos_id).int().argmax(dim=1)
        assert len(ends.unique()) > 1


def test_dropout_falls_in_the_same_places(both):
    """From one seed both drop the same numbers, in the same order."""
    (page, _), (src, tgt, _, _) = both, padded(3, 9, 7, high=60)
    logits = []
    for each in both:
        torch.manual_seed(5)
        logits.append(each.train()(src, tgt))
    assert (logits[0] - logits[1]).abs().max() <= 1e-12
    assert (logits[0] - page.eval()(src, tgt)).abs().max() > 1e-3


def test_fresh_weights_are_as_large():
    for kind in ({}, dict(feed_forward="gated-gelu", tie_head=False)):
        model = small_t5(dim=192, num_tokens=500, heads=8, dim_head=32, **kind)
        found = dict(page_of(model).named_parameters())
        for name, weight in model.named_parameters():
            fresh = found[page_name(name)]
            if ".biases." in name:  # few numbers, uniform: their bound says more
                bound = (6 / sum(weight.shape)) ** 0.5
                assert 0.9 * bound < fresh.abs().max() <= bound
            else:
                ratio = fresh.square().mean() / weight.square().mean()
                assert 0.9 < ratio < 1.1, name


def test_its_norm_is_computed_in_float32_too():
    """The squares of these numbers are too large for float16."""
    x = 1000 * torch.randn(2, 3, 512, dtype=torch.float16)
    page = one_page_t5.RMSNorm(one_page_t5.Config()).half()
    assert torch.equal(page(x), rms_norm.RMSNorm(512).half()(x))


def test_its_defaults_are_t5_small():
    with torch.device("meta"):
        small = page_of(T5(**PRESETS["t5-small"]))
    assert one_page_t5.Config() == small.config


def test_it_imports_nothing_from_the_package():
    tree = ast.parse(Path(one_page_t5.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {node.module.split(".")[0] for node in imports} <= {"torch", "dataclasses"}

"""The model on one page gives what the package gives."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from t5_book import one_page_t5
from t5_book.generation import generate
from t5_book.t5 import T5
from tests.conftest import padding_masks, random_ids

SHAPE = dict(vocab_size=60, dim=24, mlp_dim=64, heads=4, dim_head=8)
KINDS = {
    "tied ReLU": {},
    "untied gated": dict(gated=True, tie_head=False),
    "bias per layer": dict(gated=True, tie_head=False, bias_per_layer=True),
}


@pytest.fixture(params=KINDS)
def both(request):
    """The page and the package with the same random weights, in float64."""
    kind = KINDS[request.param]
    page = one_page_t5.T5(one_page_t5.Config(**SHAPE, enc_depth=3, dec_depth=2, **kind))
    side = dict(num_tokens=60, heads=4, dim_head=8, mlp_mult=64 / 24)
    sides = {f"{s}_{name}": value for s in ("enc", "dec") for name, value in side.items()}
    options = {name: value for name, value in kind.items() if name != "gated"}
    if kind:
        options["feed_forward"] = "gated-gelu"
    model = T5(dim=24, enc_depth=3, dec_depth=2, **sides, **options)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms of one would hide a swap
            nn.init.normal_(weight)
        if ".biases." in name:
            nn.init.normal_(weight)
    page.load_state_dict(
        {
            page_name(name): weight
            for name, weight in model.state_dict().items()
            if not name.startswith("dec_emb")
        }
    )
    return page.double().eval(), model.double().eval()


def page_name(name: str) -> str:
    """The page's name for a weight of ours."""
    if name.startswith("encoder"):
        name = name.replace("attention_norm", "self_norm")
        name = name.replace(".attention.", ".self_attention.")
    return name.replace("enc_emb", "embedding").replace(".wi.", ".wi_0.")


@pytest.mark.parametrize("s, t", [(1, 9), (9, 1), (10, 40), (140, 10), (40, 140)])
def test_logits_loss_and_gradients(both, s, t):
    page, model = both
    src, labels, mask = random_ids(3, s, high=60), random_ids(3, t, 1, 60), padding_masks(3, s)
    labels[1, t // 2 + 1 :] = -100
    tgt = model.shift_right(labels)
    assert (page(src, tgt, mask) - model(src, tgt, mask)).abs().max() <= 1e-12
    losses = page.loss(src, labels, mask), model.loss(src, labels, mask)
    assert abs(losses[0] - losses[1]) <= 1e-12
    for loss in losses:
        loss.backward()
    slopes = {name: weight.grad for name, weight in page.named_parameters()}
    for name, weight in model.named_parameters():
        if name == "head.weight" or not name.startswith("dec_emb"):
            assert (slopes[page_name(name)] - weight.grad).abs().max() <= 1e-12


def test_greedy_texts(both):
    page, model = both
    src, mask = random_ids(4, 12, high=60), padding_masks(4, 12)
    written = generate(model, src, mask, max_new_tokens=30)
    assert torch.equal(page.generate(src, mask, max_new_tokens=30), written)
    # an eos that ends rows at different places
    eos = written[0, 3].item()
    object.__setattr__(page.config, "eos_id", eos)
    object.__setattr__(model.config, "eos_id", eos)
    written = generate(model, src, mask, max_new_tokens=30)
    assert torch.equal(page.generate(src, mask, max_new_tokens=30), written)


def test_dropout_falls_in_the_same_places(both):
    """From one seed both drop the same numbers, in the same order."""
    page, model = both
    src, tgt = random_ids(3, 9, high=60), random_ids(3, 7, 1, 60)
    logits = []
    for each in both:
        for part in each.train().modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.2
        torch.manual_seed(5)
        logits.append(each(src, tgt))
    assert (logits[0] - logits[1]).abs().max() <= 1e-12
    assert (logits[0] - page.eval()(src, tgt)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_are_as_large(kind):
    sizes = dict(enc_depth=1, dec_depth=1, heads=8, dim_head=32, dim=192, mlp_dim=384)
    page = one_page_t5.T5(one_page_t5.Config(vocab_size=500, **sizes, **KINDS[kind]))
    side = dict(num_tokens=500, depth=1, heads=8, dim_head=32, mlp_mult=2)
    sides = {f"{s}_{name}": value for s in ("enc", "dec") for name, value in side.items()}
    gated = dict(feed_forward="gated-gelu", tie_head=False) if KINDS[kind] else {}
    found = dict(page.named_parameters())
    for name, weight in T5(dim=192, **sides, **gated).named_parameters():
        if ".biases." in name:  # few numbers, uniform: their bound says more
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.9 * bound < found[page_name(name)].abs().max() <= bound
        else:
            ratio = found[page_name(name)].square().mean() / weight.square().mean()
            assert 0.9 < ratio < 1.1, name


def test_it_imports_nothing_from_the_package():
    tree = ast.parse(Path(one_page_t5.__file__).read_text("utf-8"))
    froms = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert froms <= {"torch", "dataclasses"}

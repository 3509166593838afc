"""Every way to compute attention gives what the plain one gives."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from t5_book.attention import ATTENTIONS
from t5_book.beams import beam_search
from t5_book.config import T5Config
from t5_book.fast_attention import ChunkedAttention
from t5_book.masks import causal_mask, expand_padding_mask, segment_mask
from t5_book.packing import packed_logits
from t5_book.relative_position import POSITION_BIASES, RelativePositionBias
from t5_book.t5 import T5
from tests.conftest import (
    FAMILIES,
    LENGTHS,
    PAIRS,
    SIZES,
    batch_with_labels,
    difference,
    make_family,
    make_writers,
    padded,
    padding_masks,
    random_ids,
    refuses,
    seeded,
    small_sizes,
    small_t5,
    sources,
)

FAST = sorted(set(ATTENTIONS) - {"plain"})


def other(model: T5, attention: str, **changes) -> T5:
    """The same model, which computes its attention in another way."""
    twin = T5(**asdict(replace(model.config, attention=attention, **changes)))
    twin.load_state_dict(model.state_dict())
    dtype = next(model.parameters()).dtype
    return twin.to(dtype).train(model.training)


def trained(model: T5, logits) -> dict:
    """Gradients of a number that depends on all these logits."""
    model.zero_grad()
    weight = torch.randn(logits.shape, generator=seeded(9), dtype=logits.dtype)
    (logits * weight).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: T5, call, attentions=FAST, bound=1e-5):
    """Logits and gradients of ``call(model)`` are those of the plain model."""
    plain = call(model)
    expected = trained(model, plain)
    for attention in attentions:
        twin = other(model, attention)
        with torch.no_grad():
            assert difference(call(twin), plain) <= bound
        ours = call(twin)
        assert difference(ours, plain) <= bound
        found = trained(twin, ours)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            scale = expected[name].abs().max().clamp(min=1e-30)
            assert (grad - expected[name]).abs().max() <= bound * max(1, scale), name


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several blocks from 140 tokens on, the last one smaller."""
    monkeypatch.setattr(ChunkedAttention, "chunk", 2**18)


# --- Choosing -------------------------------------------------------------


def test_the_ways_have_their_names():
    assert list(ATTENTIONS) == list(POSITION_BIASES) == ["plain", "sdpa", "chunked"]
    assert T5Config(**small_sizes()).attention == "plain"


@pytest.mark.parametrize("wrong", ["flash", "", None, True, 1])
def test_other_names_are_refused(wrong):
    refuses(lambda: small_t5(attention=wrong), "attention", repr(wrong), "'chunked'")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_choice_reaches_each_block(attention):
    model = small_t5(attention=attention, depth=2, bias_per_layer=True)
    kinds = [type(part) for part in model.modules() if hasattr(part, "mix")]
    assert kinds == 6 * [ATTENTIONS[attention]]
    tables = [
        type(part) for part in model.modules() if isinstance(part, RelativePositionBias)
    ]
    assert tables == 4 * [POSITION_BIASES[attention]]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_choice_is_no_part_of_the_weights(attention):
    plain, model = small_t5(), small_t5(attention=attention)
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, weight in plain.state_dict().items():  # and draws the same numbers
        assert torch.equal(weight, model.state_dict()[name])
    assert model.config == plain.config
    assert hash(model.config) == hash(plain.config)
    again = T5Config.from_json(model.config.to_json())
    assert again.attention == attention
    old = {k: v for k, v in asdict(plain.config).items() if k != "attention"}
    assert T5Config(**old).attention == "plain"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_saved_models_load_with_any_choice(attention, tmp_path):
    model = small_t5(attention=attention)
    model.save_pretrained(tmp_path)
    assert T5.from_pretrained(tmp_path).config.attention == "plain"
    loaded = T5.from_pretrained(tmp_path, attention="chunked")
    assert loaded.config.attention == "chunked"
    assert type(loaded.encoder.blocks[0].attention) is ChunkedAttention
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    refuses(lambda: T5.from_pretrained(tmp_path, attention="fast"), "attention", "fast")


# --- The same numbers -----------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("s, t", [*PAIRS[::3], (300, 40), (40, 300)])
def test_padded(family, s, t):
    model, _ = make_family(family)
    batch = padded(3, s, t)
    assert_equal(model, lambda m: m(*batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [*LENGTHS, 300])
def test_without_a_mask(family, length):
    model, _ = make_family(family)
    src, tgt = random_ids(2, length), random_ids(2, length, 1)
    assert_equal(model, lambda m: m(src, tgt))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64(family):
    model, _ = make_family(family)
    batch = padded(2, 140, 150)
    assert_equal(model.double(), lambda m: m(*batch), bound=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss(family):
    model, _ = make_family(family)
    src, mask, labels = batch_with_labels(140, 40)
    plain = model.loss(src, labels, mask)
    for attention in FAST:
        loss = other(model, attention).loss(src, labels, mask)
        assert difference(loss, plain) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("s, t", [(9, 10), (140, 40), (300, 260)])
def test_packed(family, s, t):
    """Rows of three texts, and padding that nobody attends to."""
    model, _ = make_family(family)
    segments = [
        torch.arange(n).mul(4).div(n, rounding_mode="floor").add(1).repeat(2, 1)
        for n in (s, t)
    ]
    for part in segments:
        part[part == 4] = 0  # a row without any key
        part[1, -1] = 3
    src, tgt = random_ids(2, s), random_ids(2, t, 1)
    assert_equal(model, lambda m: packed_logits(m, src, tgt, *segments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_row_without_a_key_gets_an_even_mean(attention, dtype):
    """Whatever its scores: values get a gradient, queries and keys none."""
    torch.manual_seed(0)
    attend = ATTENTIONS[attention](16, 2, 8)
    nn.init.normal_(attend.q.weight)
    attend.to(dtype)
    bias = POSITION_BIASES[attention](2).to(dtype)
    x = 3 * torch.randn(2, 140, 16, dtype=dtype)
    mask = expand_padding_mask(torch.arange(140)[None, :] < torch.tensor([[0], [70]]))
    for requires_grad in (True, False):
        attend.zero_grad()
        bias.requires_grad_(requires_grad)
        found = attend(x, attend.keys_values(x), mask, bias(140, 140))
        mean = attend.v(x[0]).float().mean(dim=0)
        expected = attend.o(mean.to(dtype))
        assert torch.allclose(found[0], expected, atol=20 * torch.finfo(dtype).eps)
        assert found.isfinite().all()
        found[0].float().sum().backward()
        assert (attend.q.weight.grad == 0).all() and (attend.k.weight.grad == 0).all()
        assert attend.v.weight.grad.abs().max() > 0
        if requires_grad:
            assert (bias.table.weight.grad == 0).all()


@pytest.mark.parametrize("attention", FAST)
def test_masks_of_each_shape(attention):
    """One for all queries, one for each query, one for each example and query."""
    torch.manual_seed(0)
    plain, fast = ATTENTIONS["plain"](16, 2, 8), ATTENTIONS[attention](16, 2, 8)
    fast.load_state_dict(plain.state_dict())
    x, y = torch.randn(3, 150, 16), torch.randn(3, 200, 16)
    some = torch.rand(3, 150, 200) < 0.5
    segments = torch.arange(200).div(40, rounding_mode="floor").repeat(3, 1)
    for mask in (
        causal_mask(150, 200),
        expand_padding_mask(padding_masks(3, 200)),
        expand_padding_mask(some),
        expand_padding_mask(segment_mask(segments[:, :150], segments)),
        causal_mask(150, 200) & expand_padding_mask(some),
    ):
        expected = plain(x, plain.keys_values(y), mask)
        assert difference(fast(x, fast.keys_values(y), mask), expected) <= 1e-5


# --- Generation -----------------------------------------------------------


@pytest.mark.parametrize("attention", FAST)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts(family, attention):
    model, _ = make_writers(family)
    twin = other(model, attention)
    options = dict(max_new_tokens=14)
    assert torch.equal(
        twin.generate(*sources(), **options), model.generate(*sources(), **options)
    )
    for ours, plain in zip(
        beam_search(twin, *sources(), num_beams=3, **options),
        beam_search(model, *sources(), num_beams=3, **options),
    ):
        assert torch.allclose(ours, plain, atol=1e-9)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_target_in_pieces(attention):
    """With a cache, blocks of queries are the last of more keys."""
    model = small_t5(attention=attention, depth=2).eval()
    src, tgt = random_ids(2, 9, high=32), random_ids(2, 310, 1, 32)
    whole = model(src, tgt)
    memory = model.encode(src)
    cache = model.decoder.new_cache(memory)
    pieces = [model.decode(part, cache=cache) for part in tgt.split([150, 1, 159], 1)]
    assert difference(torch.cat(pieces, dim=1), whole) <= 1e-5


# --- Training -------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dropout_falls_on_the_weights(attention):
    """On average it changes nothing; each weight is kept or lost as it should."""
    torch.manual_seed(0)
    attend = ATTENTIONS[attention](4, 1, 4, dropout=0.25)
    for linear in (attend.v, attend.o):
        nn.init.eye_(linear.weight)
    x = torch.ones(4, 1024, 4)
    mixed = attend(x, attend.keys_values(x))  # each the share of weights kept
    assert abs(mixed.mean() - 1) < 2e-3
    # The sum of 1,024 weights of 1/1024, each 4/3 with a chance of 3/4
    assert abs(mixed[..., 0].std() / (1 / 3 / 1024) ** 0.5 - 1) < 0.1
    assert torch.equal(mixed, attend(x, attend.keys_values(x))) is False
    attend.eval()
    even = attend(x, attend.keys_values(x))
    assert torch.allclose(even, x, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dropout_is_the_same_on_the_way_back(attention):
    """A derivative is that of the numbers that were drawn."""
    torch.manual_seed(0)
    attend = ATTENTIONS[attention](4, 2, 4, dropout=0.5).double()
    table = POSITION_BIASES[attention](2).double()
    x = torch.randn(1, 300, 4, dtype=torch.float64)

    def loss(weight):
        torch.manual_seed(1)
        with torch.no_grad():
            table.table.weight.copy_(weight)
        return attend(x, attend.keys_values(x), bias=table(300, 300)).square().sum()

    weight, step = table.table.weight.detach().clone(), torch.randn(32, 2).double()
    loss(weight).backward()
    slope = (table.table.weight.grad * step).sum()
    rise = (loss(weight + 1e-5 * step) - loss(weight - 1e-5 * step)) / 2e-5
    assert abs(rise / slope - 1) < 1e-6


@pytest.mark.parametrize("attention", FAST)
def test_within_checkpoints_of_others(attention):
    model = small_t5(attention=attention, dropout=0.1)
    src, tgt = random_ids(2, 150, high=32), random_ids(2, 9, 1, 32)
    grads = []
    for call in (model, lambda *ids: checkpoint(model, *ids, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(trained(model, call(src, tgt)))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name])


@pytest.mark.parametrize("attention", FAST)
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_half_precision(attention, kind):
    """As far from float32 as the plain path is, roughly."""
    model, _ = make_family("t5")
    batch = padded(3, 140, 40)
    exact = model(*batch)
    if kind == "bfloat16":
        model = model.bfloat16()
    far = []
    for name in ("plain", attention):
        twin = other(model, name)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            logits = twin(*batch)
        assert logits.isfinite().all()
        loss = logits.float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in twin.parameters())
        far.append((logits.float() - exact).abs().mean())
    assert far[1] <= 2 * far[0]


@pytest.mark.parametrize("attention", FAST)
def test_frozen_tables(attention):
    model, _ = make_family("umt5")
    for stack in (model.encoder, model.decoder):
        stack.biases.requires_grad_(False)
    twin = other(model, attention)
    for stack in (twin.encoder, twin.decoder):
        stack.biases.requires_grad_(False)
    batch = padded(3, 140, 40)
    expected = trained(model, model(*batch))
    for name, grad in trained(twin, twin(*batch)).items():
        assert (grad - expected[name]).abs().max() <= 1e-5, name


# --- Memory ---------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in bytes of storage."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor):
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return made


def kept_for_the_way_back(call) -> int:
    """Bytes that autograd keeps, each storage once."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = call()
    assert held.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masks", ["none", "padded", "pairs"])
def test_chunked_never_makes_all_scores(train, masks):
    heads, length = 8, 1024
    model = small_t5(attention="chunked", heads=heads)
    src, tgt = random_ids(1, length, high=32), random_ids(1, length, 1, 32)
    segments = torch.arange(length)[None].div(300, rounding_mode="floor")

    def run():
        if masks == "pairs":
            logits = packed_logits(model, src, tgt, segments, segments)
        else:
            real = torch.arange(length)[None] < 900 if masks == "padded" else None
            logits = model(src, tgt, real, real)
        if train:
            logits.square().mean().backward()

    with torch.set_grad_enabled(train), Largest() as largest:
        run()
    scores = 4 * heads * length * length
    assert largest.bytes <= scores / 16


def test_chunked_keeps_no_scores():
    """Plain keeps an amount that grows with the square; chunked does not."""
    kept = {}
    for attention in ("plain", "chunked"):
        model = small_t5(attention=attention, heads=8)
        for length in (512, 1024):
            src = random_ids(1, length, high=32)
            kept[attention, length] = kept_for_the_way_back(lambda: model.encode(src))
    assert kept["plain", 1024] > 3.5 * kept["plain", 512]
    assert kept["chunked", 1024] < 2.2 * kept["chunked", 512]
    assert kept["chunked", 1024] < kept["plain", 1024] / 10


def test_a_bias_is_looked_up_once_for_each_distance():
    bias = RelativePositionBias(SIZES["heads"])
    seen = []
    bias.table.register_forward_hook(lambda *call: seen.append(call[1][0].shape))
    assert bias(9, 40).shape == (1, SIZES["heads"], 9, 40)
    assert seen == [(48,)]


# --- torch.compile --------------------------------------------------------


@pytest.mark.parametrize("attention", FAST)
def test_one_graph(attention):
    model = small_t5(attention=attention).eval().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = padded(2, 140, 9, high=32)
    assert difference(compiled(*batch), model(*batch)) <= 1e-6
    torch.compiler.reset()

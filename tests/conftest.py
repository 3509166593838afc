"""What the tests share: small models, the five families, pairs of ours and
``transformers``' with the same random weights, inputs, and comparisons.

One table of families, ``FAMILIES``; in every pair the norms and the biases are
random too, since a norm of one hides a swap. Token-for-token comparisons use
the writers, which are float64: in float32 two tokens can be so nearly equal
that the order of a sum decides between them, and that depends on the processor.
"""

import random
from pydoc_data.topics import topics

import pytest
import torch
import transformers
from torch import Tensor, nn

from t5_book.t5 import T5


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed before the test's fixtures are made.

    Which files a worker of pytest-xdist gets depends on how busy the
    machine is, and so would the numbers of a test that sets no seed.
    """
    torch.manual_seed(0)


def refuses(call, *words, error=ValueError) -> str:
    """Expect an error whose message has all these words; return it."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert str(word) in message
    return message


def seeded(seed: int) -> torch.Generator:
    """A generator that gives the same numbers each time."""
    return torch.Generator().manual_seed(seed)


# --- Small models ---------------------------------------------------------


def small_sizes(**changes) -> dict:
    """Keywords of a small ``T5``.

    ``depth=2`` is for both stacks, ``dec_depth=2`` for one of them.
    """
    side = dict(num_tokens=32, depth=1, heads=2, dim_head=4, mlp_mult=2)
    for name in side:
        side[name] = changes.pop(name, side[name])
    both = {f"{s}_{name}": value for s in ("enc", "dec") for name, value in side.items()}
    return dict(dim=16) | both | changes


def small_t5(seed: int = 0, **changes) -> T5:
    """A fresh small ``T5``, with the keywords of ``small_sizes``."""
    torch.manual_seed(seed)
    return T5(**small_sizes(**changes))


# --- The families, from transformers --------------------------------------

SIZES = dict(dim=48, heads=4, dim_head=8, depth=3, dec_depth=2, num_tokens=128)
LENGTHS = [1, 9, 10, 40, 140]
PAIRS = [(s, t) for s in LENGTHS for t in LENGTHS if s != t]
# The same sizes by the names of transformers
SMALL = dict(vocab_size=128, d_model=48, d_kv=8, num_heads=4, num_layers=3)
SMALL |= dict(num_decoder_layers=2, d_ff=96)
GATED = dict(feed_forward_proj="gated-gelu")
# Four blocks read and one writes, and heads * dim_head is not dim.
UNEVEN = dict(num_layers=4, num_decoder_layers=1, num_heads=6, d_kv=12)
# How transformers makes each family, and what is not at our default.
FAMILIES = {
    "t5": ("T5", {"feed_forward_proj": "relu"}),
    "t5-v1_1": ("T5", GATED),
    "mt5": ("MT5", GATED),
    "byt5": ("T5", GATED | UNEVEN),
    "umt5": ("UMT5", GATED),
}
# T5's small sizes, of which 1.1 with fewer layers.
RELEASED = {
    "t5": dict(vocab_size=32128, d_model=512, d_kv=64, num_heads=8, d_ff=2048)
    | dict(num_layers=6, num_decoder_layers=6),
    "t5-v1_1": dict(vocab_size=32128, d_model=512, d_kv=64, num_heads=6, d_ff=1024)
    | dict(num_layers=2, num_decoder_layers=2),
}
PLACES = {
    "attention_norm": "0.layer_norm",
    "attention": "0.SelfAttention",
    "self_norm": "0.layer_norm",
    "self_attention": "0.SelfAttention",
    "cross_norm": "1.layer_norm",
    "cross_attention": "1.EncDecAttention",
    "feed_forward_norm": "{last}.layer_norm",
    "feed_forward": "{last}.DenseReluDense",
}


def reference_name(name: str) -> str:
    """Translate the name of one of our weights to that of the reference."""
    stack, part, *rest = name.split(".")
    if part == "weight":
        return "lm_head.weight" if stack == "head" else "shared.weight"
    if part == "norm":
        return f"{stack}.final_layer_norm.weight"
    number, place, *weight = rest
    if part == "biases":
        place = "0.SelfAttention.relative_attention_bias"
    else:
        place = PLACES[place].format(last=1 if stack == "encoder" else 2)
    return ".".join([stack, "block", number, "layer", place, *weight])


def copy_weights(ours: nn.Module, reference: nn.Module) -> None:
    """Load the weights of a reference T5 into ours."""
    weights = reference.state_dict()
    ours.load_state_dict({name: weights[reference_name(name)] for name in ours.state_dict()})


def make_family(family: str, seed: int = 0, **sizes) -> tuple[T5, nn.Module]:
    """A reference of a family of ``FAMILIES``, and ours with its weights.

    ``sizes`` are those of the reference's config; default: ``SMALL``.
    """
    torch.manual_seed(len(FAMILIES) * seed + list(FAMILIES).index(family))
    reference = make_reference(family, **sizes)
    perturb(reference)
    ours = T5(**keywords(family, reference.config)).eval()
    copy_weights(ours, reference)
    return ours, reference


def make_reference(family: str, **sizes) -> nn.Module:
    """A model of transformers as the authors of the family released it."""
    kind, extra = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    options = dict(dropout_rate=0.0, decoder_start_token_id=0)
    reference = model(config(**options | SMALL | extra | sizes)).eval()
    return reference if family == "t5" else untie(reference)


def untie(reference: nn.Module) -> nn.Module:
    """Give a reference a head of its own, and logits that are not scaled.

    Every released model but T5 1.0 has both. ``transformers`` 5.23 ties
    the head of a fresh model whatever its config says, and then scales the
    logits of T5 1.1 if it is fresh, and those of UMT5 always.
    """
    head = torch.randn_like(reference.lm_head.weight)
    scale = reference.config.d_model**-0.5
    reference.lm_head.weight = nn.Parameter(head * scale)
    reference.config.scale_decoder_outputs = False  # T5 asks for this,
    reference.config.tie_word_embeddings = False  # and UMT5 for this
    return reference


def perturb(reference: nn.Module) -> None:
    """Change what starts so even or so small that it would hide bugs."""
    for name, weight in reference.named_parameters():
        if weight.ndim == 1:  # norms start at one
            weight.data += 0.3 * torch.randn_like(weight)
        if "relative_attention_bias" in name:  # as large as the scores
            weight.data.normal_()


def keywords(family: str, config) -> dict:
    """What to pass to our ``T5``, for a config of ``transformers``."""
    return small_sizes(
        dim=config.d_model,
        num_tokens=config.vocab_size,
        depth=config.num_layers,
        dec_depth=config.num_decoder_layers,
        heads=config.num_heads,
        dim_head=config.d_kv,
        mlp_mult=config.d_ff / config.d_model,
        feed_forward=config.feed_forward_proj,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        tie_head=family == "t5",
        bias_per_layer=family == "umt5",
    )


def exact_norms(reference: nn.Module) -> nn.Module:
    """Let a float64 reference compute its norms in float64.

    ``transformers`` takes the statistics in float32, always: right for
    smaller types, but in float64 it leaves an error of 1e-7.
    """
    for module in reference.modules():
        if type(module).__name__.endswith("LayerNorm"):
            module.forward = lambda x, norm=module: nn.functional.rms_norm(
                x, x.shape[-1:], norm.weight, norm.variance_epsilon
            )
    return reference


def make_pair(feed_forward="relu") -> tuple[T5, nn.Module]:
    """Ours and a reference with either feed-forward layer, both with a tied head."""
    return make_family("t5", feed_forward_proj=feed_forward)


def make_ours(**extra) -> T5:
    """Our T5 in the sizes of the reference."""
    return T5(**small_sizes(**SIZES) | extra)


# --- Inputs and differences -----------------------------------------------


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, relative where the reference exceeds one."""
    assert ours.shape == reference.shape  # or they would broadcast
    return ((ours - reference).abs() / reference.abs().clamp(min=1)).max().item()


def random_ids(batch: int, length: int, seed: int = 0, high: int = 128) -> Tensor:
    """Random tokens, without padding and eos."""
    return torch.randint(2, high, (batch, length), generator=seeded(seed))


def padding_masks(batch: int, length: int) -> Tensor:
    """A mask with padding on the right (row 0), on the left (row 1)."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    if length > 2:
        mask[0, length // 2 :] = False
        mask[1, : length // 3] = False
    return mask


def padded(batch: int, s: int, t: int, high: int = 128):
    """Ids and masks; rows are padded on different sides."""
    masks = padding_masks(batch, s), padding_masks(batch, t).flip(0)
    ids = random_ids(batch, s, 0, high), random_ids(batch, t, 1, high)
    return *ids, *masks


def batch_with_labels(s: int = 40, t: int = 10):
    """A batch for training: ids, mask and labels, with padding in both."""
    src, labels = random_ids(3, s), random_ids(3, t, 1)
    labels[0, t // 3 :] = labels[2, -1:] = -100
    return src, padding_masks(3, s), labels


def their_logits(reference: nn.Module, src, tgt, mask=None, tgt_mask=None) -> Tensor:
    """What ``model(src, tgt, mask, tgt_mask)`` is called over there."""
    return reference(
        input_ids=src,
        attention_mask=None if mask is None else mask.long(),
        decoder_input_ids=tgt,
        decoder_attention_mask=None if tgt_mask is None else tgt_mask.long(),
    ).logits


def gradients(ours: nn.Module, reference: nn.Module, src, mask, labels):
    """Losses of both, and the gradients of both, by our names."""
    loss = ours.loss(src, labels, mask)
    theirs = reference(input_ids=src, attention_mask=mask.long(), labels=labels).loss
    for value, model in ((loss, ours), (theirs, reference)):
        model.zero_grad()
        value.backward()
    found = dict(reference.named_parameters())
    pairs = {
        name: (weight.grad, found[reference_name(name)].grad)
        for name, weight in ours.named_parameters()
    }
    return loss.detach(), theirs.detach(), pairs


# --- Pairs that write varied texts ----------------------------------------

VOCAB = 60


def make_writers(family: str, seed: int = 0) -> tuple[T5, nn.Module]:
    """A reference with strong random weights, and ours with the same."""
    sizes = dict(vocab_size=VOCAB, d_model=32, d_ff=48)
    # So small, their rows end at many places.
    sizes |= dict(d_kv=4) if family == "byt5" else dict(num_layers=2)
    reference = make_reference(family, **sizes)
    torch.manual_seed(10 * list(FAMILIES).index(family) + seed)
    for name, weight in reference.named_parameters():
        weight.data = strong_weight(name, weight, family)
    ours = T5(**keywords(family, reference.config)).eval()
    copy_weights(ours, reference)
    return ours.double(), exact_norms(reference.double())


def strong_weight(name: str, weight: Tensor, family: str) -> Tensor:
    """Random numbers with which a token depends on all before it."""
    noise = torch.randn_like(weight)
    tied = family == "t5"  # a large embedding would repeat what it reads
    if weight.ndim == 1:
        large = tied and "decoder.final" in name
        return (30 if large else 1) * (1 + 0.3 * noise)
    if "relative_attention_bias" in name:
        return noise
    if "lm_head" in name:
        return noise * 0.3
    if "shared" in name:
        return noise * (0.05 if tied else 0.3)
    return noise * 1.5 * weight.shape[1] ** -0.5


def make_ending_writers(family: str, seed: int = 0) -> tuple[T5, nn.Module]:
    """The same, with an eos that ends rows at many different places."""
    ours, reference = make_writers(family, seed)
    eos = choose_eos(write_slowly(ours, *sources(), steps=14))
    return with_ids(ours, eos_id=eos), reference


def sources(b: int = 5, s: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random sources with padding on both sides, and their mask."""
    src = torch.randint(2, VOCAB, (b, s), generator=seeded(seed))
    return src, padding_masks(max(b, 2), s)[:b]


def with_ids(model: T5, **special) -> T5:
    """The same model, with other special tokens or other options."""
    other = T5(**vars(model.config) | special).eval()
    other.load_state_dict(model.state_dict())
    return other.to(model.head.weight.dtype)


@torch.no_grad()
def write_slowly(model, src, mask=None, steps=14) -> Tensor:
    """Greedy generation by the formula: no cache, no end."""
    tgt = torch.full_like(src[:, :1], model.config.start_id)
    for _ in range(steps):
        logits = model(src, tgt, mask=mask)
        tgt = torch.cat([tgt, logits[:, -1:].argmax(-1)], dim=1)
    return tgt[:, 1:]


def cut(rows: Tensor, eos: int, skip: int = 0) -> list[list[int]]:
    """Rows as lists, each up to its first eos after ``skip`` tokens."""
    return [
        row[: row.index(eos, skip) + 1] if eos in row[skip:] else row
        for row in rows.tolist()
    ]


def choose_eos(written: Tensor) -> int:
    """A token that ends rows at as many different places as possible."""
    found = [token for token in written[:, 1:].unique().tolist() if token]
    return max(found, key=lambda eos: len(set(map(len, cut(written, eos)))))


def write_with_reference(reference, ours: T5, src, mask=None, **options):
    """What ``transformers`` writes, without the start token.

    ``prefix`` is given to it as it wants it, with the start token; the 50
    likeliest tokens are no limit unless asked for. Asked for more than
    the ids, it returns all that it has.
    """
    if "prefix" in options:
        prefix = options.pop("prefix")
        start = torch.zeros(len(prefix), 1, dtype=torch.long)
        options["decoder_input_ids"] = torch.cat([start, prefix], dim=1)
    special = dict(decoder_start_token_id=0, pad_token_id=0)
    options = dict(do_sample=False, num_beams=1, top_k=0) | special | options
    if not options["do_sample"]:
        del options["top_k"]
    written = reference.generate(
        input_ids=src,
        attention_mask=None if mask is None else mask.long(),
        eos_token_id=ours.config.eos_id,
        **options,
    )
    return written[:, 1:] if isinstance(written, Tensor) else written


# --- Texts ----------------------------------------------------------------

# Python's help texts: English, with code and tables among it.
HELP = "\n".join(topics.values()).splitlines()
OTHERS = """Füße naïve Ærøskøbing ŁÓDŹ Œuvre Ελληνικά Кошка עברית العربية
हिन्दी 雪が降る 한국어 ไทย ﬁnd ﬃ ½ ① ㎏ Ｔ５ ｶﾀ ガ Ⅷ … “so” ‘so’ — – € ° ™ 🐈 👩‍🚀 🇩🇪
é e\u0301 ǆ ﷺ İ ß ſ K Å \U0010fffd \ufffd""".split()
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b"]
WORDS = sorted(set(" ".join(HELP).split()))


def mixed_line(seed: int) -> str:
    """A line of words of all scripts, with all kinds of space between."""
    draw = random.Random(seed)
    words = draw.choices(WORDS, k=4) + draw.choices(OTHERS, k=3)
    draw.shuffle(words)
    start, end = draw.choices(["", *SPACES], k=2)
    inner = "".join(word + draw.choice(SPACES) for word in words)
    return start + inner.rstrip() + end

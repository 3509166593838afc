"""Greedy and sampled generation against ``transformers``."""

from io import StringIO

import pytest
import torch
from torch import nn
from transformers import TextStreamer
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.decoder import DecoderCache
from t5_book.generation import (
    DecodingState,
    WordStreamer,
    filter_logits,
    first_target,
    generate,
)
from t5_book.inference import evaluation_view
from t5_book.t5 import T5
from t5_book.tokenizer import Tokenizer
from tests.conftest import (
    FAMILIES,
    VOCAB,
    choose_eos,
    cut,
    difference,
    make_ending_writers,
    sources,
    with_ids,
    write_slowly,
    write_with_reference,
)

pytestmark = pytest.mark.rounding

TINY = dict(
    dim=16, enc_num_tokens=32, enc_depth=1, enc_heads=2, enc_dim_head=4,
    enc_mlp_mult=2, dec_num_tokens=32, dec_depth=1, dec_heads=2,
    dec_dim_head=4, dec_mlp_mult=2,
)  # fmt: skip
SAMPLING = [
    {},
    {"top_k": 0, "top_p": 1.0},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.7},
    {"temperature": 1.4, "top_k": 12, "top_p": 0.8},
]
SHARP = {"do_sample": True, "temperature": 0.3}
PREFIX = torch.randint(
    2, VOCAB, (5, 4), generator=torch.Generator().manual_seed(3)
)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """Our T5 and the reference with the same weights."""
    return make_ending_writers(request.param)


@pytest.fixture(scope="module")
def model():
    """A T5 whose texts vary and end."""
    return make_ending_writers("t5-v1_1")[0]


def assert_same(pair, *inputs, **options):
    """Ours and the reference write the same; returns it."""
    ours, reference = pair
    torch.manual_seed(5)
    written = generate(ours, *inputs, **options)
    torch.manual_seed(5)
    theirs = write_with_reference(reference, ours, *inputs, **options)
    assert written.dtype == torch.int64
    assert written.tolist() == theirs.tolist()
    return written


# --- Agreement with transformers ------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_agrees_token_for_token(family, seed):
    pair = make_ending_writers(family, seed)
    written = assert_same(pair, *sources(), max_new_tokens=14)
    lengths = {len(row) for row in cut(written, pair[0].config.eos_id)}
    assert len(lengths) > 1


def test_greedy_agrees_without_a_mask(pair):
    assert_same(pair, sources()[0], max_new_tokens=14)


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_samples_agree_token_for_token(pair, settings):
    options = dict(max_new_tokens=10, do_sample=True) | settings
    sampled = assert_same(pair, *sources(), **options)
    assert not torch.equal(sampled, generate(pair[0], *sources()))


@pytest.mark.parametrize("settings", [{}, SHARP])
def test_the_least_length_agrees(pair, settings):
    options = dict(max_new_tokens=14) | settings
    torch.manual_seed(5)
    free = generate(pair[0], *sources(), **options)
    eos = pair[0].config.eos_id
    assert min(map(len, cut(free, eos))) < 11
    written = assert_same(pair, *sources(), min_new_tokens=11, **options)
    assert min(map(len, cut(written, eos))) > 11


@pytest.mark.parametrize("p, least", [(1, 5), (4, 0)])
def test_a_prefix_agrees(pair, p, least):
    prefix = PREFIX[:, :p]
    options = dict(max_new_tokens=10, min_new_tokens=least, prefix=prefix)
    written = assert_same(pair, *sources(), **options)
    assert torch.equal(written[:, :p], prefix)
    ends = map(len, cut(written, pair[0].config.eos_id, skip=p))
    assert p + least < min(ends) <= p + 10


def test_samples_after_a_prefix_agree(pair):
    options = dict(do_sample=True, top_k=5, max_new_tokens=9)
    assert_same(pair, *sources(), prefix=PREFIX, **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 99])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
def test_filters_agree(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 40)
    logits[1, 5:20] = 3.0  # ties
    logits[2, :7] = -torch.inf
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    before = logits.clone()
    ours = filter_logits(logits, temperature, top_k, top_p)
    assert torch.equal(ours, theirs)
    assert torch.equal(logits, before)
    assert ours.isfinite().any(dim=1).all()


def test_ties_at_the_border_of_top_k_all_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    kept = filter_logits(logits, top_k=2).isfinite()
    assert kept.tolist() == [[True, True, True, True, False]]


def test_what_has_just_enough_is_kept_and_no_more():
    """Quarters have exact sums in binary: two of four are one half."""
    even = torch.zeros(1, 4)
    kept = filter_logits(even, top_p=0.5)
    assert torch.equal(kept, TopPLogitsWarper(0.5)(None, even))
    assert kept.isfinite().sum() == 2


# --- The cache ------------------------------------------------------------


def test_cached_equals_uncached_beyond_the_last_bucket(pair):
    """In pieces of 1, 1, 1, 97 and 10 tokens, then token by token.

    From a distance of 113 on, all share a bucket.
    """
    src, mask = sources(3, 20)
    tgt = sources(3, 130, seed=2)[0]
    with torch.no_grad():
        memory = pair[0].encode(src, mask)
        slow = DecodingState(pair[0], memory, mask, use_cache=False)
        fast = DecodingState(pair[0], memory, mask)
        for t in (1, 2, 3, 100, *range(110, 131)):
            last = fast.next_logits(tgt[:, :t])
            if t in (1, 100, 110, 113, 114, 115, 128, 129, 130):
                whole = slow.next_logits(tgt[:, :t])
                assert difference(last, whole) <= 1e-6
    assert slow.cache is None and fast.cache.length == 130


@pytest.mark.parametrize("sample", [False, True])
def test_without_a_cache_it_writes_the_same(pair, sample):
    ours = with_ids(pair[0], eos_id=VOCAB - 1)
    written = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = dict(do_sample=sample, use_cache=use_cache)
        options |= dict(max_new_tokens=15, min_new_tokens=12)
        options |= dict(prefix=sources(2, 120)[0])
        written.append(generate(ours, *sources(2), **options))
    assert written[0].shape[1] > 130
    assert torch.equal(*written)


def test_writes_what_the_formula_writes(model):
    src, mask = sources(4, 10)
    slow = write_slowly(model, src, mask, 40)
    other = with_ids(model, eos_id=choose_eos(slow))
    eos = other.config.eos_id
    written = generate(other, src, mask, max_new_tokens=40)
    assert cut(written, eos) == cut(slow, eos)


@pytest.mark.parametrize("p", [0, 1, 5])
def test_each_key_is_projected_once_and_the_prefix_in_one_piece(p):
    model = T5(**TINY | {"eos_id": 31}).eval()
    model.head.weight.data[31] = 0  # never the likeliest for long
    read = {"self_attention": [], "cross_attention": []}
    block = model.decoder.blocks[0]
    for name in read:

        def count(module, inputs, output, name=name):
            read[name].append(output.shape[1])

        getattr(block, name).v.register_forward_hook(count)
    src = sources(1, 6)[0] % 30
    options = dict(prefix=PREFIX[:1].repeat(1, 2)[:, :p] % 30) if p else {}
    written = generate(model, src, max_new_tokens=12, **options)
    steps = written.shape[1] - p
    assert read["self_attention"] == [1 + p] + [1] * (steps - 1)
    assert read["cross_attention"] == [6]


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_logits_are_float32_at_least(dtype, expected):
    model, src = T5(**TINY).to(dtype).eval(), torch.tensor([[3, 4]])
    state = DecodingState(model, model.encode(src))
    logits = state.next_logits(torch.tensor([[0]]))
    assert logits.shape == (1, 32) and logits.dtype == expected
    assert generate(model, src).dtype == torch.int64


# --- The loop -------------------------------------------------------------


def test_a_batch_writes_what_each_row_writes_alone(model):
    (src, mask), eos = sources(4, 10), model.config.eos_id
    written = cut(generate(model, src, mask, max_new_tokens=25), eos)
    for row, real, expected in zip(src, mask, written):
        alone = generate(model, row[real][None], max_new_tokens=25)
        assert alone.tolist() == [expected]


def test_rows_that_are_done_are_padded(model):
    other = with_ids(model, pad_id=3)
    written = generate(other, *sources(), max_new_tokens=14)
    ends = [len(row) for row in cut(written, model.config.eos_id)]
    assert min(ends) < max(ends) == written.shape[1]
    for row, end in zip(written.tolist(), ends):
        assert set(row[end:]) <= {3}


class Script(nn.Module):
    """Stands in for a decoder: writes given rows, whatever it reads."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.read, self.graph = torch.tensor(rows), [], False

    def note(self, embedding, inputs):
        """Keep the ids that are embedded for it, call by call."""
        self.read.append(inputs[0].tolist())

    def new_cache(self, memory, src_mask):
        self.graph |= memory.requires_grad
        return DecoderCache([], None)

    def forward(self, x, memory=None, src_mask=None, cache=None):
        self.graph |= torch.is_grad_enabled()
        if cache is not None:
            cache.length += x.shape[1]
        step = self.rows[:, len(self.read) - 1]  # [b]
        return nn.functional.one_hot(step, 32)[:, None].float()  # [b 1 v]


def scripted(rows, **config):
    """A T5 whose decoder follows a script, and a source for each row."""
    model = T5(**TINY | config, tie_token_emb=False)
    model.decoder = script = Script(rows)
    model.dec_emb.register_forward_pre_hook(script.note)
    model.logits = lambda x: x
    return model, script, torch.full((len(rows), 4), 7)


def test_the_loop_ends_when_all_rows_are_done():
    rows = [[5, 1, 6, 7, 8], [5, 6, 7, 1, 8], [1, 5, 6, 7, 8]]
    model, script, src = scripted(rows)
    written = generate(model, src, max_new_tokens=5)
    assert written.tolist() == [[5, 1, 0, 0], [5, 6, 7, 1], [1, 0, 0, 0]]
    assert len(script.read) == 4


def test_it_reads_the_start_token_and_then_its_own():
    model, script, src = scripted([[5, 6, 7, 1]], start_id=9)
    generate(model, src, max_new_tokens=3, use_cache=False)
    assert script.read == [[[9]], [[9, 5]], [[9, 5, 6]]]


def test_it_reads_the_prefix_behind_the_start_token():
    model, script, src = scripted([[5, 1]], start_id=9)
    prefix = torch.tensor([[3, 1, 4]], dtype=torch.int32)
    written = generate(model, src, prefix=prefix)
    assert script.read[0] == [[9, 3, 1, 4]]
    # The 1 in the prefix is eos, and ends nothing there.
    assert written.tolist() == [[3, 1, 4, 5, 1]]


def test_it_keeps_no_graph():
    model, script, src = scripted([[5, 6, 1]])
    generate(model, src)
    assert not script.graph


@pytest.mark.parametrize("n", [1, 2, 7])
def test_it_stops_at_max_new_tokens(n):
    model, _, src = scripted([[5] * 9])
    written = generate(model, src, max_new_tokens=n)
    assert written.tolist() == [[5] * n]


def test_a_generator_of_your_own(model):
    state = torch.get_rng_state()
    first, same, other = [
        generate(
            model, *sources(), do_sample=True, temperature=3.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_seed_gives_the_same_tokens_in_float32_and_float64(model, options):
    written = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        other = with_ids(model).to(dtype)
        written.append(generate(other, *sources(), do_sample=True, **options))
    assert torch.equal(*written)


@pytest.mark.parametrize(
    "option", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}], ids=str
)
def test_each_setting_turned_down_is_greedy(pair, option):
    greedy = generate(pair[0], *sources())
    sampled = generate(pair[0], *sources(), do_sample=True, **option)
    assert torch.equal(sampled, greedy)


def test_settings_that_change_nothing_are_accepted_when_greedy(model):
    neutral = dict(temperature=1, top_k=0, top_p=1, generator=None)
    greedy = generate(model, *sources())
    assert torch.equal(generate(model, *sources(), **neutral), greedy)


def test_dropout_is_off_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model = T5(**TINY, dropout=0.5).train()
    src = sources(4, 6)[0] % 30
    first = model.generate(src, max_new_tokens=20)
    assert torch.equal(first, model.generate(src, max_new_tokens=20))
    assert model.training and model.decoder.dropout.training
    assert not first.is_inference() and not first.requires_grad
    assert all(p.grad is None for p in model.parameters())
    model.loss(src, first).backward()  # what it wrote can be learned from


def test_a_view_leaves_the_mode_of_every_part():
    model = T5(**TINY).train()
    model.encoder.eval()
    before = [part.training for part in model.modules()]
    view = evaluation_view(model)
    assert not any(part.training for part in view.modules())
    assert [part.training for part in model.modules()] == before
    assert {True, False} == set(before)
    assert evaluation_view(view) is view


def test_the_mask_reaches_cross_attention(model):
    """A mask that stops at the encoder lets the decoder read padding."""
    src, mask = sources(2, 10)[0], torch.ones(2, 10).bool()
    mask[:, 6:] = False
    other = src.clone()
    other[:, 6:] = VOCAB - 1
    first, second = [generate(model, s, mask) for s in (src, other)]
    assert torch.equal(first, second)


# --- The streamer ---------------------------------------------------------


class Recorder:
    """Notes what a streamer gets."""

    def __init__(self):
        self.calls = []

    def put(self, ids):
        self.calls.append((tuple(ids.shape), ids.tolist()))

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_streamer_gets_what_it_gets_from_the_reference(pair, prefixed):
    ours, theirs = Recorder(), Recorder()
    src = sources(1)[0]
    options = {"prefix": PREFIX[:1]} if prefixed else {}
    written = generate(
        pair[0], src, max_new_tokens=9, streamer=ours, **options
    )
    write_with_reference(
        pair[1], pair[0], src, max_new_tokens=9, streamer=theirs, **options
    )
    assert ours.calls == theirs.calls
    assert ours.calls[-1] == "end" and len(ours.calls) > 2
    ids = [token for _, new in ours.calls[1:-1] for token in new]
    assert written[0].tolist() == PREFIX[0].tolist() * prefixed + ids


@pytest.fixture(scope="module")
def tokenizer():
    """Words of several pieces each."""
    lines = ["the cat sleeps", "the dog sleeps", "the cat is eating"] * 9
    return Tokenizer.train(lines, vocab_size=19)


TEXTS = [
    "the cat is sleeping",
    "dog",
    "",
    "the <extra_id_0> cat <extra_id_1>",
]


def pieces(streamer, ids, capsys):
    """What a streamer prints after each token, and at the end."""
    printed = []
    for token in ids:
        streamer.put(torch.tensor([token]))
        printed.append(capsys.readouterr().out)
    streamer.end()
    return [*printed, capsys.readouterr().out]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_printed_as_the_reference_prints_them(
    tokenizer, text, capsys
):
    ids = [0, *tokenizer.encode(text), 1]
    ours = pieces(WordStreamer(tokenizer), ids, capsys)
    assert ours == pieces(TextStreamer(tokenizer), ids, capsys)
    assert "".join(ours) == tokenizer.decode(ids) + "\n"
    assert all(piece[-1:] in ("", " ") for piece in ours[:-1])


@pytest.mark.parametrize("text", ["你好 the 猫", "a 狗", "two\nlines\n猫"])
def test_chinese_is_printed_as_the_reference_prints_it(text, capsys):
    """Each of these characters is three tokens."""
    tokenizer = ByteTokenizer()
    ids = [0, *tokenizer.encode(text), 1]
    ours = pieces(WordStreamer(tokenizer), ids, capsys)
    theirs = pieces(TextStreamer(tokenizer), ids, capsys)
    assert ours == theirs and "".join(ours) == text + "\n"


class Bytes:
    """A tokenizer that shows half a character as U+FFFD."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    "text, lengths",
    [
        ("猫は、ネコ。", [1, 2, 3, 4, 5, 6]),
        ("แมว", [1, 2, 3]),
        ("고양이 잔다", [4]),  # Korean has spaces
        ("x" * 39, []),
        ("x" * 100, [40, 80]),
        ("\N{GREEK SMALL LETTER ALPHA}" * 50 + " a b", [40, 51, 53]),
        ("two\nlines", [4]),
    ],
)
def test_text_without_spaces_is_printed_in_time(text, lengths):
    file = StringIO()
    streamer, seen = WordStreamer(Bytes(), file), [""]
    for byte in text.encode():
        streamer.put(torch.tensor([byte]))
        if file.getvalue() != seen[-1]:
            seen.append(file.getvalue())
    assert [len(part) for part in seen[1:]] == lengths
    assert all(text.startswith(part) for part in seen)
    streamer.end()
    assert file.getvalue() == text + "\n"


def test_what_never_becomes_a_character_is_printed_at_the_end():
    file = StringIO()
    streamer = WordStreamer(Bytes(), file)
    streamer.put(torch.tensor([104, 105, 32, 0xE7, 0x8C]))
    assert file.getvalue() == "hi "
    streamer.end()
    assert file.getvalue() == "hi \ufffd\n"


def test_a_streamer_prints_each_text_anew(tokenizer):
    file = StringIO()
    streamer = WordStreamer(tokenizer, file)
    for text in ("the cat", "is eating"):
        streamer.put(torch.tensor([tokenizer.encode(text)]))
        streamer.end()
    assert file.getvalue() == "the cat\nis eating\n"


class Lines:
    """A tokenizer that knows of line breaks."""

    def decode(self, ids):
        return "".join("ab\n "[i] for i in ids)


def test_a_line_break_ends_a_word():
    file = StringIO()
    streamer = WordStreamer(Lines(), file)
    seen = []
    for token in (0, 2, 1, 3, 0):
        streamer.put(torch.tensor([token]))
        seen.append(file.getvalue())
    streamer.end()
    assert seen == ["", "a\n", "a\n", "a\nb ", "a\nb "]
    assert file.getvalue() == "a\nb a\n"


@pytest.mark.parametrize("kind", [WordStreamer, TextStreamer])
def test_what_is_printed_is_what_is_written(tokenizer, kind, capsys):
    rows = [[*tokenizer.encode("the cat is eating"), 1]]
    model, _, src = scripted([[token % 32 for token in rows[0]]])
    written = generate(model, src, streamer=kind(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(written[0]) + "\n"


# --- Errors ---------------------------------------------------------------


ERRORS = [
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(max_new_tokens=-3), "max_new_tokens is -3"),
    (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    (dict(min_new_tokens=-1), "min_new_tokens is -1"),
    (dict(max_new_tokens=5, min_new_tokens=6), "min_new_tokens is 6 .* 5"),
    (dict(min_new_tokens=65), "min_new_tokens is 65 .* 64"),
    (dict(do_sample=True, temperature=0.0), "temperature is 0.0"),
    (dict(do_sample=True, temperature=1e-38), "temperature is 1e-38"),
    (dict(do_sample=True, temperature=float("nan")), "temperature is nan"),
    (dict(do_sample=True, temperature=float("inf")), "temperature is inf"),
    (dict(do_sample=True, temperature=-1.0), "temperature is -1.0"),
    (dict(do_sample=True, top_k=-1), "top_k is -1"),
    (dict(do_sample=True, top_p=0.0), "top_p is 0.0"),
    (dict(do_sample=True, top_p=1.1), "top_p is 1.1"),
    (dict(temperature=0.5), "temperature.* do_sample=True"),
    (dict(top_k=5), "top_k.* do_sample=True"),
    (dict(top_p=0.5), "top_p.* do_sample=True"),
    (dict(generator=torch.Generator()), "generator.* do_sample=True"),
    (dict(prefix=torch.ones(3, 2).long()), "prefix .*3 .*2 "),
    (dict(prefix=torch.ones(2).long()), r"prefix .*\(2,\)"),
    (dict(prefix=torch.ones(2, 0).long()), r"prefix .*\(2, 0\)"),
    (dict(mask=torch.ones(2, 4, 4).bool()), "mask has 3"),
    (dict(mask=torch.ones(2, 5).bool()), r"mask .*\(2, 5\)"),
]


@pytest.mark.parametrize(
    "options, message", ERRORS, ids=[message for _, message in ERRORS]
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_cannot_be(options, message, use_cache):
    with pytest.raises(ValueError, match=message):
        src = torch.full((2, 4), 5)
        generate(T5(**TINY), src, use_cache=use_cache, **options)


def test_a_prefix_that_is_not_of_ids():
    src = torch.full((1, 4), 5)
    with pytest.raises(TypeError, match="prefix .*float32"):
        generate(T5(**TINY), src, prefix=torch.ones(1, 2))
    with pytest.raises(IndexError, match="prefix .*2 to 32"):
        first_target(T5(**TINY), src, torch.tensor([[2, 32]]))


def test_a_word_streamer_prints_one_text(tokenizer):
    streamer = WordStreamer(tokenizer)
    with pytest.raises(ValueError, match="2 texts"):
        generate(T5(**TINY), torch.full((2, 4), 5), streamer=streamer)

"""Greedy and sampled generation against ``transformers``."""

from io import StringIO
from itertools import product

import pytest
import torch
from transformers import TextStreamer
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from t5_book import generation
from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.generation import (
    DecodingState,
    WordStreamer,
    filter_logits,
    generate,
)
from t5_book.inference import evaluation_view
from t5_book.tokenizer import Tokenizer
from tests.conftest import (
    FAMILIES,
    VOCAB,
    cut,
    difference,
    make_ending_writers,
    refuses,
    seeded,
    small_t5,
    sources,
    with_ids,
    write_with_reference,
)

pytestmark = pytest.mark.rounding

SAMPLED = {"do_sample": True}
PREFIX = torch.randint(2, VOCAB, (5, 4), generator=seeded(3))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """Our T5 and the reference with the same weights."""
    return make_ending_writers(request.param)


@pytest.fixture(scope="module")
def model():
    """A T5 whose texts vary and end."""
    return make_ending_writers("t5-v1_1")[0]


def assert_same(pair, *inputs, **options):
    """Ours, with and without a cache, and the reference write the same."""
    ours, reference = pair
    torch.manual_seed(5)
    theirs = write_with_reference(reference, ours, *inputs, **options)
    for use_cache in (False, True):
        torch.manual_seed(5)
        written = generate(ours, *inputs, use_cache=use_cache, **options)
        assert written.dtype == torch.int64
        assert written.tolist() == theirs.tolist(), options
    return written


# --- Agreement with transformers ------------------------------------------


def lengths(model, written, p=0):
    """How many tokens each row has, its eos included and its prefix not."""
    return [len(row) - p for row in cut(written, model.config.eos_id, skip=p)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_agrees_token_for_token(family):
    for seed in (0, 1, 2):
        pair = make_ending_writers(family, seed)
        written = assert_same(pair, *sources(), max_new_tokens=14)
        assert len(set(lengths(pair[0], written))) > 1
        assert_same(pair, sources()[0], max_new_tokens=14)


def test_every_option_agrees_token_for_token(pair):
    greedy = generate(pair[0], *sources(), max_new_tokens=14)
    assert min(lengths(pair[0], greedy)) < 11
    for p, options in [
        (0, SAMPLED | {"top_k": 0, "top_p": 1.0}),
        (0, SAMPLED | {"temperature": 1.7}),
        (0, SAMPLED | {"top_k": 3}),
        (0, SAMPLED | {"top_p": 0.7}),
        (0, SAMPLED | {"temperature": 1.4, "top_k": 12, "top_p": 0.8}),
        (0, SAMPLED | {"temperature": 0.3, "min_new_tokens": 11}),
        (0, {"min_new_tokens": 11}),
        (1, {"min_new_tokens": 5}),
        (4, {}),
        (4, SAMPLED | {"top_k": 5}),
    ]:
        prefix = {"prefix": PREFIX[:, :p]} if p else {}
        written = assert_same(pair, *sources(), **options, **prefix, max_new_tokens=14)
        assert not torch.equal(written, greedy)
        assert torch.equal(written[:, :p], PREFIX[:, :p])
        ends = lengths(pair[0], written, p)
        assert options.get("min_new_tokens", 0) < min(ends) <= 14


def test_filters_agree():
    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 40)
    logits[1, 5:] = 3.0  # ties at the border of the 7 likeliest
    logits[2, :7] = -torch.inf
    # Quarters have exact sums in binary: two of four are one half.
    logits[3, 4:] = -torch.inf
    logits[3, :4] = 0.0
    before, top_p = logits.clone(), [None, 1e-9, 0.3, 0.5, 0.9, 1.0]
    for settings in product([0.5, 1.0, 3.0], [None, 1, 7, 99], top_p):
        temperature, k, p = settings
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        if k is not None:
            theirs = TopKLogitsWarper(k)(None, theirs)
        if p is not None:
            theirs = TopPLogitsWarper(p)(None, theirs)
        ours = filter_logits(logits, temperature, k, p)
        assert torch.equal(ours, theirs), settings
        assert torch.equal(logits, before)
        assert ours.isfinite().any(dim=1).all()
    assert filter_logits(logits, top_k=7)[1].isfinite().sum() > 7
    assert filter_logits(logits, top_p=0.5)[3].isfinite().sum() == 2


# --- The cache ------------------------------------------------------------


@torch.no_grad()
def test_cached_equals_uncached_beyond_the_last_bucket(pair):
    """In pieces of 1, 1, 1, 97 and 10 tokens, then token by token.

    From a distance of 113 on, all share a bucket.
    """
    src, mask = sources(3, 20)
    tgt = sources(3, 130, seed=2)[0]
    memory = pair[0].encode(src, mask)
    slow = DecodingState(pair[0], memory, mask, use_cache=False)
    fast = DecodingState(pair[0], memory, mask)
    for t in (1, 2, 3, 100, *range(110, 131)):
        last = fast.next_logits(tgt[:, :t])
        if t in (1, 100, 110, 113, 114, 115, 128, 129, 130):
            assert difference(last, slow.next_logits(tgt[:, :t])) <= 1e-6
    assert slow.cache is None and fast.cache.length == 130


def test_each_key_is_projected_once_and_the_prefix_in_one_piece(model):
    model, read = with_ids(model), []
    block = model.decoder.blocks[0]
    for name in ("self", "cross"):

        def note(part, inputs, name=name):
            read.append((name, inputs[0].shape[1]))

        getattr(block, f"{name}_attention").v.register_forward_pre_hook(note)
    for p in (0, 1, 4):
        options = {"prefix": PREFIX[:, :p]} if p else {}
        generate(model, *sources(5, 6), max_new_tokens=9, min_new_tokens=9, **options)
        assert read == [("cross", 6), ("self", 1 + p)] + [("self", 1)] * 8
        read.clear()


def test_logits_are_float32_at_least():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, src = small_t5().to(dtype).eval(), torch.tensor([[3, 4]])
        logits = DecodingState(model, model.encode(src)).next_logits(src[:, :1])
        assert logits.shape == (1, 32)
        assert logits.dtype == torch.promote_types(dtype, torch.float32)
        assert generate(model, src).dtype == torch.int64


# --- The loop -------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Let ``generate`` write given rows, and note all that it reads."""

    def write(rows, **settings):
        read, rows = [], torch.tensor(rows)

        class Script:
            def __init__(self, model, memory, mask, use_cache, room):
                assert not memory.requires_grad

            def next_logits(self, tgt):
                assert not torch.is_grad_enabled()
                read.append(tgt.tolist())
                step = rows[:, len(read) - 1]  # [b]
                return torch.nn.functional.one_hot(step, 32).float()  # [b v]

        monkeypatch.setattr(generation, "DecodingState", Script)
        model = small_t5(start_id=9, pad_id=3)
        src = torch.full((len(rows), 4), 7)
        return generate(model, src, **settings).tolist(), read

    return write


def test_the_loop_ends_when_all_rows_are_done_and_pads(scripted):
    rows = [[5, 1, 6, 7, 8], [5, 6, 7, 1, 8], [1, 5, 6, 7, 8]]
    written, read = scripted(rows, max_new_tokens=5)
    assert written == [[5, 1, 3, 3], [5, 6, 7, 1], [1, 3, 3, 3]]
    assert len(read) == 4
    for n in (1, 2, 7):
        assert scripted([[5] * 9], max_new_tokens=n)[0] == [[5] * n]


def test_it_reads_the_start_token_the_prefix_and_its_own(scripted):
    read = scripted([[5, 6, 7, 1]], max_new_tokens=3)[1]
    assert read == [[[9]], [[9, 5]], [[9, 5, 6]]]
    prefix = torch.tensor([[4, 1, 8]], dtype=torch.int32)
    written, read = scripted([[5, 1]], prefix=prefix)
    assert read[0] == [[9, 4, 1, 8]]
    # The 1 in the prefix is eos, and ends nothing there.
    assert written == [[4, 1, 8, 5, 1]]


def test_a_generator_of_your_own(model):
    state = torch.get_rng_state()
    options = SAMPLED | dict(temperature=3.0, max_new_tokens=9)
    first, same, other = [
        generate(model, *sources(), generator=seeded(seed), **options)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_seed_gives_the_same_tokens_in_float32_and_float64(model, options):
    written = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        other = with_ids(model).to(dtype)
        written.append(generate(other, *sources(), **SAMPLED | options))
    assert torch.equal(*written)


@pytest.mark.parametrize(
    "options",
    [
        SAMPLED | {"temperature": 1e-6},
        SAMPLED | {"top_k": 1},
        SAMPLED | {"top_p": 1e-9},
        dict(temperature=1, top_k=0, top_p=1, generator=None),
    ],
    ids=str,
)
def test_each_setting_turned_down_or_neutral_is_greedy(model, options):
    greedy = generate(model, *sources())
    assert torch.equal(generate(model, *sources(), **options), greedy)


def test_dropout_is_off_and_nothing_is_left_behind():
    model = small_t5(dropout=0.5).train()
    src = sources(4, 6)[0] % 30
    first = model.generate(src, max_new_tokens=20)
    assert torch.equal(first, model.generate(src, max_new_tokens=20))
    assert model.training and model.decoder.dropout.training
    assert not first.is_inference() and not first.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    model.loss(src, first).backward()  # what it wrote can be learned from


def test_a_view_leaves_the_mode_of_every_part():
    model = small_t5().train()
    model.encoder.eval()
    before = [part.training for part in model.modules()]
    view = evaluation_view(model)
    assert not any(part.training for part in view.modules())
    assert [part.training for part in model.modules()] == before
    assert {True, False} == set(before)
    assert evaluation_view(view) is view


# --- The streamer ---------------------------------------------------------


class Recorder:
    """Notes what a streamer gets."""

    def __init__(self):
        self.calls = []

    def put(self, ids):
        self.calls.append((tuple(ids.shape), ids.tolist()))

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("options", [{}, {"prefix": PREFIX[:1]}])
def test_a_streamer_gets_what_it_gets_from_the_reference(pair, options):
    ours, theirs = Recorder(), Recorder()
    src, options = sources(1)[0], options | {"max_new_tokens": 9}
    written = generate(pair[0], src, streamer=ours, **options)
    write_with_reference(pair[1], pair[0], src, streamer=theirs, **options)
    assert ours.calls == theirs.calls
    assert ours.calls[-1] == "end" and len(ours.calls) > 2
    ids = [token for _, new in ours.calls[1:-1] for token in new]
    prefix = options.get("prefix", PREFIX[:1, :0])
    assert written[0].tolist() == prefix[0].tolist() + ids


def test_words_are_printed_as_the_reference_prints_them(capsys):
    lines = ["the cat sleeps", "the dog sleeps", "the cat is eating"] * 9
    words = Tokenizer.train(lines, vocab_size=19)  # several pieces to a word
    texts = ["the cat is sleeping", "dog", "", "the <extra_id_0> cat <extra_id_1>"]
    cases = [(words, text) for text in texts]
    # Each of these Chinese characters is three tokens.
    chinese = ["你好 the 猫", "a 狗", "two\nlines\n猫"]
    cases += [(ByteTokenizer(), text) for text in chinese]
    for tokenizer, text in cases:
        ids, printed = [0, *tokenizer.encode(text), 1], []
        for streamer in (TextStreamer(tokenizer), WordStreamer(tokenizer)):
            pieces = []
            for n, token in enumerate(ids):
                streamer.put(torch.tensor([token] if n else [[token]]))
                pieces.append(capsys.readouterr().out)
            streamer.end()
            printed.append([*pieces, capsys.readouterr().out])
        assert printed[0] == printed[1]
        assert "".join(printed[1]) == tokenizer.decode(ids) + "\n"


class Bytes:
    """A tokenizer that shows half a character as U+FFFD."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_text_without_spaces_is_printed_in_time():
    """What has been printed grows to these lengths; then the next text."""
    streamer = WordStreamer(Bytes())
    for text, expected in [
        ("猫は、ネコ。".encode(), [1, 2, 3, 4, 5, 6]),
        ("แมว".encode(), [1, 2, 3]),
        ("고양이 잔다".encode(), [4]),  # Korean has spaces
        (b"x" * 39, []),
        (b"x" * 100, [40, 80]),
        (("\N{GREEK SMALL LETTER ALPHA}" * 50 + " a b").encode(), [40, 51, 53]),
        (b"a\nb a", [2, 4]),
        (b"hi \xe7\x8c", [3]),  # never becomes a character
    ]:
        streamer.file, seen = StringIO(), [""]
        for byte in text:
            streamer.put(torch.tensor([byte]))
            if streamer.file.getvalue() != seen[-1]:
                seen.append(streamer.file.getvalue())
        streamer.end()
        whole = text.decode(errors="replace")
        assert [len(part) for part in seen[1:]] == expected, whole
        assert all(whole.startswith(part) for part in seen)
        assert streamer.file.getvalue() == whole + "\n"


# --- Errors ---------------------------------------------------------------


WRONG = {
    "max_new_tokens": [0, -3, 2.5],
    "min_new_tokens": [-1],
    "temperature": [0.0, 1e-38, float("nan"), float("inf"), -1.0],
    "top_k": [-1],
    "top_p": [0.0, 1.1],
}
ERRORS = [
    ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens is 6", 5),
    ({"min_new_tokens": 65}, "min_new_tokens is 65", 64),
    ({"temperature": 0.5}, "temperature", "do_sample=True"),
    ({"top_k": 5}, "top_k", "do_sample=True"),
    ({"top_p": 0.5}, "top_p", "do_sample=True"),
    ({"generator": seeded(0)}, "generator", "do_sample=True"),
    ({"prefix": torch.ones(3, 2).long()}, "prefix", 3, 2),
    ({"prefix": torch.ones(2).long()}, "prefix", "(2,)"),
    ({"prefix": torch.ones(2, 0).long()}, "prefix", "(2, 0)"),
    ({"mask": torch.ones(2, 4, 4).bool()}, "mask has 3"),
    ({"mask": torch.ones(2, 5).bool()}, "mask", "(2, 5)"),
    ({"streamer": WordStreamer(ByteTokenizer())}, "2 texts"),
]


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_cannot_be(use_cache):
    def call():
        generate(model, torch.full((2, 4), 5), use_cache=use_cache, **options)

    model = small_t5()
    for name, values in WRONG.items():
        for value in values:
            options = SAMPLED | {name: value}
            refuses(call, f"{name} is {value}")
    for options, *words in ERRORS:
        refuses(call, *words)
    options = {"prefix": torch.ones(2, 2)}
    refuses(call, "prefix", "float32", error=TypeError)
    options = {"prefix": torch.tensor([[2, 32]] * 2)}
    refuses(call, "prefix", "2 to 32", error=IndexError)

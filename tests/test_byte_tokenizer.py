"""Tests of t5_book.byte_tokenizer."""

import random
import re
from pydoc_data.topics import topics

import pytest
import torch
from transformers import ByT5Tokenizer

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.span_corruption import (
    corrupt_spans,
    noise_counts,
    random_spans_noise_mask,
    restore_spans,
    span_lengths,
)
from t5_book.tokenizer import Tokenizer

HELP = "\n".join(topics.values()).splitlines()
OTHERS = """Füße naïve ŁÓDŹ Ελληνικά Кошка עברית हिन्दी 雪が降る 한국어 ไทย ﬁnd
½ ① Ｔ５ ｶﾞ … “so” 🐈 👩‍🚀 🇩🇪 é\u0301 ß \U0010fffd \ufffd""".split()
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\0"]


def lines():
    """Some thousand lines: English, and words of all scripts."""
    draw = random.Random(0)
    words = sorted(set(" ".join(HELP).split())) + OTHERS * 500
    for _ in range(2000):
        mixed = draw.choices(words, k=6)
        yield "".join(w + draw.choice(SPACES) for w in mixed)
    yield from HELP[::3]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="module")
def reference():
    return ByT5Tokenizer()


# --- Agreement with transformers ------------------------------------------


def test_agrees_with_transformers(tokenizer, reference):
    count = 0
    for line in lines():
        if re.search("</?s>|<pad>|<unk>|<extra_id_", line):
            continue
        ids = tokenizer.encode(line)
        assert ids + [1] == reference(line)["input_ids"], repr(line)
        assert tokenizer.decode(ids) == line
        assert reference.decode(ids) == line
        count += 1
    assert count > 5000


def test_decodes_anything_as_transformers_does(tokenizer, reference):
    """Bytes at random are seldom text; what is not is left out."""
    draw = random.Random(1)
    for _ in range(500):
        ids = [draw.randrange(3, 248) for _ in range(20)]
        assert tokenizer.decode(ids) == reference.decode(ids)
        padded = [*ids[:10], 0, 1, 2, *ids[10:], 1, 0]
        assert tokenizer.decode(padded) == tokenizer.decode(ids)


def test_where_we_differ(tokenizer, reference):
    """Sentinels; and ``</s>`` in a text, which stays text here."""
    ours = tokenizer.encode("a<extra_id_0>b")
    assert ours == [100, 258, 101]
    assert reference("a<extra_id_0>b")["input_ids"] == [100, 259, 101, 1]
    assert reference("a </s> b")["input_ids"] == [100, 1, 101, 1]
    assert tokenizer.decode(tokenizer.encode("a </s> b")) == "a </s> b"


# --- Ids ------------------------------------------------------------------


def test_interface_is_that_of_tokenizer(tokenizer):
    other = {"train", "load", "save"}
    for name in vars(Tokenizer):
        if not name.startswith("_") and name not in other:
            assert hasattr(tokenizer, name), name


def test_sizes(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (259, 384)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert ByteTokenizer(multiple_of=1).padded_vocab_size == 259


def test_every_byte(tokenizer):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    data = text.encode()
    assert tokenizer.encode(text[:5000]) == [
        byte + 3 for byte in text[:5000].encode()
    ]
    seen = set(data)
    assert {k + 3 for k in seen}.isdisjoint(map(tokenizer.sentinel, range(11)))
    assert 247 - 3 in seen  # the twelfth would be a byte of text


def test_sentinels(tokenizer):
    assert [tokenizer.sentinel(k) for k in range(11)] == [*range(258, 247, -1)]
    names = [f"<extra_id_{k}>" for k in range(11)]
    ids = tokenizer.encode("".join(names))
    assert ids == [*range(258, 247, -1)]
    assert tokenizer.pieces(ids) == names
    assert tokenizer.decode(ids) == "".join(names)


def test_spaces_beside_a_sentinel_stay(tokenizer):
    text = "a  <extra_id_3>\n b<extra_id_4>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentinels_are_those_of_span_corruption(tokenizer):
    """t5 takes the highest id for the first one, with no extra ids."""
    text = "\n".join(HELP[100:200])
    raw, length = span_lengths(1024, mean_noise_span_length=20)
    assert (raw, length) == (1193, 189)  # byt5, README
    ids = torch.tensor([tokenizer.encode(text)[:raw]])
    options = dict(mean_noise_span_length=20)
    generator = torch.Generator().manual_seed(0)
    mask = random_spans_noise_mask(raw, generator=generator, **options)
    batch = corrupt_spans(
        ids, mask, tokenizer.sentinel(0), num_sentinels=11
    )
    spans = noise_counts(raw, **options)[1]
    assert (batch.src > 247).sum() == spans == 9
    labels = batch.labels[0].tolist()
    assert labels[0] == 258 and min(i for i in labels if i > 247) == 250
    restored = restore_spans(
        batch.src, batch.labels, tokenizer.sentinel(0), num_sentinels=11
    )
    assert restored[0][:raw] == ids[0].tolist()


def test_eos(tokenizer):
    for text in ("a", "</s>", "a <extra_id_3>", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(text, eos=False) == ids
        assert tokenizer.encode(text, eos=True) == [*ids, 1]


def test_fewer_sentinels():
    few = ByteTokenizer(extra_ids=2)
    assert few.encode("<extra_id_1>") == [257]
    with pytest.raises(ValueError, match="sentinel 2 .* 2"):
        few.encode("<extra_id_2>")
    assert few.decode([258, 256]) == "<extra_id_0>"  # 256: a byte, alone
    none = ByteTokenizer(extra_ids=0)
    assert none.decode(none.encode("<extra_id_0>")) == "<extra_id_0>"
    assert len(none.encode("<extra_id_0>")) == 12


@pytest.mark.parametrize(
    "text, ids",
    [("", []), (" ", [35]), ("<extra_id_01>", 13), ("<extra_id_x>", 12)],
)
def test_edges(tokenizer, text, ids):
    found = tokenizer.encode(text)
    assert found == ids if isinstance(ids, list) else len(found) == ids
    assert tokenizer.decode(found) == text


def test_pieces(tokenizer):
    ids = [0, 1, 2, *tokenizer.encode("a \n~\x7fé"), 258]
    assert tokenizer.pieces(ids) == [
        "<pad>", "</s>", "<unk>", "a", " ", "<0x0A>", "~", "<0x7F>",
        "<0xC3>", "<0xA9>", "<extra_id_0>",
    ]  # fmt: skip


def test_broken_text(tokenizer):
    ids = tokenizer.encode("ein 🐈!")
    assert tokenizer.decode(ids[:-2]) == "ein "
    assert tokenizer.decode(ids[:5] + [258] + ids[5:]) == "ein <extra_id_0>!"
    assert tokenizer.decode(torch.tensor(ids)) == "ein 🐈!"


# --- Errors ---------------------------------------------------------------


@pytest.mark.parametrize("extra_ids", [-1, 12, 100])
def test_too_many_sentinels(extra_ids):
    with pytest.raises(ValueError, match=f"extra_ids is {extra_ids}; .* 11"):
        ByteTokenizer(extra_ids=extra_ids)


@pytest.mark.parametrize("text", [b"a", ["a"], None, 3])
def test_encode_refuses(tokenizer, text):
    with pytest.raises(TypeError, match="one str"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", ["<extra_id_11>", "\ud800"])
def test_texts_that_have_no_ids(tokenizer, text):
    with pytest.raises(ValueError, match="sentinel 11 .* 11|surrogate"):
        tokenizer.encode(text)


@pytest.mark.parametrize("method", ["decode", "pieces"])
@pytest.mark.parametrize("wrong", [-1, 259, 383])
def test_id_out_of_range(tokenizer, method, wrong):
    with pytest.raises(ValueError, match=f"id {wrong} .* 258"):
        getattr(tokenizer, method)([5, wrong])


@pytest.mark.parametrize("ids", [[1.0], ["a"], torch.ones(2, 3).long()])
def test_decode_refuses(tokenizer, ids):
    with pytest.raises(TypeError, match="ids of one text"):
        tokenizer.decode(ids)

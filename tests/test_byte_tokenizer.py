"""ByteTokenizer, compared with ``transformers``; errors are in test_tokenizer.py."""

import random
import re

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
from tests.conftest import HELP, mixed_line, refuses, seeded

tokenizer = ByteTokenizer()
reference = ByT5Tokenizer()


def test_agrees_with_transformers():
    """Some thousand lines: English, and words of all scripts."""
    lines = [mixed_line(seed) for seed in range(2000)] + HELP[::3] + ["a\0 \x7f"]
    special = re.compile("</?s>|<pad>|<unk>|<extra_id_")
    lines = [line for line in lines if not special.search(line)]
    assert len(lines) > 5000
    for line in lines:
        ids = tokenizer.encode(line)
        assert ids + [1] == reference(line)["input_ids"], repr(line)
        assert tokenizer.decode(ids) == reference.decode(ids) == line


def test_decodes_anything_as_transformers_does():
    """Bytes at random are seldom text; what is not is left out."""
    draw = random.Random(1)
    for _ in range(500):
        ids = [draw.randrange(3, 248) for _ in range(20)]
        assert tokenizer.decode(ids) == reference.decode(ids)
        padded = [*ids[:10], 0, 1, 2, *ids[10:], 1, 0]
        assert tokenizer.decode(padded) == tokenizer.decode(ids)


def test_where_we_differ():
    """Sentinels; and ``</s>`` in a text, which stays text here."""
    assert tokenizer.encode("a<extra_id_0>b") == [100, 258, 101]
    assert reference("a<extra_id_0>b")["input_ids"] == [100, 259, 101, 1]
    assert reference("a </s> b")["input_ids"] == [100, 1, 101, 1]
    assert tokenizer.decode(tokenizer.encode("a </s> b")) == "a </s> b"


def test_sizes():
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (259, 384)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert ByteTokenizer(multiple_of=1).padded_vocab_size == 259
    for extra_ids in (-1, 12, 100):
        refuses(lambda: ByteTokenizer(extra_ids), f"extra_ids is {extra_ids};", 11)


def test_no_byte_of_a_text_is_a_sentinel():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    ids = {byte + 3 for byte in text.encode()}
    assert tokenizer.encode(text[:5000]) == [byte + 3 for byte in text[:5000].encode()]
    assert ids.isdisjoint(map(tokenizer.sentinel, range(11)))
    assert 247 in ids  # the twelfth would be a byte of text


def test_sentinels_and_pieces():
    names = [f"<extra_id_{k}>" for k in range(11)]
    ids = tokenizer.encode("".join(names))
    assert ids == [tokenizer.sentinel(k) for k in range(11)] == [*range(258, 247, -1)]
    assert tokenizer.pieces(ids) == names
    assert tokenizer.decode(ids) == "".join(names)
    pieces = tokenizer.pieces([0, 1, 2, *tokenizer.encode("a \n~\x7fé")])
    assert pieces[:7] == ["<pad>", "</s>", "<unk>", "a", " ", "<0x0A>", "~"]
    assert pieces[7:] == ["<0x7F>", "<0xC3>", "<0xA9>"]


def test_fewer_sentinels():
    few = ByteTokenizer(extra_ids=2)
    assert few.encode("<extra_id_1>") == [257]
    refuses(lambda: few.encode("<extra_id_2>"), "sentinel 2 ", "are 2")
    assert few.decode([258, 256]) == "<extra_id_0>"  # 256: a byte, alone
    none = ByteTokenizer(extra_ids=0)
    assert none.decode(none.encode("<extra_id_0>")) == "<extra_id_0>"
    assert len(none.encode("<extra_id_0>")) == 12


def test_edges():
    for text, length in [
        ("", 0),
        (" ", 1),
        ("<extra_id_01>", 13),
        ("<extra_id_x>", 12),
        ("a  <extra_id_3>\n b<extra_id_4>", 8),  # the spaces beside it stay
    ]:
        ids = tokenizer.encode(text)
        assert len(ids) == length, text
        assert tokenizer.decode(ids) == text


def test_broken_text():
    ids = tokenizer.encode("ein 🐈!")
    assert tokenizer.decode(ids[:-2]) == "ein "
    assert tokenizer.decode(ids[:5] + [258] + ids[5:]) == "ein <extra_id_0>!"
    assert tokenizer.decode(torch.tensor(ids)) == "ein 🐈!"


def test_sentinels_are_those_of_span_corruption():
    """t5 takes the highest id for the first one, with no extra ids."""
    spans_of_20 = dict(mean_noise_span_length=20)
    raw, length = span_lengths(1024, **spans_of_20)
    assert (raw, length) == (1193, 189)  # byt5, README
    ids = torch.tensor([tokenizer.encode("\n".join(HELP[100:200]))[:raw]])
    mask = random_spans_noise_mask(raw, generator=seeded(0), **spans_of_20)
    batch = corrupt_spans(ids, mask, tokenizer.sentinel(0), num_sentinels=11)
    assert noise_counts(raw, **spans_of_20)[1] == 9
    for side in (batch.src, batch.labels):
        assert side[side > 247].tolist() == [*range(258, 249, -1)]
    restored = restore_spans(*batch[::2], tokenizer.sentinel(0), num_sentinels=11)
    assert restored == ids.tolist()

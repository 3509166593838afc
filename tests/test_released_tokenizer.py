"""A released ``spiece.model``, read by ``Tokenizer.load`` and by the
``T5Tokenizer`` of ``transformers``.

No released file can be fetched here, so we train models as the authors of T5
did (unigram, normalisation nmt_nfkc, pad 0, eos 1, unk 2). ``transformers``
reads such a file with the library protobuf; a small reader takes its place.
"""

import random
import re
import struct
import unicodedata
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
from transformers import T5Tokenizer, convert_slow_tokenizer

from t5_book.pretrained import load_tokenizer
from t5_book.tokenizer import Tokenizer

HELP = "\n".join(topics.values()).splitlines()
WORDS = sorted(set(re.findall(r"\w+", " ".join(HELP))))
OTHERS = """Füße naïve Ærøskøbing ŁÓDŹ Œuvre Ελληνικά Кошка עברית العربية
हिन्दी 雪が降る 한국어 ไทย ﬁnd ﬃ ½ ① ㎏ Ｔ５ ｶﾀ ガ Ⅷ … “so” ‘so’ — – € ° ™ 🐈 👩‍🚀 🇩🇪
é é ǆ ﷺ İ ß ſ K Å""".split()
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b"]


def fields(data: bytes):
    """The fields of a protobuf message: number and value, one by one."""
    place = 0

    def number():
        nonlocal place
        value = shift = 0
        while True:
            byte, place = data[place], place + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        place += size
        yield key >> 3, data[place - size : place]


class ModelProto:
    """What ``transformers`` asks of a SentencePiece file."""

    def ParseFromString(self, data):  # noqa: N802
        self.pieces, self.trainer_spec = [], SimpleNamespace(unk_id=0)
        self.normalizer_spec = SimpleNamespace(precompiled_charsmap=b"")
        for field, value in fields(data):
            held = dict(fields(value)) if isinstance(value, bytes) else {}
            if field == 1:
                score = struct.unpack("<f", held.get(2, bytes(4)))[0]
                name, kind = held[1].decode(), held.get(3, 1)
                piece = SimpleNamespace(piece=name, score=score, type=kind)
                self.pieces.append(piece)
            elif field == 2:
                self.trainer_spec.unk_id = held[40]
            elif field == 3:
                self.normalizer_spec.precompiled_charsmap = held[2]


@pytest.fixture(scope="module", params=[1000, 2000])
def folder(request, tmp_path_factory):
    """A folder with a ``spiece.model``, as a released T5 has it."""
    folder = tmp_path_factory.mktemp("released")
    lines = HELP[::4] + OTHERS * 20
    Tokenizer.train(lines, request.param).save(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}'
    )
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.load(folder / "spiece.model")


@pytest.fixture(scope="module")
def reference(folder):
    """``transformers``' tokenizer, which has read the same file."""
    with pytest.MonkeyPatch.context() as patch:
        reader = SimpleNamespace(ModelProto=ModelProto)
        module = convert_slow_tokenizer
        patch.setattr(module, "import_protobuf", lambda: reader)
        patch.setattr(module, "requires_backends", lambda *_: None)
        made = T5Tokenizer.from_pretrained(folder)
    assert made.backend_tokenizer.normalizer is not None
    return made


def their_ids(reference, text):
    *ids, eos = reference(text)["input_ids"]
    assert eos == 1
    return ids


def unsure(text):
    """Runs of one character can be cut in ways that score the same."""
    return re.search(r"(\S)\1{2}", unicodedata.normalize("NFKC", text))


def test_sizes(ours, reference):
    assert len(reference) == ours.vocab_size
    for k in (0, 1, 98, 99):
        name = f"<extra_id_{k}>"
        assert reference.convert_tokens_to_ids(name) == ours.sentinel(k)
    assert reference.pad_token_id == ours.pad_id
    assert reference.unk_token_id == ours.unk_id


def test_help_texts(ours, reference):
    """Some thousand lines of English, with code and tables among them."""
    lines = [line for line in HELP[::2] if not unsure(line)]
    lines += [f" {line}\t" for line in lines[::7]]
    assert len(lines) > 4000
    for line in lines:
        assert ours.encode(line) == their_ids(reference, line), line


def mixture(seed, extra=()):
    """A line of words of all scripts, with all kinds of space between."""
    draw = random.Random(seed)
    words = draw.choices(WORDS, k=4) + draw.choices(OTHERS, k=3)
    words += draw.choices(extra, k=2) if extra else []
    draw.shuffle(words)
    ends = [draw.choice(["", *SPACES]) for _ in "ab"]
    inner = "".join(word + draw.choice(SPACES) for word in words)
    return ends[0] + inner.rstrip() + ends[1]


def test_all_scripts_and_spaces(ours, reference):
    lines = [line for line in map(mixture, range(2400)) if not unsure(line)]
    assert len(lines) > 1900
    for line in lines:
        assert ours.encode(line) == their_ids(reference, line), repr(line)


def test_single_characters(ours, reference):
    """Every seventh character of the basic plane, beside words."""
    codes = [*range(32, 0xD800, 7), *range(0xE000, 0x10000, 7)]
    texts = [f"a {chr(code)}b {chr(code)}" for code in codes]
    for text in texts:
        if not unsure(text):
            assert ours.encode(text) == their_ids(reference, text), text


def test_sentinels_among_all_that(ours, reference):
    """With any space before them, and an ordinary one behind."""
    names = [f"<extra_id_{k}>" for k in range(100)]
    for seed in range(500):
        line, draw = mixture(seed), random.Random(seed)
        if unsure(line):
            continue
        for name in draw.sample(names, 3):
            place = draw.choice([m.start() for m in re.finditer(r"\s", line)])
            line = f"{line[:place]}{draw.choice(SPACES[:5])}{name} {line[place:]}"
        ids = ours.encode(line)
        assert ids == their_ids(reference, line), repr(line)
        assert sum(i >= ours.sentinel(99) for i in ids) == 3


def test_load_tokenizer(folder, ours):
    loaded = load_tokenizer(folder)
    assert loaded.vocab_size == ours.vocab_size
    assert loaded.encode(HELP[7]) == ours.encode(HELP[7])
    assert load_tokenizer(str(folder)).sentinel(0) == ours.sentinel(0)


@pytest.mark.parametrize(
    "text, ours_end, their_end",
    [
        ("the <extra_id_1>.", ["."], ["▁", "."]),
        ("ｶﾞ", ["▁", "ガ"], ["カ", "<unk>"]),
        ("a \x85", ["▁", "<unk>"], ["▁a"]),
    ],
    ids=["after a sentinel", "a voiced half-width letter", "a control"],
)
def test_where_we_differ(ours, reference, text, ours_end, their_end):
    """There we are with SentencePiece itself, which read T5's training."""
    tokens = ours.pieces(ours.encode(text))
    assert tokens[-len(ours_end) :] == ours_end
    tokens = reference.convert_ids_to_tokens(their_ids(reference, text))
    assert tokens[-len(their_end) :] == their_end

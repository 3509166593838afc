"""Tokenizer and what all vocabularies share, compared with SentencePiece as seqio
extends it, and with the ``T5Tokenizer`` of ``transformers``."""

import pickle
import random
import re
import struct
import unicodedata
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import T5Tokenizer, convert_slow_tokenizer

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.pretrained import load_tokenizer
from t5_book.tokenizer import Tokenizer
from tests.conftest import HELP, OTHERS, SPACES, mixed_line, refuses

SENTINELS = "the <extra_id_0> value of <extra_id_1> it <extra_id_99>"
IDS_OF_T5 = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(HELP[::4] + OTHERS * 20, vocab_size=1000)


def train_by_hand(lines, **options) -> bytes:
    """A SentencePiece model, not trained by our code."""
    model = BytesIO()
    options |= dict(sentence_iterator=iter(lines), model_writer=model, minloglevel=3)
    SentencePieceTrainer.train(**options)
    return model.getvalue()


def seqio_proto(tokenizer: Tokenizer) -> bytes:
    """The model as seqio extends it, the records written independently."""
    records = []
    for k in range(tokenizer.extra_ids - 1, -1, -1):
        name = f"▁<extra_id_{k}>".encode()
        body = struct.pack("BB", 0x0A, len(name)) + name
        body += struct.pack("<Bf", 0x15, 0.0) + struct.pack("BB", 0x18, 4)
        records.append(struct.pack("BB", 0x0A, len(body)) + body)
    return tokenizer.model_proto + b"".join(records)


# --- Sizes and special ids --------------------------------------------------


def test_sizes_and_special_ids(tokenizer):
    proto = tokenizer.model_proto
    record = b"\x0a\x10\x0a\x07%s\x15\x00\x00\x00\x00\x18\x01"
    filler = [record % f"w{k:06}".encode() for k in range(32000 - 1000)]
    released = Tokenizer(proto + b"".join(filler))
    for made, size, padded in [
        (tokenizer, 1100, 1152),
        (Tokenizer(proto, extra_ids=24), 1024, 1024),
        (Tokenizer(proto, 0, multiple_of=1), 1000, 1000),
        (released, 32100, 32128),
    ]:
        assert (made.vocab_size, made.padded_vocab_size) == (size, padded)
        assert made.pieces([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
        assert (made.pad_id, made.eos_id, made.unk_id) == (0, 1, 2)
        sentinels = [made.sentinel(k) for k in range(made.extra_ids)]
        assert sentinels == [size - 1 - k for k in range(made.extra_ids)]
        names = [f"▁<extra_id_{k}>" for k in range(made.extra_ids)]
        assert made.pieces(sentinels) == names


# --- Encode and decode ------------------------------------------------------


def test_round_trip(tokenizer):
    for line in filter(str.isascii, HELP):
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == " ".join(line.split())
        assert tokenizer.unk_id not in ids
    ids = tokenizer.encode(SENTINELS)
    assert [k for k in ids if k >= 1000] == [1099, 1098, 1000]
    for shown in (ids, torch.tensor(ids), [0, *ids, 1, 0, 0]):
        assert tokenizer.decode(shown) == SENTINELS
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    assert tokenizer.decode([]) == ""
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(SENTINELS) == ids


def test_eos(tokenizer):
    """Only on request, once, and never for what looks like it in a text."""
    for made in (tokenizer, ByteTokenizer()):
        for text in ("the value", "the <extra_id_0> it <extra_id_9>", "", "the </s>"):
            ids = made.encode(text)
            assert made.eos_id not in ids
            assert made.encode(text, eos=False) == ids
            assert made.encode(text, eos=True) == [*ids, 1]


def test_as_seqio(tokenizer):
    """Spaces before a sentinel stay, too, where a model keeps them."""
    options = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    exact = Tokenizer(train_by_hand(HELP[::4], vocab_size=500, **IDS_OF_T5, **options))
    for made in (tokenizer, exact):
        theirs = SentencePieceProcessor(model_proto=seqio_proto(made))
        for text in [
            SENTINELS,
            "<extra_id_0> the",
            "the <extra_id_1>.",
            "the <extra_id_1>ly",
            "the  <extra_id_1>   value",
            "  <extra_id_1> value",
            "the\t <extra_id_1> value",
            "the <extra_id_1> <extra_id_2>",
            "the <extra_id_> <extra_id_x> <extra_id_01>",
            "the\x85 <extra_id_1>",
            "the ﬁrst\tvalue\n",
        ]:
            ids = theirs.encode(text)
            assert made.encode(text) == ids, text
            assert made.decode(ids) == theirs.decode(ids), text
    assert exact.encode("the\t<extra_id_1>")[-1] == exact.sentinel(1)


def test_names_of_sentinels_in_a_text(tokenizer):
    """Inside a word, where seqio spells them out, ours finds them."""
    ids = tokenizer.encode("the<extra_id_7><extra_id_8>y")
    the, y = tokenizer.encode("the"), tokenizer.encode("<extra_id_0>y")[1:]
    assert ids == [*the, 1092, 1091, *y]
    # Without sentinels, their names are text like any other.
    bare = Tokenizer(tokenizer.model_proto, extra_ids=0)
    assert bare.decode(bare.encode("a <extra_id_0>")) == "a <extra_id_0>"
    assert len(bare.encode("<extra_id_0>")) > 5


# --- Training ---------------------------------------------------------------


def test_training_does_not_depend_on_threads(tokenizer):
    """What SentencePiece learns depends on their number: ours is one."""
    options = dict(character_coverage=1.0, num_threads=1, **IDS_OF_T5)
    proto = train_by_hand(HELP[::4] + OTHERS * 20, vocab_size=1000, **options)
    alone = SentencePieceProcessor(model_proto=proto)
    names = alone.id_to_piece(list(range(1000)))
    assert tokenizer.pieces(range(1000)) == names


def test_long_lines_and_rare_characters_are_learnt():
    """SentencePiece leaves out lines above 4,192 bytes and rare letters, unless told."""
    line = "the quick brown fox jumps over the lazy dog " * 200
    trained = Tokenizer.train(iter([line, "Ω"]), vocab_size=32)
    assert trained.unk_id not in trained.encode("quick fox Ω")


def test_words():
    lines = ["the cat sees a dog", "a dog sees the cat", "the cat"]
    words = Tokenizer.train(lines, 8, model_type="word", extra_ids=10)
    ids = words.encode("the cat <extra_id_0> a <extra_id_1> zebra")
    names = ["▁the", "▁cat", "▁<extra_id_0>", "▁a", "▁<extra_id_1>", "<unk>"]
    assert words.pieces(ids) == names and words.vocab_size == 18
    assert words.decode(ids[:5]) == "the cat <extra_id_0> a <extra_id_1>"


@pytest.mark.parametrize(
    "size, bound, model_type",
    [(32000, "at most", "unigram"), (32000, "at most", "word"), (10, "at least", "unigram")],
)
def test_a_size_that_does_not_fit(size, bound, model_type):
    """The message names the nearest size that works."""
    lines = HELP[:60]

    def train(size):
        return Tokenizer.train(lines, size, model_type=model_type)

    message = refuses(lambda: train(size), size, bound)
    limit = int(re.search(rf"{bound} (\d+)", message)[1])
    assert train(limit).vocab_size == limit + 100
    beyond = limit + (1 if limit < size else -1)
    refuses(lambda: train(beyond), beyond, f"{bound} {limit}")


# --- Files ------------------------------------------------------------------


@pytest.mark.parametrize("extra_ids", [0, 1, 10, 99, 100, 101, 300])
def test_save_and_load(tokenizer, tmp_path, extra_ids):
    path = tmp_path / "spiece.model"
    path.write_bytes(b"old")
    before = Tokenizer(tokenizer.model_proto, extra_ids)
    before.save(path)
    assert list(tmp_path.iterdir()) == [path]
    # What the file says counts, whatever the caller takes for granted.
    for after in (Tokenizer.load(str(path)), Tokenizer.load(path, extra_ids=100)):
        assert after.extra_ids == extra_ids
        assert after.vocab_size == 1000 + extra_ids
        assert after.model_proto == before.model_proto
        assert after.encode("a <extra_id_0>") == before.encode("a <extra_id_0>")
    after.save(path)
    assert Tokenizer.load(path).extra_ids == extra_ids
    # Released ones, such as T5's and UMT5's, don't say it.
    path.write_bytes(tokenizer.model_proto)
    assert Tokenizer.load(path).extra_ids == 100
    assert Tokenizer.load(path, extra_ids).extra_ids == extra_ids
    before.save(path)
    # To SentencePiece and seqio it is a file with pieces alone.
    theirs = SentencePieceProcessor(model_file=str(path))
    assert len(theirs) == 1000 and b"<extra_id" not in path.read_bytes()
    for line in HELP[:200]:
        assert theirs.encode(line) == tokenizer.encode(line)
    rest = path.read_bytes().removeprefix(tokenizer.model_proto)
    like_seqio = SentencePieceProcessor(model_proto=seqio_proto(tokenizer) + rest)
    assert like_seqio.encode(SENTINELS) == tokenizer.encode(SENTINELS)


@pytest.mark.parametrize("extra_ids", [0, 30, 100])
def test_a_file_with_sentinels_keeps_them(tokenizer, tmp_path, extra_ids):
    """mT5's has its 100, and its configuration asks for none on top."""
    own = Tokenizer(seqio_proto(tokenizer), extra_ids)
    assert own.vocab_size == 1100
    assert own.extra_ids == 100 and own.sentinel(99) == 1000
    for text in (SENTINELS, "hippo<extra_id_7>", *HELP[:50]):
        assert own.encode(text) == tokenizer.encode(text)
        assert own.decode(own.encode(text)) == tokenizer.decode(own.encode(text))
    # A file such as mT5's, but with another number.
    path = tmp_path / "spiece.model"
    own = Tokenizer(seqio_proto(Tokenizer(tokenizer.model_proto, 7)), min(extra_ids, 7))
    own.save(path)
    again = Tokenizer.load(path)
    assert again.extra_ids == 7
    assert again.encode("the <extra_id_6>") == own.encode("the <extra_id_6>")


def test_save_is_atomic(tokenizer, tmp_path, monkeypatch):
    """A write that fails half way leaves the old file as it was."""
    path = tmp_path / "spiece.model"
    path.write_bytes(b"old")
    other = tmp_path / "the same file"
    other.hardlink_to(path)
    tokenizer.save(path)  # a new file takes the name; the old one isn't written to
    assert other.read_bytes() == b"old"
    other.replace(path)
    write = Path.write_bytes

    def fail(self, data):
        write(self, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    refuses(lambda: tokenizer.save(path), "no space left", error=OSError)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- Agreement with transformers --------------------------------------------


class ModelProto:
    """What ``transformers`` asks of a SentencePiece file, without protobuf."""

    def ParseFromString(self, data):  # noqa: N802
        bare = SentencePieceProcessor(model_proto=data)
        self.pieces = [
            SimpleNamespace(piece=bare.id_to_piece(k), score=bare.get_score(k), type=1)
            for k in range(len(bare))
        ]
        self.trainer_spec = SimpleNamespace(unk_id=bare.unk_id())
        # The rules of normalisation are the last field of the file; before them
        # stands their length in three bytes.
        rules = data.split(b"nmt_nfkc\x12", 1)[1][3:]
        self.normalizer_spec = SimpleNamespace(precompiled_charsmap=rules)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A folder as a released T5 has it.

    No released file can be fetched here, so ours is trained as the authors of
    T5 did: unigram, normalisation nmt_nfkc, pad 0, eos 1, unk 2.
    """
    folder = tmp_path_factory.mktemp("released")
    tokenizer.save(folder / "spiece.model")
    config = '{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}'
    (folder / "tokenizer_config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """The tokenizer of ``transformers``, which has read the same file."""
    with pytest.MonkeyPatch.context() as patch:
        module, reader = convert_slow_tokenizer, SimpleNamespace(ModelProto=ModelProto)
        patch.setattr(module, "import_protobuf", lambda: reader)
        patch.setattr(module, "requires_backends", lambda *_: None)
        made = T5Tokenizer.from_pretrained(folder)
    assert made.backend_tokenizer.normalizer is not None
    return made


def their_ids(reference, text):
    """The ids of the reference, without the eos that it appends."""
    *ids, eos = reference(text)["input_ids"]
    assert eos == 1
    return ids


def sure(lines):
    """Without runs of one character: their cuts may score the same."""
    normal = ((line, unicodedata.normalize("NFKC", line)) for line in lines)
    return [line for line, text in normal if not re.search(r"(\S)\1{2}", text)]


def test_agrees_with_transformers(tokenizer, reference, folder):
    """Thousands of lines of English, of all scripts and spaces, and every seventh
    character of the basic plane, beside words."""
    codes = [*range(32, 0xD800, 7), *range(0xE000, 0x10000, 7)]
    lines = HELP[::2] + [f" {line}\t" for line in HELP[::14]]
    lines += [mixed_line(seed) for seed in range(2400)]
    lines += [f"a {chr(code)}b {chr(code)}" for code in codes]
    lines = sure(lines)
    assert len(lines) > 15_000
    loaded = load_tokenizer(folder)
    for number, line in enumerate(lines):
        ids = their_ids(reference, line)
        assert tokenizer.encode(line) == ids, repr(line)
        assert number % 50 or loaded.encode(line) == ids
    assert len(reference) == tokenizer.vocab_size
    assert (reference.pad_token_id, reference.unk_token_id) == (0, 2)


def test_sentinels_agree_with_transformers(tokenizer, reference):
    """With any space before them, and an ordinary one behind."""
    names = [f"<extra_id_{k}>" for k in range(100)]
    ids = [tokenizer.sentinel(k) for k in range(100)]
    assert reference.convert_tokens_to_ids(names) == ids
    for seed, line in enumerate(sure(mixed_line(seed) for seed in range(500))):
        draw = random.Random(seed)
        for name in draw.sample(names, 3):
            place = draw.choice([m.start() for m in re.finditer(r"\s", line)])
            line = f"{line[:place]}{draw.choice(SPACES[:5])}{name} {line[place:]}"
        ids = tokenizer.encode(line)
        assert ids == their_ids(reference, line), repr(line)
        assert sum(i >= tokenizer.sentinel(99) for i in ids) == 3


@pytest.mark.parametrize(
    "text, ours_end, their_end",
    [
        ("the <extra_id_1>.", ["."], ["▁", "."]),
        ("ｶﾞ", ["▁", "ガ"], ["カ", "<unk>"]),
        ("a \x85", ["▁", "<unk>"], ["▁a"]),
        ("a</s>", ["s", ">"], ["</s>"]),
    ],
    ids=["after a sentinel", "a voiced half-width letter", "a control", "an eos"],
)
def test_where_we_differ(tokenizer, reference, text, ours_end, their_end):
    """There we are with SentencePiece itself, which read T5's training."""
    tokens = tokenizer.pieces(tokenizer.encode(text))
    assert tokens[-len(ours_end) :] == ours_end
    tokens = reference.convert_ids_to_tokens(their_ids(reference, text))
    assert tokens[-len(their_end) :] == their_end


# --- Errors -----------------------------------------------------------------


def test_train_refuses():
    train = Tokenizer.train
    for model_type in ("unigram", "word"):
        for lines in ([], [""], ["  ", "\t\n"], iter([])):
            refuses(lambda: train(lines, 100, model_type=model_type), "single token")
    refuses(lambda: train("one text", 20), "splitlines", error=TypeError)
    refuses(lambda: train([3], 20), "str")
    refuses(lambda: train(["a b"], 5, model_type="sentence"), "sentence")
    # The name of a sentinel in the corpus is no sentinel on top.
    lines = ["the <extra_id_0> sees <extra_id_0>", "the cat sees"]
    refuses(lambda: train(lines, 7, model_type="word", extra_ids=10), "0 sent", "not 10")


def test_what_is_no_model(tokenizer, tmp_path):
    path = tmp_path / "spiece.model"
    for data in (b"", b"no model", b"\x0a\x03abc"):
        path.write_bytes(data)
        refuses(lambda: Tokenizer.load(path), path.name, f" {len(data)} bytes")
        refuses(lambda: Tokenizer(data, 0), f" {len(data)} bytes")
    missing = tmp_path / "nowhere.model"
    refuses(lambda: Tokenizer.load(missing), "nowhere", error=FileNotFoundError)
    refuses(lambda: Tokenizer("spiece.model"), "str", "load", error=TypeError)
    proto = train_by_hand(["a b c a b c"], vocab_size=8, hard_vocab_limit=False)
    refuses(lambda: Tokenizer(proto), "(-1, 2, 0)", "(0, 1, 2)")
    refuses(lambda: Tokenizer(seqio_proto(tokenizer), 101), "100 sentinels", "101")
    proto = tokenizer.model_proto
    # A number in a damaged file must not fill the memory.
    for extra_ids in (-1, 10**7):
        refuses(lambda: Tokenizer(proto, extra_ids), "extra_ids", extra_ids)
    for multiple_of in (0, -128):
        refuses(lambda: Tokenizer(proto, multiple_of=multiple_of), "multiple_of", multiple_of)


@pytest.mark.parametrize("kind", [Tokenizer, ByteTokenizer])
def test_texts_and_ids_that_are_refused(tokenizer, kind):
    made = tokenizer if kind is Tokenizer else ByteTokenizer()
    for text in (["a", "b"], b"a", None, 3):
        refuses(lambda: made.encode(text), type(text).__name__, "one str", error=TypeError)
    # Python has texts with half a surrogate pair, but they are no characters.
    for half in ("\ud83d", "\udc08", "\udc08\ud83d", "\ud800", "\udfff"):
        refuses(lambda: made.encode(f"the {half}"), "4", "surrogate")
    assert len(made.encode("\ud7ff \ue000 \U0001f408")) >= 5
    number = made.extra_ids
    for k in (-1, number):
        refuses(lambda: made.sentinel(k), f"sentinel {k} ", number)
    refuses(lambda: made.encode(f"the <extra_id_{number}>"), f"sentinel {number} ")
    refuses(lambda: made.encode("the <extra_id_9000>"), "sentinel 9000 ")
    top = made.vocab_size - 1
    for method in (made.decode, made.pieces):
        for wrong in (-100, -1, top + 1, made.padded_vocab_size - 1):
            refuses(lambda: method([3, wrong]), f"id {wrong} ", top)
        for ids in ([1.0], ["the"], torch.ones(3), torch.ones(2, 3).long()):
            refuses(lambda: method(ids), "one text", error=TypeError)

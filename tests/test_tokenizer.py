"""Tests of t5_book.vocabulary and t5_book.tokenizer."""

import pickle
import re
import struct
from io import BytesIO
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import T5Tokenizer

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.tokenizer import Tokenizer
from t5_book.vocabulary import Vocabulary

LINES = "\n".join(list(topics.values())[::4]).splitlines()
SENTINELS = "the <extra_id_0> value of <extra_id_1> it <extra_id_99>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, vocab_size=500)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    lines = ["the cat sees a dog", "a dog sees the cat", "the cat"]
    return Tokenizer.train(lines, 8, model_type="word", extra_ids=10)


@pytest.fixture(scope="module")
def reference(tokenizer) -> T5Tokenizer:
    """The tokenizer of transformers with the same pieces and scores."""
    bare = SentencePieceProcessor(model_proto=tokenizer.model_proto)
    vocab = [
        (bare.id_to_piece(k), bare.get_score(k)) for k in range(len(bare))
    ]
    vocab += [(f"<extra_id_{k}>", 0.0) for k in reversed(range(100))]
    return T5Tokenizer(vocab=vocab)


def reference_ids(reference: T5Tokenizer, text: str) -> list[int]:
    """The ids of the reference, without the eos that it appends."""
    *ids, eos = reference(text)["input_ids"]
    assert eos == Tokenizer.eos_id
    return ids


def seqio_processor(tokenizer: Tokenizer) -> SentencePieceProcessor:
    """The model as seqio extends it, the records written independently."""
    records = []
    for k in range(tokenizer.extra_ids - 1, -1, -1):
        name = f"▁<extra_id_{k}>".encode()
        body = struct.pack("BB", 0x0A, len(name)) + name
        body += struct.pack("<Bf", 0x15, 0.0) + struct.pack("BB", 0x18, 4)
        records.append(struct.pack("BB", 0x0A, len(body)) + body)
    proto = tokenizer.model_proto + b"".join(records)
    return SentencePieceProcessor(model_proto=proto)


# --- Sizes and special ids --------------------------------------------------


def test_sizes_and_special_ids(tokenizer):
    assert tokenizer.vocab_size == 600
    assert tokenizer.padded_vocab_size == 640
    assert tokenizer.pieces([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "pieces, extra_ids, multiple_of, padded",
    [(500, 100, 128, 640), (500, 12, 128, 512), (500, 0, 1, 500)],
)
def test_padded_size(tokenizer, pieces, extra_ids, multiple_of, padded):
    sized = Tokenizer(tokenizer.model_proto, extra_ids, multiple_of)
    assert sized.vocab_size == pieces + extra_ids
    assert sized.padded_vocab_size == padded


@pytest.mark.parametrize("multiple_of", [0, -128])
def test_padded_size_refuses(tokenizer, multiple_of):
    with pytest.raises(ValueError, match=f"multiple_of is {multiple_of}"):
        Tokenizer(tokenizer.model_proto, multiple_of=multiple_of)


def test_both_tokenizers_are_vocabularies(tokenizer):
    """Nothing of the plan is written twice, or borrowed."""
    shared = {name for name in vars(Vocabulary) if not name.startswith("__")}
    assert {"sentinel", "padded_vocab_size", "check_ids", "pad_id"} <= shared
    for cls in (Tokenizer, ByteTokenizer):
        assert issubclass(cls, Vocabulary)
        assert not shared & set(vars(cls))


def test_t5_sizes(tokenizer):
    """32,000 pieces, 32,100 ids, 32,128 rows, as in the released models."""
    record = b"\x0a\x10\x0a\x07%s\x15\x00\x00\x00\x00\x18\x01"
    filler = [record % f"w{k:06}".encode() for k in range(32000 - 500)]
    full = Tokenizer(tokenizer.model_proto + b"".join(filler))
    assert full.vocab_size == 32100 and full.padded_vocab_size == 32128
    assert full.sentinel(0) == 32099 and full.sentinel(99) == 32000


def test_sentinels_count_down_from_the_top(tokenizer):
    ids = [tokenizer.sentinel(k) for k in range(100)]
    assert ids == list(range(599, 499, -1))
    names = [f"▁<extra_id_{k}>" for k in range(100)]
    assert tokenizer.pieces(ids) == names


# --- Encode and decode ------------------------------------------------------


def test_round_trip(tokenizer):
    for line in filter(str.isascii, LINES):
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == " ".join(line.split())
        assert tokenizer.unk_id not in ids


def test_round_trip_with_sentinels(tokenizer):
    ids = tokenizer.encode(SENTINELS)
    assert [k for k in ids if k >= 500] == [599, 598, 500]
    assert tokenizer.decode(ids) == SENTINELS
    assert tokenizer.decode(torch.tensor(ids)) == SENTINELS


def test_pad_and_eos_do_not_show(tokenizer):
    ids = [0, *tokenizer.encode("the value"), 1, 0, 0]
    assert tokenizer.decode(ids) == "the value"


def test_nothing_encodes_to_nothing(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    assert tokenizer.decode([]) == ""


def test_eos(tokenizer):
    """Only on request, once, and never for what looks like it in a text."""
    assert tokenizer.eos_id not in tokenizer.encode("the value</s>")
    for text in ("the value", SENTINELS, "", "the </s>"):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(text, eos=False) == ids
        assert tokenizer.encode(text, eos=True) == [*ids, 1]


@pytest.mark.parametrize(
    "text",
    [
        SENTINELS,
        "<extra_id_0> the",
        "the <extra_id_1>.",
        "the <extra_id_1>ly",
        "the  <extra_id_1>   value",
        "the <extra_id_1> <extra_id_2>",
        "the <extra_id_> <extra_id_x> <extra_id_01>",
        "the\x85 <extra_id_1>",
        "the ﬁrst\tvalue\n",
    ],
)
def test_as_seqio(tokenizer, text):
    theirs = seqio_processor(tokenizer)
    assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.decode(theirs.encode(text)) == theirs.decode(
        theirs.encode(text)
    )


def test_spaces_stay_where_a_model_keeps_them():
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=500,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=3,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue())
    for before in ("", "  ", "the ", "the  ", "the\t ", "\x85 "):
        text = f"{before}<extra_id_1> value"
        theirs = seqio_processor(tokenizer).encode(text)
        assert tokenizer.encode(text) == theirs
    assert tokenizer.encode("the\t<extra_id_1>")[-1] == tokenizer.sentinel(1)


def test_sentinel_inside_a_word(tokenizer):
    """Where seqio spells the sentinel out, ours finds it."""
    ids = tokenizer.encode("the<extra_id_7><extra_id_8>y")
    the, y = tokenizer.encode("the"), tokenizer.encode("<extra_id_0>y")[1:]
    assert ids == [*the, 592, 591, *y]


def test_no_sentinels(tokenizer):
    """Without sentinels, their names are text like any other."""
    bare = Tokenizer(tokenizer.model_proto, extra_ids=0)
    assert bare.decode(bare.encode("a <extra_id_0>")) == "a <extra_id_0>"
    assert len(bare.encode("<extra_id_0>")) > 5


# --- Training ---------------------------------------------------------------


@pytest.mark.parametrize("extra_ids", [0, 30, 100])
def test_a_file_with_sentinels_keeps_them(tokenizer, extra_ids):
    """mT5's has its 100, and its configuration asks for none on top."""
    proto = seqio_processor(tokenizer).serialized_model_proto()
    own = Tokenizer(proto, extra_ids)
    assert own.vocab_size == tokenizer.vocab_size
    assert own.extra_ids == 100 and own.sentinel(99) == own.vocab_size - 100
    for text in (SENTINELS, "hippo<extra_id_7>", *LINES[:50]):
        assert own.encode(text) == tokenizer.encode(text)
        assert own.decode(own.encode(text)) == tokenizer.decode(own.encode(text))


def test_too_few_sentinels_in_the_file(tokenizer):
    proto = seqio_processor(tokenizer).serialized_model_proto()
    with pytest.raises(ValueError, match="100 sentinels .* not 101"):
        Tokenizer(proto, 101)
    lines = ["the <extra_id_0> sees <extra_id_0>", "the cat sees"]
    with pytest.raises(ValueError, match="0 sentinels .* not 10"):
        Tokenizer.train(lines, 7, model_type="word", extra_ids=10)


def test_training_is_repeatable():
    first, second = [Tokenizer.train(iter(LINES[:500]), 200) for _ in "ab"]
    assert first.model_proto == second.model_proto


def test_training_does_not_depend_on_threads(tokenizer):
    """What SentencePiece learns depends on their number: ours is one."""
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=500,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=3,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    alone = SentencePieceProcessor(model_proto=model.getvalue())
    names = alone.id_to_piece(list(range(500)))
    assert tokenizer.pieces(range(500)) == names


def test_long_lines_are_not_dropped():
    """SentencePiece leaves out lines above 4,192 bytes unless told."""
    line = "the quick brown fox jumps over the lazy dog " * 200
    trained = Tokenizer.train([line], vocab_size=30)
    assert trained.unk_id not in trained.encode("quick fox")


def test_rare_characters_are_known():
    """At SentencePiece's own coverage of 0.9995, Ω would be unknown."""
    trained = Tokenizer.train(["some words and more"] * 500 + ["Ω"], 14)
    assert trained.unk_id not in trained.encode("Ω")


def test_words(words):
    ids = words.encode("the cat <extra_id_0> a <extra_id_1> zebra")
    assert words.pieces(ids[:2]) == ["▁the", "▁cat"]
    assert ids[2:] == [
        words.sentinel(0),
        *words.encode("a"),
        words.sentinel(1),
        words.unk_id,
    ]
    assert words.vocab_size == 18
    assert words.decode(ids[:5]) == "the cat <extra_id_0> a <extra_id_1>"


# --- Files ------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(b"old")
    tokenizer.save(path)
    again = Tokenizer.load(str(path))
    assert again.encode(SENTINELS) == tokenizer.encode(SENTINELS)
    assert list(tmp_path.iterdir()) == [path]
    assert b"extra_id" not in path.read_bytes()
    assert len(SentencePieceProcessor(model_file=str(path))) == 500


@pytest.mark.parametrize("extra_ids", [0, 1, 10, 99, 101, 300])
def test_save_keeps_the_number_of_sentinels(tokenizer, tmp_path, extra_ids):
    path = tmp_path / "spiece.model"
    before = Tokenizer(tokenizer.model_proto, extra_ids)
    before.save(path)
    after = Tokenizer.load(path)
    assert after.extra_ids == extra_ids
    assert after.vocab_size == before.vocab_size == 500 + extra_ids
    assert after.model_proto == before.model_proto
    assert after.encode("a <extra_id_0>") == before.encode("a <extra_id_0>")
    # What the file says counts, whatever the caller takes for granted.
    assert Tokenizer.load(path, extra_ids=100).extra_ids == extra_ids
    after.save(path)
    assert Tokenizer.load(path).extra_ids == extra_ids


@pytest.mark.parametrize("extra_ids", [0, 10, 300])
def test_other_programs_read_what_is_saved(tokenizer, tmp_path, extra_ids):
    """To SentencePiece and seqio it is a file with pieces alone."""
    path = tmp_path / "spiece.model"
    Tokenizer(tokenizer.model_proto, extra_ids).save(path)
    theirs = SentencePieceProcessor(model_file=str(path))
    assert len(theirs) == 500
    for line in LINES[:200]:
        assert theirs.encode(line) == tokenizer.encode(line)
    like_seqio = SentencePieceProcessor(
        model_proto=seqio_processor(tokenizer).serialized_model_proto()
        + path.read_bytes()[len(tokenizer.model_proto) :]
    )
    assert len(like_seqio) == 600
    assert like_seqio.encode(SENTINELS) == tokenizer.encode(SENTINELS)


def test_a_released_file_has_100_sentinels(tokenizer, tmp_path):
    """It doesn't say how many; the caller may."""
    path = tmp_path / "spiece.model"
    path.write_bytes(tokenizer.model_proto)
    assert Tokenizer.load(path).extra_ids == 100
    assert Tokenizer.load(path, extra_ids=300).extra_ids == 300  # UMT5


def test_save_with_sentinels_in_the_file(tokenizer, tmp_path):
    """A file such as mT5's, but with another number."""
    path = tmp_path / "spiece.model"
    few = Tokenizer(tokenizer.model_proto, 7)
    proto = seqio_processor(few).serialized_model_proto()
    own = Tokenizer(proto, 7)
    own.save(path)
    assert Tokenizer.load(path).encode(SENTINELS[:20]) == own.encode(SENTINELS[:20])
    assert Tokenizer.load(path).extra_ids == 7


def test_save_is_atomic(tokenizer, tmp_path, monkeypatch):
    """A write that fails half way leaves the old file as it was."""
    path = tmp_path / "spiece.model"
    path.write_bytes(b"old")
    write = Path.write_bytes

    def fail(self, data):
        write(self, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_pickle(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(SENTINELS) == tokenizer.encode(SENTINELS)


# --- Agreement with transformers --------------------------------------------


def test_agrees_with_transformers(tokenizer, reference):
    """Equal ids; runs of one character may be cut in ways that score equal."""
    assert len(reference) == tokenizer.vocab_size
    for line in filter(str.isascii, LINES):
        if not re.search(r"([^\s])\1{3}", line):
            assert tokenizer.encode(line) == reference_ids(reference, line)


def test_sentinels_agree_with_transformers(tokenizer, reference):
    ids = reference_ids(reference, SENTINELS)
    assert tokenizer.encode(SENTINELS) == ids
    for k in (0, 1, 99):
        name = f"<extra_id_{k}>"
        assert reference.convert_tokens_to_ids(name) == tokenizer.sentinel(k)


def test_known_differences_from_transformers(tokenizer, reference):
    """The two rows of the chapter's table."""
    text = "the <extra_id_1>."
    ours, theirs = tokenizer.encode(text), reference_ids(reference, text)
    names = ["▁the", "▁<extra_id_1>", "."]
    assert tokenizer.pieces(ours) == names
    assert tokenizer.pieces(theirs) == [*names[:2], "▁", "."]
    assert tokenizer.eos_id in reference_ids(reference, "a</s>b")
    assert tokenizer.eos_id not in tokenizer.encode("a</s>b")


# --- Errors -----------------------------------------------------------------


@pytest.mark.parametrize("lines", [[], [""], ["  ", "\t\n"], iter([])])
@pytest.mark.parametrize("model_type", ["unigram", "word"])
def test_text_without_a_token(lines, model_type):
    with pytest.raises(ValueError, match="not a single token"):
        Tokenizer.train(lines, 100, model_type=model_type)


@pytest.mark.parametrize("model_type", ["unigram", "word"])
def test_vocabulary_too_large(model_type):
    """The message names the largest size, and that size works."""
    lines = LINES[:60]
    with pytest.raises(ValueError, match="32000 is too large") as caught:
        Tokenizer.train(lines, 32000, model_type=model_type)
    limit = int(re.search(r"at most (\d+)", str(caught.value))[1])
    trained = Tokenizer.train(lines, limit, model_type=model_type)
    assert trained.vocab_size == limit + 100
    with pytest.raises(ValueError, match=f"{limit + 1} is too large"):
        Tokenizer.train(lines, limit + 1, model_type=model_type)


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="10 is too small") as caught:
        Tokenizer.train(["the quick brown fox"], 10)
    assert isinstance(caught.value.__cause__, RuntimeError)  # SentencePiece's
    limit = int(re.search(r"at least (\d+)", str(caught.value))[1])
    trained = Tokenizer.train(["the quick brown fox"], limit)
    assert trained.vocab_size == limit + 100


def test_train_refuses_one_text():
    with pytest.raises(TypeError, match="splitlines"):
        Tokenizer.train("one text", 20)


def test_train_refuses_other_lines():
    with pytest.raises(ValueError, match="must return str"):
        Tokenizer.train([3], 20)


def test_train_refuses_unknown_model_type():
    with pytest.raises(ValueError, match="sentence"):
        Tokenizer.train(["a b"], 5, model_type="sentence")


@pytest.mark.parametrize("data", [b"", b"no model", b"\x0a\x03abc"])
def test_not_a_model(data, tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    message = f"{path.name}.* {len(data)} bytes"
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(path)


@pytest.mark.parametrize("extra_ids", [0, 100])
def test_empty_model(extra_ids):
    with pytest.raises(ValueError, match="0 bytes"):
        Tokenizer(b"", extra_ids)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere.model")


def test_model_with_other_special_ids():
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c a b c"]),
        model_writer=model,
        vocab_size=8,
        minloglevel=3,
        hard_vocab_limit=False,
    )
    with pytest.raises(ValueError, match=r"\(-1, 2, 0\); T5 needs \(0, 1, 2\)"):
        Tokenizer(model.getvalue())


def test_model_proto_of_wrong_type():
    with pytest.raises(TypeError, match="str.*Tokenizer.load"):
        Tokenizer("spiece.model")


@pytest.mark.parametrize("text", [["a", "b"], b"a", None, 3])
def test_encode_refuses(tokenizer, text):
    with pytest.raises(TypeError, match=f"{type(text).__name__}.* one str"):
        tokenizer.encode(text)


@pytest.mark.parametrize("half", ["\ud83d", "\udc08", "\udc08\ud83d"])
def test_half_a_surrogate_pair(tokenizer, half):
    """Python has such texts, but they are no characters."""
    with pytest.raises(ValueError, match="4 .*surrogate"):
        tokenizer.encode(f"the {half}")
    assert tokenizer.encode("the \U0001f408")[-1] == tokenizer.unk_id


@pytest.mark.parametrize("extra_ids", [-1, 10**7])
def test_impossible_number_of_sentinels(tokenizer, extra_ids):
    """A number in a damaged file must not fill the memory."""
    with pytest.raises(ValueError, match=f"extra_ids is {extra_ids}"):
        Tokenizer(tokenizer.model_proto, extra_ids)


@pytest.mark.parametrize("k", [-1, 100])
def test_sentinel_out_of_range(tokenizer, k):
    with pytest.raises(ValueError, match=f"sentinel {k} .* 100"):
        tokenizer.sentinel(k)


def test_sentinel_out_of_range_in_text(tokenizer):
    with pytest.raises(ValueError, match="sentinel 100 .* 100"):
        tokenizer.encode("the <extra_id_100>")


@pytest.mark.parametrize("wrong", [-100, -1, 600, 639])
@pytest.mark.parametrize("method", ["decode", "pieces"])
def test_id_out_of_range(tokenizer, method, wrong):
    with pytest.raises(ValueError, match=f"id {wrong} .* 599"):
        getattr(tokenizer, method)([3, wrong])


@pytest.mark.parametrize(
    "ids", [[1.0], ["the"], torch.ones(3), torch.ones(2, 3).long()]
)
def test_decode_refuses(tokenizer, ids):
    with pytest.raises(TypeError, match="ids of one text"):
        tokenizer.decode(ids)

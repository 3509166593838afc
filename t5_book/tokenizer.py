"""Text to token ids and back: SentencePiece, with T5's sentinels on top.

Built in chapter 2, "Turn text into tokens" (chapters/tokenizer.md). Edit
the chapter, not this file.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

__all__ = ["Tokenizer"]

_USER_DEFINED = 4  # the kind of a piece that is never cut


def _piece_record(piece: str, score: float, kind: int) -> bytes:
    """Write one piece as it stands in a SentencePiece file.

    Each field begins with a byte for its number and type; texts and
    records give their length, below 128, in the byte after it.
    """
    text = piece.encode()
    record = b"\x0a" + bytes([len(text)]) + text
    record += b"\x15" + struct.pack("<f", score)
    record += b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(record)]) + record


def _load_processor(
    model_proto: bytes, extra_ids: int
) -> SentencePieceProcessor:
    """Load a SentencePiece model with its sentinels, the first on top."""
    own = "▁<extra_id_0>".encode() in model_proto  # as in mT5's file
    added = [] if own else reversed(range(extra_ids))
    names = [f"▁<extra_id_{k}>" for k in added]
    records = [_piece_record(name, 0.0, _USER_DEFINED) for name in names]
    processor = SentencePieceProcessor()
    try:
        proto = model_proto + b"".join(records)
        processor.load_from_serialized_proto(proto)
    except RuntimeError as error:
        raise ValueError(
            f"these {len(model_proto)} bytes are not a SentencePiece model "
            f"that can take {extra_ids} sentinels: {error}"
        ) from None
    ids = processor.pad_id(), processor.eos_id(), processor.unk_id()
    if ids != (0, 1, 2):
        raise ValueError(f"pad, eos, unk are {ids}; T5 needs (0, 1, 2)")
    return processor


def _count_sentinels(processor: SentencePieceProcessor) -> int:
    """The number of sentinels at the end of the vocabulary."""
    downwards = map(processor.id_to_piece, reversed(range(len(processor))))
    pieces = enumerate(downwards)
    return next(k for k, p in pieces if p != f"▁<extra_id_{k}>")


class Tokenizer:
    """Turn text into token ids, and ids into text, as T5 does.

    Args:
        model_proto: the bytes of a SentencePiece model with pad 0, eos 1
            and unk 2. ``train`` and ``load`` make or read one.
        extra_ids: sentinels on top, default 100; mT5's model has its own.
        multiple_of: what ``padded_vocab_size`` is a multiple of.

    Raises:
        TypeError: if ``model_proto`` is not ``bytes``.
        ValueError: if it is no such model.

    Built in chapter 2, "Turn text into tokens" (paper, section 3.1.3;
    sentinels as in seqio, ``vocabularies.py``).
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2

    def __init__(
        self, model_proto: bytes, extra_ids: int = 100,
        multiple_of: int = 128,
    ):
        if not isinstance(model_proto, bytes):
            wrong = type(model_proto)
            raise TypeError(f"pass bytes, not {wrong}; see Tokenizer.load")
        self.model_proto = model_proto
        self.multiple_of = multiple_of
        self._processor = _load_processor(model_proto, extra_ids)
        self.extra_ids = found = _count_sentinels(self._processor)
        if found < extra_ids:
            wrong = f"but {found} sentinels on top, not {extra_ids}"
            raise ValueError(f"the model has <extra_id_0> in it, {wrong}")

    @classmethod
    def train(
        cls, lines: Iterable[str], vocab_size: int,
        model_type: str = "unigram", extra_ids: int = 100,
    ) -> "Tokenizer":
        """Learn a vocabulary from text.

        Args:
            lines: the corpus, in any portions.
            vocab_size: number of pieces, the three special ones
                included and the sentinels not (T5: 32000).
            model_type: "unigram" (T5), or "word": what stands between
                spaces is a token, the most frequent words first.
            extra_ids: number of sentinels.

        Raises:
            TypeError: if ``lines`` is one ``str``.
            ValueError: if the text has no token, or if ``vocab_size``
                does not fit it; the message says what would.
        """
        if isinstance(lines, str):
            raise TypeError("lines is one str; pass text.splitlines()")
        model_proto = _train_model(lines, vocab_size, model_type)
        return cls(model_proto, extra_ids)

    @property
    def vocab_size(self) -> int:
        """Number of ids in use: pieces and sentinels."""
        return self._processor.get_piece_size()

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up: the rows of an embedding table."""
        return -(-self.vocab_size // self.multiple_of) * self.multiple_of

    def sentinel(self, k: int) -> int:
        """Return the id of ``<extra_id_k>``; number 0 is the highest id.

        Raises:
            ValueError: if there is no sentinel ``k``.
        """
        if not 0 <= k < self.extra_ids:
            known = f"there are {self.extra_ids}, counted from 0"
            raise ValueError(f"sentinel {k} is out of range: {known}")
        return self.vocab_size - 1 - k

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids, without the eos.

        ``<extra_id_k>`` becomes the id of that sentinel. In a tokenizer
        with ``model_type="word"``, put a space after it, too.

        Raises:
            TypeError: if ``text`` is not one ``str``.
            ValueError: if the text has a sentinel out of range.
        """
        if not isinstance(text, str):
            raise TypeError(f"{type(text)} is no text; pass one str")
        if self.extra_ids:
            for k in re.findall(_SENTINEL, text):
                self.sentinel(int(k))  # which must exist
            text = re.sub(f"(?<=[^ ]){_SENTINEL}", r" \g<0>", text)
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text; sentinels show, pad and eos do not.

        Args:
            ids: the ids of one text: a list, or a tensor with one axis.

        Raises:
            TypeError: if an id is not an integer.
            ValueError: if an id is out of range.
        """
        return self._processor.decode(self._check_ids(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id; arguments as for ``decode``."""
        return self._processor.id_to_piece(self._check_ids(ids))

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        """Make a list of ids that are all in the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for token_id in ids:
            if not isinstance(token_id, int):
                wrong = f"an id is {type(token_id)}"
                raise TypeError(f"{wrong}; pass the ids of one text")
            if not 0 <= token_id < self.vocab_size:
                known = f"the ids are 0 to {self.vocab_size - 1}"
                raise ValueError(f"id {token_id} is out of range: {known}")
        return ids

    @classmethod
    def load(cls, path: str | Path, extra_ids: int = 100) -> "Tokenizer":
        """Read a SentencePiece file, such as a released spiece.model.

        Raises:
            ValueError: if the file is no such model.
        """
        try:
            return cls(Path(path).read_bytes(), extra_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a SentencePiece file, whole or not at all."""
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_bytes(self.model_proto)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _train_model(lines: Iterable[str], size: int, kind: str) -> bytes:
    """Train SentencePiece; return the bytes of the model."""
    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type=kind,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,  # no bos
            character_coverage=1.0,
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), size)) from None
    return model.getvalue()


def _explain(error: str, size: int) -> str:
    """Say in our words why SentencePiece did not train."""
    if re.search(r"sentences_\.empty|all_chars_count", error):
        return "the text to train on has not a single token"
    if found := re.search(r"too high .* <= (\d+)", error):
        limit = f"pass at most {found[1]}, or more text"
        return f"vocab_size={size} is too large for this text; {limit}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", error):
        limit = f"its characters need at least {found[1]}"
        return f"vocab_size={size} is too small for this text; {limit}"
    return f"SentencePiece could not train: {error}"


_SENTINEL = r"<extra_id_(0|[1-9][0-9]*)>"

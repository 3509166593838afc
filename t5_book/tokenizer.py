"""Text to token ids and back: SentencePiece, with T5's sentinels on top.

Built in chapter 2, "Subword tokenization: SentencePiece and T5's sentinels"
(chapters/tokenizer.md). Edit the chapter, not this file.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from t5_book.vocabulary import SENTINEL, Vocabulary

__all__ = ["Tokenizer"]

_USER_DEFINED = 4  # the kind of a piece that is never cut


def _piece_record(piece: str, score: float, kind: int) -> bytes:
    """Write one piece as it stands in a SentencePiece file.

    Each field begins with a byte that says which field it is and how it
    is written. Texts and records have their length in the byte after it.
    """
    text = piece.encode()
    # Above that, the length of the record would take two bytes.
    if len(text) > 118:
        raise ValueError(f"{piece!r} has {len(text)} bytes; at most 118 fit")
    record = b"\x0a" + bytes([len(text)]) + text  # field 1: the text
    record += b"\x15" + struct.pack("<f", score)  # field 2: the score
    record += b"\x18" + bytes([kind])  # field 3: the kind
    return b"\x0a" + bytes([len(record)]) + record


def _load_processor(model_proto: bytes, extra_ids: int) -> SentencePieceProcessor:
    """Load a SentencePiece model with its sentinels, the first on top."""
    records = []
    if "▁<extra_id_0>".encode() not in model_proto:  # as it is in mT5's
        for k in reversed(range(extra_ids)):
            name = f"▁<extra_id_{k}>"
            records.append(_piece_record(name, 0.0, _USER_DEFINED))
    processor = SentencePieceProcessor()
    try:
        proto = model_proto + b"".join(records)
        processor.load_from_serialized_proto(proto)
    except RuntimeError as error:
        raise ValueError(
            f"these {len(model_proto)} bytes are not a SentencePiece model "
            f"that can take {extra_ids} sentinels: {error}"
        ) from error
    ids = processor.pad_id(), processor.eos_id(), processor.unk_id()
    if ids != (0, 1, 2):
        raise ValueError(f"pad, eos, unk are {ids}; T5 needs (0, 1, 2)")
    return processor


def _count_sentinels(processor: SentencePieceProcessor) -> int:
    """The number of sentinels at the end of the vocabulary."""
    count = 0
    top = len(processor) - 1
    while processor.id_to_piece(top - count) == f"▁<extra_id_{count}>":
        count += 1
    return count


class Tokenizer(Vocabulary):
    """Turn text into token ids, and ids into text, as T5 does.

    Args:
        model_proto: the bytes of a SentencePiece model with pad 0, eos 1
            and unk 2. ``train`` and ``load`` make or read one.
        extra_ids: number of sentinels on top, default 100. A model that
            has its own, as mT5's, keeps those.
        multiple_of: what ``padded_vocab_size`` is a multiple of.

    Raises:
        TypeError: if ``model_proto`` is not ``bytes``.
        ValueError: if it is no such model, or if it has sentinels of its
            own and fewer than ``extra_ids``.

    Source: paper, section 3.1.3; seqio, ``vocabularies.py``.
    """

    def __init__(
        self,
        model_proto: bytes,
        extra_ids: int = 100,
        multiple_of: int = 128,
    ):
        if not isinstance(model_proto, bytes):
            raise TypeError(f"pass bytes, not {type(model_proto)}; see Tokenizer.load")
        # A number from a damaged file must not fill the memory.
        if not 0 <= extra_ids <= 10_000:
            raise ValueError(f"extra_ids is {extra_ids}; pass 0 to 10000")
        self.model_proto = model_proto
        self._processor = _load_processor(model_proto, extra_ids)
        found = _count_sentinels(self._processor)
        if found < extra_ids:
            raise ValueError(
                "the model has <extra_id_0> in it, but "
                f"{found} sentinels on top, not {extra_ids}"
            )
        super().__init__(self._processor.get_piece_size(), found, multiple_of)

    @classmethod
    def train(
        cls,
        lines: Iterable[str],
        vocab_size: int,
        model_type: str = "unigram",
        extra_ids: int = 100,
    ) -> "Tokenizer":
        """Learn a vocabulary from text.

        Args:
            lines: the corpus, in any portions.
            vocab_size: number of pieces, the three special ones included and
                the sentinels not (T5: 32000).
            model_type: "unigram" (T5), or "word": what stands between spaces
                is a token, the most frequent words first.
            extra_ids: number of sentinels.

        Raises:
            TypeError: if ``lines`` is one ``str``.
            ValueError: if the text has no token, or if ``vocab_size`` does not
                fit it; the message says what would.
        """
        if isinstance(lines, str):
            raise TypeError("lines is one str; pass text.splitlines()")
        model_proto = _train_model(lines, vocab_size, model_type)
        return cls(model_proto, extra_ids)

    def encode(self, text: str, eos: bool = False) -> list[int]:
        """Turn a text into token ids.

        ``<extra_id_k>`` becomes the id of that sentinel. In a tokenizer with
        ``model_type="word"``, put a space after it, too.

        Args:
            text: the text.
            eos: whether to end with the eos, as the model's sources and
                targets do.

        Raises:
            TypeError: if ``text`` is not one ``str``.
            ValueError: if the text has a sentinel out of range, or half of a
                surrogate pair.
        """
        self.check_text(text)
        if self.extra_ids:
            text = _GLUED.sub(r" \g<0>", text)
        ids = self._processor.encode(text)
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text; sentinels show, pad and eos do not.

        Args:
            ids: the ids of one text: a list, or a tensor with one axis.

        Raises:
            TypeError: if an id is not an integer.
            ValueError: if an id is out of range.
        """
        return self._processor.decode(self.check_ids(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id; arguments as for ``decode``."""
        return self._processor.id_to_piece(self.check_ids(ids))

    @classmethod
    def load(cls, path: str | Path, extra_ids: int = 100) -> "Tokenizer":
        """Read a SentencePiece file, such as a released spiece.model.

        Args:
            path: the file.
            extra_ids: number of sentinels for a file that does not say how
                many it has. Released ones do not; ``save`` writes it down
                if it is not 100.

        Raises:
            ValueError: if the file is no such model.
        """
        model_proto, saved = _split_extra_ids(Path(path).read_bytes())
        try:
            return cls(model_proto, extra_ids if saved is None else saved)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a SentencePiece file, whole or not at all.

        The file has the pieces without the sentinels, and a record with their
        number if that is not 100.
        """
        data = self.model_proto
        if self.extra_ids != 100:
            data += _extra_ids_record(self.extra_ids)
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _train_model(lines: Iterable[str], size: int, model_type: str) -> bytes:
    """Train SentencePiece; return the bytes of the model."""
    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,  # T5 has no token for the beginning
            character_coverage=1.0,
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), size)) from error
    return model.getvalue()


# A sentinel that has no space before it.
_GLUED = re.compile(r"(?<=[^ ])" + SENTINEL.pattern)
# Field 200 of the file, after which a length and a text follow.
_EXTRA_IDS = b"\xc2\x0c"


def _extra_ids_record(extra_ids: int) -> bytes:
    """The number of sentinels as a record that SentencePiece skips."""
    text = f"extra_ids={extra_ids}".encode()
    return _EXTRA_IDS + bytes([len(text)]) + text


def _split_extra_ids(data: bytes) -> tuple[bytes, int | None]:
    """Split the bytes of a file into the model and its record, if any."""
    found = re.search(_EXTRA_IDS + rb".extra_ids=(\d+)\Z", data, re.DOTALL)
    if found is None:
        return data, None
    return data[: found.start()], int(found[1])


def _explain(error: str, size: int) -> str:
    """Say in our words why SentencePiece did not train."""
    if "sentences_.empty" in error or "all_chars_count" in error:
        return "the text to train on has not a single token"
    most = re.search(r"too high .* <= (\d+)", error)
    if most:
        return (
            f"vocab_size={size} is too large for this text; pass at most "
            f"{most[1]}, or more text"
        )
    least = re.search(r"required_chars\. \d+ vs (\d+)", error)
    if least:
        return (
            f"vocab_size={size} is too small for this text; its characters "
            f"need at least {least[1]}"
        )
    return f"SentencePiece could not train: {error}"

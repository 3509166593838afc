"""Text to bytes and back: the tokenizer of ByT5.

Built in chapter 14, "ByT5: bytes instead of subwords"
(chapters/byte_tokenizer.md). Edit the chapter, not this file.
"""

from collections.abc import Sequence

from t5_book.vocabulary import SENTINEL, Vocabulary

__all__ = ["ByteTokenizer"]


class ByteTokenizer(Vocabulary):
    """Turn text into the ids of its bytes, and ids into text, as ByT5 does.

    The methods are those of ``Tokenizer``, less ``train``, ``load`` and
    ``save``. A byte's id is its number plus 3, and sentinel ``k`` has the
    id ``258 - k``, as in ByT5's training.

    Args:
        extra_ids: number of sentinels; default 11, the number of bytes at
            the top that no text has. Fewer will do.
        multiple_of: what ``padded_vocab_size`` is a multiple of.

    Raises:
        ValueError: if there are more sentinels than free bytes.

    Source: Xue et al. 2022, section 3.1; seqio, ``vocabularies.py``;
    sentinels as t5's ``preprocessors.py`` counts them.
    """

    vocab_size = 259  # the three special ids, and 256 bytes

    def __init__(self, extra_ids: int = 11, multiple_of: int = 128):
        if not 0 <= extra_ids <= 11:
            raise ValueError(
                f"extra_ids is {extra_ids}; pass 0 to 11: the bytes below "
                "the 11 highest stand in texts"
            )
        super().__init__(self.vocab_size, extra_ids, multiple_of)

    def encode(self, text: str, eos: bool = False) -> list[int]:
        """Turn a text into token ids.

        ``<extra_id_k>`` becomes the id of that sentinel; spaces beside it
        stay.

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
        parts = SENTINEL.split(text) if self.extra_ids else [text]
        ids = []
        for place, part in enumerate(parts):
            if place % 2 == 1:  # the number of a sentinel
                ids.append(self.sentinel(int(part)))
            else:
                ids.extend(byte + 3 for byte in part.encode())
        return ids + [self.eos_id] if eos else ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id; arguments as for ``decode``."""
        return [self._piece(i) for i in self.check_ids(ids)]

    def _is_sentinel(self, i: int) -> bool:
        return i >= self.vocab_size - self.extra_ids

    def _piece(self, i: int) -> str:
        if i <= self.unk_id:
            return ("<pad>", "</s>", "<unk>")[i]
        if self._is_sentinel(i):
            return f"<extra_id_{self.vocab_size - 1 - i}>"
        byte = i - 3
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; sentinels show, pad, eos and unk do not.

        Bytes that are no UTF-8 are left out.

        Args:
            ids: the ids of one text: a list, or a tensor with one axis.

        Raises:
            TypeError: if an id is not an integer.
            ValueError: if an id is out of range.
        """
        # A bytearray grows in place; bytes would be copied for every id.
        text = bytearray()
        for i in self.check_ids(ids):
            if self._is_sentinel(i):
                text += self._piece(i).encode()
            elif i > self.unk_id:
                text.append(i - 3)
        return text.decode(errors="ignore")

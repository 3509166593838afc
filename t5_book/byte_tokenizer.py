"""Text to bytes and back: the tokenizer of ByT5.

Built in chapter 14, "Read bytes instead of words"
(chapters/byte_tokenizer.md). Edit the chapter, not this file.
"""

import re
from collections.abc import Sequence

from t5_book.tokenizer import Tokenizer

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
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

    Built in chapter 14, "Read bytes instead of words" (Xue et al. 2021;
    seqio, ``vocabularies.py``; sentinels as t5's ``preprocessors.py``
    counts them).
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2
    vocab_size = 259  # the three above, and 256 bytes
    padded_vocab_size = Tokenizer.padded_vocab_size
    sentinel = Tokenizer.sentinel
    _check_ids = Tokenizer._check_ids

    def __init__(self, extra_ids: int = 11, multiple_of: int = 128):
        if not 0 <= extra_ids <= 11:
            raise ValueError(
                f"extra_ids is {extra_ids}; pass 0 to 11: the bytes below "
                "the 11 highest stand in texts"
            )
        self.extra_ids = extra_ids
        self.multiple_of = multiple_of

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids, without the eos.

        ``<extra_id_k>`` becomes the id of that sentinel; spaces beside it
        stay.

        Raises:
            TypeError: if ``text`` is not one ``str``.
            ValueError: if the text has a sentinel out of range, or half
                of a surrogate pair, which UTF-8 has no bytes for.
        """
        if not isinstance(text, str):
            raise TypeError(f"{type(text)} is no text; pass one str")
        parts = _SENTINEL.split(text) if self.extra_ids else [text]
        ids = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(self.sentinel(int(part)))
            else:
                ids.extend(byte + 3 for byte in part.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; sentinels show, pad, eos and unk do not.

        Bytes that are no UTF-8 are left out.

        Args:
            ids: the ids of one text: a list, or a tensor with one axis.

        Raises:
            TypeError: if an id is not an integer.
            ValueError: if an id is out of range.
        """
        text = b""
        for i in self._check_ids(ids):
            if self._is_sentinel(i):
                text += self._name(i).encode()
            elif i > self.unk_id:
                text += bytes([i - 3])
        return text.decode(errors="ignore")

    def _is_sentinel(self, i: int) -> bool:
        return i >= self.vocab_size - self.extra_ids

    def _name(self, i: int) -> str:
        return f"<extra_id_{self.vocab_size - 1 - i}>"

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id; arguments as for ``decode``."""
        return [self._piece(i) for i in self._check_ids(ids)]

    def _piece(self, i: int) -> str:
        if i <= self.unk_id:
            return ("<pad>", "</s>", "<unk>")[i]
        if self._is_sentinel(i):
            return self._name(i)
        byte = i - 3
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"


_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]*)>")

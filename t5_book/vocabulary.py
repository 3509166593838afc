"""The ids that all tokenizers of T5 have in common.

Built in chapter 2, "Subword tokenization: SentencePiece and T5's sentinels"
(chapters/tokenizer.md). Edit the chapter, not this file.
"""

import math
import re
from collections.abc import Sequence

__all__ = []

# The name of a sentinel in a text. Its number has no leading zeros.
SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]*)>")


class Vocabulary:
    """The plan of a vocabulary: three special ids first, sentinels last.

    The base class of ``Tokenizer`` and ``ByteTokenizer``, which add
    ``encode``, ``decode`` and ``pieces``.

    Args:
        vocab_size: number of ids in use, the sentinels included.
        extra_ids: number of sentinels.
        multiple_of: what ``padded_vocab_size`` is a multiple of.

    Raises:
        ValueError: if ``multiple_of`` is less than 1.

    Source: seqio, ``vocabularies.py``; the padding as in
    mesh-tensorflow, ``transformer/transformer.py``.
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2

    def __init__(self, vocab_size: int, extra_ids: int, multiple_of: int = 128):
        if multiple_of < 1:
            raise ValueError(f"multiple_of is {multiple_of}; pass at least 1")
        self.vocab_size = vocab_size
        self.extra_ids = extra_ids
        self.multiple_of = multiple_of

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up: the rows of an embedding table."""
        return math.ceil(self.vocab_size / self.multiple_of) * self.multiple_of

    def sentinel(self, k: int) -> int:
        """Return the id of ``<extra_id_k>``; number 0 has the highest id.

        Raises:
            ValueError: if there is no sentinel ``k``.
        """
        if not 0 <= k < self.extra_ids:
            raise ValueError(
                f"sentinel {k} is out of range: there are {self.extra_ids}, "
                "counted from 0"
            )
        return self.vocab_size - 1 - k

    def check_text(self, text: str) -> None:
        """Make sure that a text can be encoded.

        Raises:
            TypeError: if it is not one ``str``.
            ValueError: if it has a sentinel that does not exist, or half of a
                surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise TypeError(f"{type(text)} is no text; pass one str")
        half = re.search(r"[\ud800-\udfff]", text)
        if half:
            raise ValueError(
                f"character {half.start()} of the text is {half[0]!r}, half of a "
                "surrogate pair; read the text with its right encoding, or leave "
                "such halves out: text.encode(errors='ignore').decode()"
            )
        if self.extra_ids:
            for k in SENTINEL.findall(text):
                self.sentinel(int(k))

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """Make a list of ids that are all in the vocabulary.

        Raises:
            TypeError: if an id is not an integer.
            ValueError: if an id is out of range.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for token_id in ids:
            if not isinstance(token_id, int):
                raise TypeError(f"an id is {type(token_id)}; pass the ids of one text")
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"id {token_id} is out of range: the ids are 0 to "
                    f"{self.vocab_size - 1}"
                )
        return ids

"""Pre-training objectives: ways to make a source and a target of a text.

Built in chapter 16, "Other objectives, and packing"
(chapters/objectives.md). Edit the chapter, not this file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from t5_book.batches import Batch, pad_rows
from t5_book.checks import check_ids
from t5_book.span_corruption import corrupt_spans, random_spans_noise_mask

__all__ = [
    "SpecialIds",
    "bert_denoising",
    "deshuffling",
    "iid_denoising",
    "prefix_lm",
    "span_denoising",
    "ul2_denoising",
]


class SpecialIds(NamedTuple):
    """The ids of a vocabulary that aren't words.

    ``SpecialIds.of(tokenizer)`` reads them from a tokenizer. Words have ids
    from 3 to below the sentinels.
    """

    first_sentinel: int  # id of <extra_id_0>; the others lie below it
    num_sentinels: int = 100
    eos_id: int = 1
    pad_id: int = 0

    @classmethod
    def of(cls, tokenizer) -> "SpecialIds":
        """Read them from a ``Tokenizer`` or a ``ByteTokenizer``.

        Raises:
            ValueError: if the tokenizer has no sentinels.
        """
        return cls(
            tokenizer.sentinel(0),
            tokenizer.extra_ids,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )

    @property
    def words_end(self) -> int:
        """The lowest sentinel: ids of words are smaller."""
        return self.first_sentinel - self.num_sentinels + 1


def span_denoising(
    tokens: Tensor,
    ids: SpecialIds,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    *,
    generator: Generator | None = None,
) -> Batch:
    """Hide spans of ``tokens [b l]`` and ask for them: T5's own objective.

    Raises:
        ValueError: as ``noise_counts``, or if sentinels run out.

    Source: paper, section 3.3.4.
    """
    check_ids("text", tokens, ids.words_end)
    noise = random_spans_noise_mask(
        tokens.shape[1],
        noise_density,
        mean_noise_span_length,
        batch=len(tokens),
        generator=generator,
    )  # [b l]
    return corrupt_spans(tokens, noise, **ids._asdict())


def iid_denoising(
    tokens: Tensor,
    ids: SpecialIds,
    noise_density: float = 0.15,
    *,
    generator: Generator | None = None,
) -> Batch:
    """Hide single tokens of ``tokens [b l]`` and ask for them.

    Raises:
        ValueError: if ``noise_density`` is no share, or if a text has more
            gaps than there are sentinels.

    Source: paper, section 3.1.4, the baseline.
    """
    check_ids("text", tokens, ids.words_end)
    noise = _by_chance(tokens.shape, noise_density, generator)
    return corrupt_spans(tokens, noise, **ids._asdict())


def _by_chance(shape, share, generator):
    """True at each place with a probability of ``share``."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the tokens is {share}; pass 0 to 1")
    return torch.rand(shape, generator=generator) < share


Rule = Callable[[Tensor, Tensor], Tensor]


def denoise(
    tokens: Tensor, noise: Tensor, ids: SpecialIds, source: Rule, target: Rule
) -> Batch:
    """Make a source and a target of each text and its noise.

    Args:
        tokens: ids of words ``[b l]``.
        noise: bool ``[b l]``, True where a token is noise.
        ids: of the vocabulary.
        source: takes one text ``[l]`` and its noise ``[l]``, and returns the
            source without eos, of any length.
        target: the same for the target.

    Source: t5, ``preprocessors.py``, ``single_example_denoise``.
    """
    eos = torch.tensor([ids.eos_id])
    sources, targets = [], []
    for row, hidden in zip(tokens.long(), noise, strict=True):
        sources.append(torch.cat([source(row, hidden), eos]))
        targets.append(torch.cat([target(row, hidden), eos]))
    src, mask = pad_rows(sources, ids.pad_id)
    labels, _ = pad_rows(targets, -100)
    return Batch(src, mask, labels)


def keep_all(tokens: Tensor, noise: Tensor) -> Tensor:
    """A rule: the whole text."""
    return tokens


def keep_noise(tokens: Tensor, noise: Tensor) -> Tensor:
    """A rule: only the noise."""
    return tokens[noise]


def drop_noise(tokens: Tensor, noise: Tensor) -> Tensor:
    """A rule: all but the noise."""
    return tokens[~noise]


def bert_denoising(
    tokens: Tensor,
    ids: SpecialIds,
    noise_density: float = 0.15,
    random_share: float = 0.1,
    *,
    generator: Generator | None = None,
) -> Batch:
    """Mask or replace single tokens, and ask for the whole text.

    Args:
        tokens: ids of words ``[b l]``.
        ids: of the vocabulary.
        noise_density: probability of a token to be noise; default 0.15.
        random_share: share of the noise that becomes a random word (ids from
            3 to below the sentinels); the rest becomes ``<extra_id_0>``.
            Default 0.1; 0 is the paper's MASS-style objective.
        generator: where the random numbers come from; default: torch's.

    Raises:
        ValueError: if one of the two numbers is no share.

    Source: paper, section 3.3.1.
    """
    check_ids("text", tokens, ids.words_end)

    def mask_or_replace(text, noise):
        replaced = _by_chance(text.shape, random_share, generator)
        word = torch.randint(3, ids.words_end, text.shape, generator=generator)
        return torch.where(noise, word.where(replaced, ids.first_sentinel), text)

    noise = _by_chance(tokens.shape, noise_density, generator)
    return denoise(tokens, noise, ids, source=mask_or_replace, target=keep_all)


def prefix_lm(
    tokens: Tensor, ids: SpecialIds, *, generator: Generator | None = None
) -> Batch:
    """Give a beginning of ``tokens [b l]``, and ask for the rest.

    Raises:
        ValueError: if a text has less than 2 tokens.

    Source: paper, section 3.3.1; t5, ``random_prefix_noise_mask``.
    """
    check_ids("text", tokens, ids.words_end)
    b, length = tokens.shape
    if length < 2:
        raise ValueError("a text of 1 token can't be cut; pass 2 or more")
    cuts = torch.randint(1, length, (b, 1), generator=generator)
    noise = torch.arange(length) < cuts  # [b l]
    return denoise(tokens, noise, ids, source=keep_noise, target=drop_noise)


def deshuffling(
    tokens: Tensor, ids: SpecialIds, *, generator: Generator | None = None
) -> Batch:
    """Shuffle each row of ``tokens [b l]``, and ask for the order.

    Source: paper, section 3.3.1; t5, ``permute_noise_tokens``.
    """
    check_ids("text", tokens, ids.words_end)

    def shuffle_noise(text, noise):
        order = torch.randperm(int(noise.sum()), generator=generator)
        return text.masked_scatter(noise, text[noise][order])

    everything = torch.ones_like(tokens, dtype=torch.bool)
    return denoise(tokens, everything, ids, source=shuffle_noise, target=keep_all)


class Denoiser(NamedTuple):
    """One of UL2's ways to hide spans."""

    mode: str
    mean_span: float | None  # in tokens; None: a quarter of the text
    density: float


UL2 = (
    Denoiser("R", 3, 0.15),
    Denoiser("R", 8, 0.15),
    Denoiser("S", None, 0.25),
    Denoiser("X", 3, 0.5),
    Denoiser("X", 8, 0.5),
    Denoiser("X", 64, 0.15),
    Denoiser("X", 64, 0.5),
)


def ul2_denoising(
    tokens: Tensor,
    ids: SpecialIds,
    modes: Mapping[str, Sequence[int]],
    *,
    generator: Generator | None = None,
) -> Batch:
    """Ask each text by one of UL2's seven denoisers, all equally likely.

    Args:
        tokens: ids of words ``[b l]``, ``l`` 2 or more.
        ids: of the vocabulary.
        modes: the ids that begin the source, by "R", "S" and "X": those of
            ``[NLU]``, ``[S2S]`` and ``[NLG]``.
        generator: where the random numbers come from; default: torch's.

    Raises:
        KeyError: if one of the three modes is missing.
        ValueError: if sentinels run out (100 serve texts of 602 tokens).

    Source: Tay et al. 2022, table 1.
    """
    check_ids("text", tokens, ids.words_end)
    starts = {mode: torch.tensor(modes[mode]) for mode in "RSX"}
    b, length = tokens.shape
    which = torch.randint(len(UL2), (b,), generator=generator)
    noise = torch.empty(b, length, dtype=torch.bool)
    for i, (_, mean_span, density) in enumerate(UL2):
        rows = which == i  # [b]
        noise[rows] = random_spans_noise_mask(
            length,
            density,
            mean_span or max(length / 4, 1),
            batch=int(rows.sum()),
            generator=generator,
        )
    src, mask, labels = corrupt_spans(tokens, noise, **ids._asdict())
    sources = []
    for i, row, real in zip(which.tolist(), src, mask):
        sources.append(torch.cat([starts[UL2[i].mode], row[real]]))
    src, mask = pad_rows(sources, ids.pad_id)
    return Batch(src, mask, labels)

"""A corpus as a stream: texts read, tokenized, joined and corrupted on the fly.

Built in chapter 17, "Streaming a corpus: text that fits in no memory"
(chapters/corpus.md). Edit the chapter, not this file.
"""

import copy
import glob
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from t5_book.batches import Batch
from t5_book.checks import check_integer
from t5_book.span_corruption import (
    corrupt_spans,
    random_spans_noise_mask,
    span_lengths,
)
from t5_book.vocabulary import Vocabulary

__all__ = ["CorpusBatches", "stream_texts"]

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def stream_texts(
    source: str | Path | Sequence[str | Path],
    *,
    subset: str | None = None,
    split: str = "train",
    column: str = "text",
):
    """Open a corpus without reading it.

    Args:
        source: files here, as a path, a pattern such as ``"c4/*.json.gz"`` or a
            list of these: ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` (a text
            in each line), compressed or not. Or the name of a dataset on the hub,
            such as ``"allenai/c4"``.
        subset: which part of a dataset on the hub, such as ``"en"``.
        split: which split of a dataset on the hub; default ``"train"``.
        column: where the texts are; default ``"text"``.

    Returns:
        A ``datasets.IterableDataset`` with this column alone.

    Raises:
        ImportError: if ``datasets`` is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if a file's ending says nothing, or if the column is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            "to stream a corpus, pip install datasets torchdata"
        ) from None
    files = find_files(source)
    if files:
        kinds = {file_format(file) for file in files}
        if len(kinds) > 1:
            raise ValueError(
                f"the files are {' and '.join(sorted(kinds))}; pass one kind"
            )
        texts = load_dataset(
            kinds.pop(), data_files=files, split="train", streaming=True
        )
    else:
        texts = load_dataset(source, subset, split=split, streaming=True)
    columns = texts.column_names or list(next(iter(texts)))
    if column not in columns:
        raise ValueError(f"there is no column {column!r} in {source}, but {columns}")
    return texts.select_columns([column])


def find_files(source: str | Path | Sequence[str | Path]) -> list[str]:
    """The files that a source names, in order; none if it is a name on the hub."""
    patterns = [source] if isinstance(source, str | Path) else list(source)
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(os.path.expanduser(pattern)))
        is_path = isinstance(pattern, Path) or Path(pattern).suffix
        if not found and (is_path or len(patterns) > 1):
            raise FileNotFoundError(f"there is no file {pattern}")
        files += found
    return files


def file_format(file: str) -> str:
    """Which of the formats a file has, by its ending."""
    endings = [ending for ending in Path(file).suffixes if ending not in COMPRESSED]
    if not endings or endings[-1] not in FORMATS:
        raise ValueError(
            f"{file}: the ending says nothing; pass files that end in "
            f"{', '.join(FORMATS)}, compressed or not"
        )
    return FORMATS[endings[-1]]


class CorruptedStream(IterableDataset):
    """Batches for span corruption from a stream of texts, without padding.

    The texts are joined, with nothing between them, and cut into pieces that
    fill the source. After the last text it begins again with the first.

    Args:
        texts: a ``datasets.IterableDataset`` with one column, not read yet.
        tokenizer: a ``Tokenizer`` or ``ByteTokenizer``.
        rows: pieces in each batch.
        inputs_length: tokens of a source; default 512.
        noise_density: share of tokens to hide; default 0.15.
        mean_noise_span_length: mean tokens in a span; default 3.
        seed: of the spans, with the number of the batch; default ``(0,)``.

    Source: t5, ``preprocessors.py``: ``reduce_concat_tokens``, ``split_tokens``.
    """

    def __init__(
        self,
        texts,
        tokenizer: Vocabulary,
        rows: int,
        inputs_length: int = 512,
        noise_density: float = 0.15,
        mean_noise_span_length: float = 3.0,
        seed: tuple[int, ...] = (0,),
    ):
        self.texts = texts
        self.tokenizer = tokenizer
        self.rows = rows
        self.noise = noise_density, mean_noise_span_length
        self.length, _ = span_lengths(inputs_length, *self.noise)
        self.seed = seed
        self.first = copy.deepcopy(texts.state_dict())  # where a new pass begins
        self.left: list[int] = []  # tokens read and not yet used
        self.number = 0  # of batches so far

    def __iter__(self) -> Iterator[Batch]:
        """Go on where the stream is."""
        while True:
            # Before more is read: what was left over may be enough.
            for tokens in itertools.chain([[]], map(self.encode, self.texts)):
                self.left += tokens
                while len(self.left) >= self.rows * self.length:
                    yield self.next_batch()
            if not self.left and self.number == 0:
                raise ValueError("the corpus has no text")
            self.texts.load_state_dict(copy.deepcopy(self.first))

    def encode(self, row: dict) -> list[int]:
        """The tokens of a row's text."""
        return self.tokenizer.encode(*row.values())

    def next_batch(self) -> Batch:
        """Take the next pieces and hide spans in them."""
        used = self.rows * self.length
        pieces = torch.tensor(self.left[:used]).unflatten(0, (self.rows, -1))  # [b l]
        self.left = self.left[used:]
        noise = random_spans_noise_mask(
            self.length, *self.noise, batch=self.rows, generator=self.generator()
        )
        self.number += 1
        return corrupt_spans(
            pieces,
            noise,
            first_sentinel=self.tokenizer.sentinel(0),
            num_sentinels=self.tokenizer.extra_ids,
            eos_id=self.tokenizer.eos_id,
        )

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed and the batch's number alone."""
        words = np.random.SeedSequence([*self.seed, self.number]).generate_state(2)
        return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def state_dict(self) -> dict:
        """Where the stream is: in the texts, and what is left of them."""
        # The library changes its state in place as it reads on.
        texts = copy.deepcopy(self.texts.state_dict())
        return {"texts": texts, "left": list(self.left), "number": self.number}

    def load_state_dict(self, state: dict) -> None:
        """Go there."""
        self.texts.load_state_dict(state["texts"])
        self.left, self.number = list(state["left"]), state["number"]


class CorpusBatches:
    """The batches of a corpus, as a function of the step, for one process of several.

    The corpus is read as a fixed number of streams, and each batch takes as
    many rows from one as from another. So the batches don't depend on the number
    of processes, and a run may go on with more or fewer of them.

    Args:
        source, subset, split, column: as for ``stream_texts``.
        tokenizer: a ``Tokenizer`` or ``ByteTokenizer``.
        batch_size: rows of a batch, of all processes together; a multiple of
            ``streams``.
        streams: parts of the corpus, a multiple of ``world``; default
            ``world``. A run must go on with as many.
        rank, world: the number of this process, and how many there are; default:
            the only one.
        workers: if True (default), each stream has a process that prepares
            batches ahead; if False, they are made when they are asked for.
        inputs_length, noise_density, mean_noise_span_length: as for
            ``CorruptedStream``.
        seed: of the spans; default 0.

    Raises:
        ValueError: if the numbers don't fit together.
        ImportError, FileNotFoundError: as ``stream_texts``.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        tokenizer: Vocabulary,
        batch_size: int,
        *,
        subset: str | None = None,
        split: str = "train",
        column: str = "text",
        streams: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: bool = True,
        inputs_length: int = 512,
        noise_density: float = 0.15,
        mean_noise_span_length: float = 3.0,
        seed: int = 0,
    ):
        streams = world if streams is None else streams
        check_integer("batch_size", batch_size, 1)
        check_integer("streams", streams, 1)
        if batch_size % streams or streams % world or not 0 <= rank < world:
            raise ValueError(
                f"batch_size is {batch_size}, streams {streams}, world {world} and "
                f"rank {rank}; streams must divide the batch, world must divide "
                "streams, and rank must be below world"
            )

        def open_texts():
            return stream_texts(source, subset=subset, split=split, column=column)

        open_texts()  # before the imports below, it says what is missing
        from datasets.distributed import split_dataset_by_node
        from torchdata.stateful_dataloader import StatefulDataLoader

        self.step = 0
        self.streams = streams
        self.loaders = {}
        for number in range(rank, streams, world):
            # Each opens the files for itself: parts of one reader share its place.
            part = CorruptedStream(
                split_dataset_by_node(open_texts(), number, streams),
                tokenizer,
                batch_size // streams,
                inputs_length,
                noise_density,
                mean_noise_span_length,
                seed=(seed, number),
            )
            with warnings.catch_warnings():  # torchdata 0.11 is older than torch 2.13
                warnings.filterwarnings("ignore", "'set_vital' is deprecated")
                self.loaders[number] = StatefulDataLoader(
                    part, batch_size=None, num_workers=int(workers)
                )
        self.runs: dict[int, Iterator[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of this step, the rows of this process; steps come in order.

        Raises:
            ValueError: if the step is not the next one.
        """
        if step != self.step:
            raise ValueError(
                f"the corpus is at step {self.step}, not {step}; load the state of "
                f"step {step}, or open the corpus anew"
            )
        if not self.runs:
            self.runs = {
                number: iter(loader) for number, loader in self.loaders.items()
            }
        parts = [next(run) for run in self.runs.values()]
        self.step += 1
        return Batch(*[torch.cat(tensors) for tensors in zip(*parts)])

    def state_dict(self) -> dict:
        """The places of this process's streams, by their numbers."""
        places = {
            number: loader.state_dict() for number, loader in self.loaders.items()
        }
        return {"step": self.step, "streams": self.streams, "places": places}

    def load_state_dict(self, state: dict) -> None:
        """Go to the places of a state, which may have those of more streams.

        Raises:
            ValueError: if the state is of another number of streams, or lacks one.
        """
        lacking = self.loaders.keys() - state["places"].keys()
        if state["streams"] != self.streams or lacking:
            raise ValueError(
                f"the state has places {sorted(state['places'])} of "
                f"{state['streams']} streams, and this corpus has {self.streams}, of "
                f"which it needs {sorted(self.loaders)}; open it with as many streams"
            )
        self.step, self.runs = state["step"], {}
        for number, loader in self.loaders.items():
            loader.load_state_dict(state["places"][number])

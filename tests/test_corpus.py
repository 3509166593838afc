"""A corpus as a stream: nothing is lost, nothing comes twice."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("torchdata")

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.corpus import CorpusBatches, CorruptedStream, stream_texts
from t5_book.span_corruption import restore_spans
from tests.conftest import refuses
from tests.small_book import ROOT

WORDS = ByteTokenizer()
# Each text has its number, so that what was read can be counted.
TEXTS = [f"[{n:04}]" + "abcdefgh" * (n % 7) for n in range(400)]


def write(folder, ending="jsonl.gz", files=3, texts=TEXTS):
    """A corpus of several files; its pattern."""
    folder.mkdir(exist_ok=True)
    for k in range(files):
        part, path = texts[k::files], folder / f"part-{k}.{ending}"
        if ending == "parquet":
            from datasets import Dataset

            Dataset.from_dict({"text": part, "other": [1] * len(part)}).to_parquet(path)
            continue
        rows = part if "txt" in ending else [json.dumps({"other": 1, "text": t}) for t in part]
        opener = gzip.open if ending.endswith("gz") else open
        with opener(path, "wt") as file:
            file.write("\n".join(rows) + "\n")
    return str(folder / f"part-*.{ending}")


def numbers(batches) -> list[int]:
    """The numbers of the texts that begin in these batches of one stream."""
    rows = []
    for batch in batches:
        rows += sum(restore_spans(batch.src, batch.labels, WORDS.sentinel(0)), [])
    return [int(n) for n in re.findall(r"\[(\d{4})\]", WORDS.decode(rows))]


@pytest.mark.parametrize("ending", ["jsonl", "json.gz", "txt", "txt.gz", "parquet"])
def test_every_format_gives_the_texts_in_order(tmp_path, ending):
    texts = stream_texts(write(tmp_path, ending))
    expected = TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
    assert list(texts) == [{"text": text} for text in expected]


def test_what_cannot_be_opened(tmp_path):
    pattern = write(tmp_path)
    refuses(lambda: stream_texts(tmp_path / "no.txt"), "no.txt", error=FileNotFoundError)
    refuses(lambda: stream_texts("no*.jsonl"), "no*.jsonl", error=FileNotFoundError)
    refuses(lambda: stream_texts(pattern, column="words"), "words", "text")
    (tmp_path / "a.doc").touch()
    refuses(lambda: stream_texts(tmp_path / "a.doc"), "a.doc", ".jsonl")
    write(tmp_path, "txt")
    refuses(lambda: stream_texts([pattern, tmp_path / "part-0.txt"]), "json", "text")


WRONG = [
    (dict(batch_size=6, streams=4), "6", "4"),
    (dict(batch_size=8, streams=2, world=4, rank=0), "2", "4"),
    (dict(batch_size=8, streams=4, world=4, rank=4), "rank 4"),
    (dict(batch_size=0), "batch_size", "0"),
    (dict(batch_size=8, streams=0), "streams", "0"),
]


def test_numbers_that_do_not_fit(tmp_path):
    pattern = write(tmp_path)
    for options, *words in WRONG:
        refuses(lambda: CorpusBatches(pattern, WORDS, **options), *words)


@pytest.mark.parametrize("rows, length", [(1, 20), (3, 64), (2, 190)])
def test_one_pass_reads_every_text_once_and_then_begins_again(tmp_path, rows, length):
    texts = stream_texts(write(tmp_path))
    order = [*range(0, 400, 3), *range(1, 400, 3), *range(2, 400, 3)]
    tokens = sum(len(WORDS.encode(text)) for text in TEXTS)
    stream = CorruptedStream(texts, WORDS, rows, length)
    run, used = iter(stream), rows * stream.length
    batches = [next(run) for _ in range(5 * tokens // (2 * used))]  # two passes and a half
    assert len({batch.labels.shape for batch in batches}) == 1
    found = numbers(batches)
    assert len(found) > 2 * len(order) and found == (3 * order)[: len(found)]
    # The same pieces have other spans under another seed.
    other = CorruptedStream(stream_texts(write(tmp_path)), WORDS, rows, length, seed=(1,))
    again = next(iter(other))
    assert numbers([again]) == numbers(batches[:1])
    if length > 20:  # where there is a choice
        assert not torch.equal(again.src, batches[0].src)


def test_every_place_is_found_again_also_at_the_end_of_a_pass(tmp_path):
    """At the end, the reader has no text left for the rest of its pass."""
    pattern = write(tmp_path, "txt", 2, ["a" * 50, "b" * 45])
    straight = CorruptedStream(stream_texts(pattern), WORDS, 1, 20)
    run, places, batches = iter(straight), [], []
    for _ in range(15):  # three passes
        places.append(straight.state_dict())
        batches.append(next(run))
    for place, expected in zip(places, batches):
        again = CorruptedStream(stream_texts(pattern), WORDS, 1, 20)
        again.load_state_dict(place)
        found = next(iter(again))
        assert torch.equal(found.src, expected.src) and torch.equal(found.labels, expected.labels)


def test_an_empty_corpus(tmp_path):
    stream = CorruptedStream(stream_texts(write(tmp_path, "txt", 1, ["", ""])), WORDS, 1, 20)
    refuses(lambda: next(iter(stream)), "no text")


def open_corpus(pattern, **options):
    return CorpusBatches(pattern, WORDS, 8, **dict(inputs_length=64, workers=False) | options)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_streams_share_the_texts(tmp_path, streams):
    """Together they read each text once, from more or fewer files than streams."""
    pattern, read = write(tmp_path), []
    for rank in range(streams):
        corpus = open_corpus(pattern, rank=rank, world=streams)
        found = numbers([corpus(step) for step in range(200)])
        own = found[: found.index(found[0], 1)]  # one pass
        assert found[len(own) : 2 * len(own)] == own
        read += own
    assert sorted(read) == list(range(400))


@pytest.mark.parametrize("files", [1, 3, 8])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 4)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after, files):
    def run(corpora, steps):
        """The rows of each step, whoever reads them, in one order."""
        for step in steps:
            batches = [corpus(step) for corpus in corpora]
            rows = [torch.cat([b.src, b.labels], 1).tolist() for b in batches]
            yield sorted(sum(rows, []))

    def corpora(world):
        return [open_corpus(pattern, streams=4, rank=r, world=world) for r in range(world)]

    pattern = write(tmp_path, "txt", files)
    straight = list(run(corpora(1), range(9)))
    stopped = corpora(before)
    assert list(run(stopped, range(4))) == straight[:4]
    states = [corpus.state_dict() for corpus in stopped]
    places = {k: place for state in states for k, place in state["places"].items()}
    resumed = corpora(after)
    for corpus in resumed:
        corpus.load_state_dict(states[0] | {"places": places})
    assert list(run(resumed, range(4, 9))) == straight[4:]
    refuses(lambda: resumed[0](3), "step 9", "3")
    other = open_corpus(pattern, streams=2)
    refuses(lambda: other.load_state_dict(states[0]), "4 streams", "2")
    if before > 1:
        refuses(lambda: corpora(1)[0].load_state_dict(states[0]), "needs [0, 1, 2, 3]")


RUN = """
import sys, torch
from pathlib import Path
from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.corpus import CorpusBatches
pattern, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
corpus = CorpusBatches(pattern, ByteTokenizer(), 4, streams=2, inputs_length=64)
saved = sorted(folder.glob("*.pt"))
if saved:
    corpus.load_state_dict(torch.load(saved[-1], weights_only=True)["corpus"])
while corpus.step < steps:
    batch = corpus(corpus.step)
    state = {"batch": list(batch), "corpus": corpus.state_dict()}
    torch.save(state, folder / "partial")
    (folder / "partial").rename(folder / f"{corpus.step:04}.pt")
    print(corpus.step, flush=True)
"""


def test_a_kill_costs_no_text_and_repeats_none(tmp_path):
    """With processes that read ahead, killed while they do."""
    pattern, folder = write(tmp_path / "texts"), tmp_path / "run"
    folder.mkdir()
    for last in (3, 11, None):
        command = [sys.executable, "-c", RUN, pattern, folder, "20"]
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        for line in process.stdout:
            if last is not None and int(line) >= last:
                os.killpg(process.pid, signal.SIGKILL)
                break
        assert (process.wait() == 0) == (last is None)
        process.stdout.close()
    straight = CorpusBatches(pattern, WORDS, 4, streams=2, inputs_length=64, workers=False)
    for step in range(20):
        saved = torch.load(folder / f"{step + 1:04}.pt", weights_only=True)["batch"]
        assert all(map(torch.equal, saved, straight(step)))

"""Several processes train as one, and their checkpoints are those of one."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t5_book.costs import training_flops, training_memory
from t5_book.many_machines import ParallelTrainer, rows_of
from t5_book.optimizers import muon_adamw
from tests.conftest import FAMILIES, make_family, random_ids, refuses, small_t5
from tests.small_book import ROOT

TRAIN = '''
import json, sys
import torch
from t5_book import T5
from t5_book.batches import Batch
from t5_book.evaluation import evaluate
from t5_book.many_machines import ParallelTrainer
from t5_book.optimizers import adafactor, muon_adamw

options = json.loads(sys.argv[1])
steps, out, stream = options.pop("steps"), options.pop("out"), options.pop("stream", None)


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=3e-3)]


def batches(step):
    chance = torch.Generator().manual_seed(step)
    src = torch.randint(2, 32, (8, 9), generator=chance)
    labels = src[:, :6].clone()
    lengths = torch.randint(1, 7, (8, 1), generator=chance)
    labels[torch.arange(6) >= lengths] = -100
    return Batch(src, torch.ones_like(src).bool(), labels)


side = dict(num_tokens=options.pop("v", 32), depth=1, heads=2, dim_head=4, mlp_mult=2)
sides = {f"{s}_{name}": value for s in ("enc", "dec") for name, value in side.items()}
torch.manual_seed(0)
model = T5(dim=16, dropout=options.pop("dropout", 0.0), **sides)
make = {"adamw": adamw, "muon": muon_adamw, "adafactor": adafactor}[options.pop("optimizer", "adamw")]
if stream:
    from t5_book.byte_tokenizer import ByteTokenizer
    from t5_book.corpus import CorpusBatches
    from t5_book.many_machines import start_processes
    rank, world = start_processes()
    batches = CorpusBatches(
        stream, ByteTokenizer(), 8, streams=4, rank=rank, world=world, inputs_length=32, workers=False
    )
trainer = ParallelTrainer(model, batches, make, **options)
trainer.quiet = True
measure = (lambda model: {}) if stream else lambda model: evaluate(model, [batches(999)])
resumed = trainer.resume()
if trainer.rank == 0 and out == "progress":
    step = trainer.train_step
    trainer.train_step = lambda: print(trainer.step, flush=True) or step()
history = trainer.fit(steps, measure, every=1)
weights = {name: w.tolist() for name, w in trainer.whole_model().named_parameters()}
if trainer.rank == 0 and out != "progress":
    json.dump([resumed, history, weights], open(out, "w"))
'''


def start(world, place, **options):
    """Start a training by so many processes, in a group that can be killed."""
    (place / "train.py").write_text(TRAIN)
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    options = dict(steps=6, out="out.json") | options
    return subprocess.Popen(
        [*command, "train.py", json.dumps(options)], cwd=place, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def train(world, place, **options):
    """Train: whether it was resumed, the history, and the weights at the end."""
    out, error = (process := start(world, place, **options)).communicate(timeout=600)
    assert process.returncode == 0, error
    resumed, history, weights = json.loads((place / "out.json").read_text())
    return resumed, history, {name: torch.tensor(weight) for name, weight in weights.items()}


def furthest(one, other, name="train_loss"):
    """The largest difference between two histories."""
    return max(abs(a[name] - b[name]) for a, b in zip(one[1], other[1], strict=True))


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Over 50 steps, with one embedding that is tied three times."""
    alone = train(1, tmp_path, steps=50)
    assert alone[1][-1]["train_loss"] < alone[1][0]["train_loss"] - 0.2
    for options in (dict(strategy="ddp", accumulate=2), dict(strategy="fsdp")):
        both = train(2, tmp_path, steps=50, **options)
        for name in ("train_loss", "gradient_norm", "loss"):
            assert furthest(alone, both, name) <= 1e-5, (options, name)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_other_optimizers_can_be_shared_out(tmp_path, optimizer):
    alone, both = [train(n, tmp_path, optimizer=optimizer, strategy="fsdp") for n in (1, 2)]
    assert furthest(alone, both) <= 1e-5


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Two, then one, then two that do it in another way."""
    straight = train(1, tmp_path)
    saved = dict(folder="run", optimizer="adamw")
    train(2, tmp_path, strategy="fsdp", steps=2, **saved)
    resumed, history, _ = train(1, tmp_path, steps=4, **saved)
    assert resumed and len(history) == 4
    last = train(2, tmp_path, **saved)
    assert last[0] and furthest(straight, last) <= 1e-6
    for name, weight in straight[2].items():
        assert (weight - last[2][name]).abs().max() <= 1e-5, name


def test_a_killed_run_goes_on_exactly(tmp_path):
    """With dropout, whose random numbers each of two processes has for itself."""
    options = dict(steps=8, dropout=0.2, optimizer="muon")
    straight = train(2, tmp_path, folder="straight", **options)
    process = start(2, tmp_path, folder="run", **options | dict(out="progress"))
    for line in process.stdout:
        if line.strip() == "5":
            agent = psutil.Process(process.pid)
            for one in [*agent.children(recursive=True), agent]:
                one.kill()
    assert process.wait() != 0
    process.stdout.close(), process.stderr.close()
    resumed = train(2, tmp_path, folder="run", **options)
    assert resumed[0] and resumed[1] == straight[1]
    for name, weight in straight[2].items():
        assert torch.equal(weight, resumed[2][name]), name


def test_a_stream_goes_on_with_another_number_of_processes(tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("torchdata")
    (tmp_path / "corpus.txt").write_text("\n".join(f"text {n} of many" for n in range(500)))
    options = dict(stream="corpus.txt", v=384)
    straight = train(1, tmp_path, **options)
    train(2, tmp_path, steps=3, folder="run", **options)
    last = train(1, tmp_path, folder="run", **options)
    assert last[0] and furthest(straight, last) <= 1e-6


def batches(step):
    from t5_book.batches import Batch

    src = random_ids(6, 5, step, 32)
    return Batch(src, torch.ones_like(src).bool(), src[:, :3])


def test_bfloat16_is_near_and_not_the_same():
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = ParallelTrainer(small_t5(), batches, muon_adamw, precision=precision)
        trainer.quiet = True
        losses[precision] = [record["train_loss"] for record in trainer.fit(5, every=1)]
        assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
    difference = torch.tensor(losses["float32"]) - torch.tensor(losses["bfloat16"])
    assert 0 < difference.abs().max() < 0.05


def test_what_is_refused():
    def make(**options):
        return ParallelTrainer(small_t5(), batches, muon_adamw, **options)

    refuses(lambda: make(strategy="dp"), "strategy", "ddp", "fsdp")
    refuses(lambda: make(precision="float16"), "precision", "bfloat16")
    refuses(lambda: make(accumulate=0), "accumulate", "0")
    refuses(lambda: rows_of(batches(0), 0, 4), "6", "4")
    trainer = make(accumulate=4)
    trainer.quiet = True
    refuses(lambda: trainer.fit(1), "6", "4")


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family):
    model, _ = make_family(family)
    src, labels = random_ids(3, 17), random_ids(3, 11, 1)
    with FlopCounterMode(display=False) as counter:
        model.loss(src, labels).backward()
    assert counter.get_total_flops() == 3 * training_flops(model.config, 17, 11)


def test_memory_of_weights_gradients_and_optimizer():
    assert training_memory(100) == {"weights": 400, "gradients": 400, "optimizer": 800}
    assert training_memory(100, "adafactor", 4) == {"weights": 100, "gradients": 100, "optimizer": 0}
    refuses(lambda: training_memory(100, "sgd"), "sgd", "adamw")

"""Checkpoints: what a run must survive, and that it goes on exactly."""

import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from t5_book.batches import Batch
from t5_book.checkpoints import FILES, Checkpoints, DamagedCheckpoint, sum_lines
from t5_book.losses import batch_loss
from t5_book.optimizers import adafactor, muon_adamw
from t5_book.schedules import linear_schedule
from t5_book.training import Trainer
from tests.conftest import refuses, seeded, small_t5
from tests.small_book import ROOT

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
ALL = (*FILES, "SHA256SUMS")


def batches(step):
    src = torch.randint(2, 32, (4, 7), generator=seeded(step))
    return Batch(src, torch.ones_like(src).bool(), src[:, :5].clone())


def make(folder=None, seed=0, optimizers=muon_adamw, batches=batches, model=None, **kw):
    """A trainer of a small model with dropout; ``sizes`` change the model."""
    if model is None:
        model = small_t5(seed, **dict(dropout=0.1) | kw.pop("sizes", {}))
    kw = dict(schedule=linear_schedule(40, 3)) | kw
    return Trainer(model, batches, optimizers(model), folder=folder, **kw)


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a program of its own; one in the background may have it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of 6 steps, with checkpoints of 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    make(folder).fit(6, every=2)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def straight():
    """A run that was never stopped, after 20 steps."""
    trainer = make()
    trainer.fit(20, every=5)
    return trainer


def same_weights(one, two):
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def state_of(trainer):
    """All that ``resume`` may change, as plain numbers and copies."""
    weights = [weight.clone() for weight in trainer.model.parameters()]
    optimizers = [str(o.state_dict()) for o in trainer.optimizers]
    rest = trainer.step, list(trainer.history), list(trainer.recent)
    return weights, torch.get_rng_state(), optimizers, *rest


def refused(trainer, *words, error=ValueError, **options):
    """``resume`` must raise, with these words, and change nothing."""
    before = state_of(trainer)
    message = refuses(lambda: trainer.resume(**options), *words, error=error)
    after = state_of(trainer)
    assert all(map(torch.equal, before[0], after[0]))
    assert torch.equal(before[1], after[1]) and before[2:] == after[2:]
    assert "delete" not in message
    return message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [name for name in names(folder) if name.startswith("step")]


def resign(checkpoint):
    """Make the checksums fit what is there."""
    (checkpoint / "SHA256SUMS").write_text("".join(sum_lines(checkpoint)))


# --- 1. Only finite weights -----------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(run, value):
    trainer = make(run)
    assert trainer.resume()
    trainer.train_step()
    trainer.model.decoder.norm.weight.data[3] = value
    words = "decoder.norm.weight", "step-000006", "resume()"
    refuses(trainer.save, *words, error=FloatingPointError)
    assert steps(run) == ["step-000002", "step-000004", "step-000006"]
    assert trainer.resume() and trainer.model.decoder.norm.weight.isfinite().all()


@pytest.mark.parametrize("rate", [1e38, math.inf, math.nan])
def test_one_bad_step_does_not_end_the_run(tmp_path, rate):
    """At step 9; the next to be saved is 10."""
    trainer = make(tmp_path)
    trainer.schedule = lambda step: rate if step == 9 else 1.0
    with pytest.raises(FloatingPointError, match=r"step-000005|step=5"):
        trainer.fit(20, every=5)
    again = make(tmp_path, seed=1, schedule=lambda step: 1.0)
    # Weights of 1e35 are finite, and yet the run is dead.
    assert again.resume(step=5, allow=["schedule"]) and again.step == 5
    again.fit(12)


def test_a_run_without_a_folder_stops_too():
    trainer = make()
    trainer.schedule = lambda step: math.inf if step == 3 else 1.0
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        trainer.fit(4)


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(run):
    trainer = make(run, loss=lambda model, batch: model.head.weight.sum() * math.nan)
    trainer.resume()
    with pytest.raises(FloatingPointError, match=r"step 6.*step-000006.*step=4"):
        trainer.fit(8)
    trainer.loss = batch_loss
    trainer.fit(7)
    trainer.loss = lambda model, batch: model.head.weight.sum() * math.nan
    with pytest.raises(FloatingPointError, match=r"step 7.*step-000007.*step=6"):
        trainer.fit(8)


# --- 2. Several checkpoints, verified -------------------------------------


@pytest.mark.parametrize(("keep", "expected"), [(1, [9]), (3, [6, 8, 9]), (9, [2, 4, 6, 8, 9])])
def test_the_newest_are_kept(tmp_path, keep, expected):
    make(tmp_path, keep=keep).fit(9, every=2)
    assert steps(tmp_path) == [f"step-{n:06}" for n in expected]
    assert set(names(tmp_path)) - set(steps(tmp_path)) == {".lock", "log.jsonl"}


@pytest.mark.parametrize("keep", [0, -1, 2.5, True])
def test_at_least_one_is_kept(keep):
    refuses(lambda: make(keep=keep), "keep", keep)


def test_a_checkpoint_holds_files_that_others_can_read(run):
    newest = run / "step-000006"
    assert names(newest) == sorted(ALL)
    model = small_t5(dropout=0.1)
    assert model.config == type(model.config).from_json((newest / "config.json").read_text())
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    if shutil.which("sha256sum"):
        assert subprocess.run(command, cwd=newest).returncode == 0
    from safetensors.torch import load_model

    load_model(model, newest / "model.safetensors")
    trainer = make(run, seed=1)
    trainer.resume()
    assert all(map(torch.equal, model.parameters(), trainer.model.parameters()))


def falls_back(run, word):
    """Resuming goes to step 4, says so, and what is damaged stays."""
    trainer = make(run, seed=1)
    with pytest.warns(UserWarning) as caught:
        assert trainer.resume() and trainer.step == 4
    [message] = [str(warning.message) for warning in caught]
    assert str(run / "step-000006") in message and "step-000004" in message
    assert word in message
    assert "aside-step-000006" in names(run) and steps(run)[-1] == "step-000004"
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    return trainer


@pytest.mark.parametrize("name", ALL)
def test_any_flipped_bit_is_found(saved, tmp_path, name):
    """Anywhere in the file; the first and last bit among them."""
    data = (saved / "step-000006" / name).read_bytes()
    chance = random.Random(name)
    places = [0, 8 * len(data) - 1] + [chance.randrange(8 * len(data)) for _ in range(40)]
    for number, place in enumerate(places):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        if number % 10 == 0:  # a whole resume for some, the reading for all
            copy = Path(shutil.copytree(saved, tmp_path / str(number)))
        (copy / "step-000006" / name).write_bytes(damaged)
        if number % 10 == 9:
            falls_back(copy, name if name != "SHA256SUMS" else "SUMS")
        else:
            with pytest.raises(DamagedCheckpoint, match="step-000006"):
                Checkpoints(copy).find(6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("share", [None, 0, 0.5, 0.999])
def test_a_file_that_was_cut_or_lost_is_found(run, name, share):
    file = run / "step-000006" / name
    if share is None:
        file.unlink()
    else:
        os.truncate(file, int(share * file.stat().st_size))
    falls_back(run, "SUMS" if share is not None else name)


def test_the_run_that_fell_back_goes_on_exactly(run, straight):
    (run / "step-000006" / "training.pt").write_bytes(b"")
    trainer = falls_back(run, "training.pt")
    trainer.fit(20, every=5)
    assert same_weights(trainer, straight)


def test_if_all_are_damaged_all_are_named(run):
    for path in run.glob("step-*"):
        (path / "model.safetensors").write_bytes(b"damaged")
    refused(make(run), *steps(run), "no whole", error=DamagedCheckpoint)
    assert len(steps(run)) == 3


def test_going_back_to_an_older_checkpoint(run, straight):
    trainer = make(run, seed=1)
    refused(trainer, "step 3", "step-000004", step=3)
    assert trainer.resume(step=2) and trainer.step == 2
    assert steps(run) == ["step-000002"]
    assert {"aside-step-000004", "aside-step-000006"} < set(names(run))
    trainer.fit(20, every=5)
    assert same_weights(trainer, straight)


def test_a_step_that_is_saved_again_replaces_nothing(run):
    trainer = make(run)
    trainer.resume()
    trainer.model.decoder.norm.weight.data += 1
    trainer.save()
    assert steps(run) == ["step-000004", "step-000006", "step-000006+"]
    again = make(run, seed=1)
    assert again.resume() and same_weights(again, trainer)


def test_more_than_a_million_steps_are_in_order(run):
    (run / "step-000006").rename(run / "step-1000000")
    found = [path.name for path in Checkpoints(run).paths()]
    assert found == ["step-1000000", "step-000004", "step-000002"]


def test_other_things_in_the_folder_do_not_matter(run):
    (run / "step-by-step.txt").write_text("notes")
    (run / "step-000009-notes").mkdir()
    trainer = make(run)
    assert trainer.resume() and trainer.step == 6


def test_a_checkpoint_that_runs_code_is_refused(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"step": 1, "history": Evil()}, run / "step-000006" / "training.pt")
    resign(run / "step-000006")
    refused(make(run), "training.pt", "nothing in it was run")
    assert not (tmp_path / "evil").exists()


# --- 3. Old or new, at any moment -----------------------------------------

KILLED = """
import sys
from tests.test_checkpoints import *

folder, saving = Path(sys.argv[1]), Checkpoints.save
calls, moment = 0, None


def count(frame, event, function):
    global calls
    calls += event == "c_call"
    if calls == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def save(self, run):
    if run.step == 10:  # the first checkpoint is written in peace
        sys.setprofile(count)
    saving(self, run)
    sys.setprofile(None)


def killing_batches(step):
    if step == 13 and moment == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    return batches(step)


straight = make()
straight.fit(20, every=5)
Checkpoints.save = save
make(folder / "counted", keep=1).fit(10, every=5)
chance = random.Random(0)
moments = [-1] + [chance.randrange(calls) for _ in range(4)]
# the last tenth of the calls: rename, log, and letting go of the old
moments += [chance.randrange(calls - calls // 10, calls) for _ in range(4)]
for number, moment in enumerate(moments):
    part = folder / str(number)
    calls = 0
    child = os.fork()
    if child == 0:
        make(part, batches=killing_batches, keep=1).fit(20, every=5)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    leftovers = len(list(part.glob(".part-*")))
    moment = None
    resumed = make(part, seed=1)
    assert resumed.resume() and not list(part.glob(".part-*"))
    step = resumed.step
    assert read_log(part) == resumed.history and resumed.history[-1]["step"] == step
    resumed.fit(20, every=5)
    assert same_weights(resumed, straight) and resumed.history == straight.history
    print(step, leftovers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_leaves_the_old_or_the_new_and_resuming_is_exact(tmp_path):
    """In step 13, and at 8 moments of writing a checkpoint; then on to 20."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == 9 and {step for step, _ in found} == {5, 10}
    assert sum(leftovers for _, leftovers in found) > 0


CALLS = ["mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "scandir"]


class FailingDisk:
    """Fail once, at the n-th call of the operating system."""

    def __init__(self, patch, moment, number):
        self.calls, self.moment, self.number = [], moment, number
        for name in CALLS:
            patch.setattr(os, name, self.wrap(getattr(os, name), name))
        patch.setattr(io, "open", self.wrap(io.open, "open"))

    def wrap(self, function, name):
        def call(*arguments, **keywords):
            self.calls.append(name)
            if len(self.calls) == self.moment:
                raise OSError(self.number, os.strerror(self.number), name)
            return function(*arguments, **keywords)

        return call


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_each_call_of_the_system_may_fail_while_saving(saved, tmp_path, number, monkeypatch):
    moment, ended, seen = 0, False, set()
    trainer = make(saved)
    shutil.copytree(saved, tmp_path / "0")
    trainer.checkpoints.folder = tmp_path / "0"
    while not ended:
        moment += 1
        folder = Path(shutil.copytree(saved, tmp_path / str(moment)))
        trainer = make(folder)
        trainer.resume()
        trainer.step = 7
        before = [p.clone() for p in trainer.model.parameters()]
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, moment, number)
            try:
                trainer.save()
                ended = len(disk.calls) < moment
            except OSError as error:
                assert error.errno == number
        assert all(map(torch.equal, before, trainer.model.parameters()))
        # What could not be removed then is removed now.
        again = make(folder, seed=1)
        assert again.resume() and again.step in (6, 7)
        assert not list(folder.glob(".part-*"))
        assert steps(folder)[-1] == f"step-{again.step:06}"
        seen.add(again.step)
    assert seen == {6, 7} and moment > 20


def test_files_and_folders_are_on_the_disk_before_and_after_the_rename(run, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(opened):
        events.append(os.readlink(f"/proc/self/fd/{opened}"))
        fsync(opened)

    def note_rename(old, new):
        events.append(("rename", Path(new).name))
        rename(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    trainer = make(run)
    trainer.resume()
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    trainer.step = 7
    trainer.save()
    place = events.index(("rename", "step-000007"))
    before = {Path(event).name for event in events[:place]}
    assert before == {*ALL, "checkpoint"}
    assert events[place + 1] == str(run)


def test_what_dead_writers_left_is_removed(run):
    (run / ".part-dead" / "checkpoint").mkdir(parents=True)
    (run / ".part-dead" / "checkpoint" / "training.pt").write_bytes(b"half")
    make(run).resume()
    assert ".part-dead" not in names(run)


# --- 4. All or nothing ----------------------------------------------------


def test_nothing_to_resume(tmp_path):
    assert make(tmp_path / "none").resume() is False
    assert make().resume() is False
    assert not (tmp_path / "none").exists()


CONFIGS = {
    "max_distance": 64,
    "num_buckets": 16,
    "scale_logits": False,
    "start_id": 3,
    "pad_id": 2,
    "eos_id": 5,
    "dropout": 0.2,
    "feed_forward": "gated-gelu",
    "tie_head": False,
    "tie_token_emb": False,
    "bias_per_layer": True,
    "dim": 24,
    "enc_depth": 2,
    "dec_depth": 2,
    "enc_heads": 4,
    "dec_mlp_mult": 3,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_another_configuration_is_refused(run, name):
    other = {name: CONFIGS[name]}
    message = refused(make(run, sizes=other), f"{name} of the model", CONFIGS[name])
    assert "step-000006" in message


def test_all_fields_of_the_configuration_are_compared(run):
    settings = json.loads((run / "step-000006" / "settings.json").read_text())
    fields = small_t5().config.__dataclass_fields__
    assert {f"{name} of the model" for name in fields} <= settings.keys()


def changed_group(index, group, **changes):
    def optimizers(model):
        made = muon_adamw(model)
        made[index].param_groups[group].update(changes)
        return made

    return optimizers


HYPERPARAMETERS = {
    "lr": (0, 0, 0.5, 0.005),
    "momentum": (0, 0, 0.9, 0.95),
    "rounds": (0, 0, 5, 3),
    "betas": (1, 0, (0.9, 0.999), [0.9, 0.98]),
    "eps": (1, 1, 1e-6, 1e-8),
    "weight_decay": (1, 0, 0.1, 0.0),
    "amsgrad": (1, 0, True, False),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_another_hyperparameter_is_refused_and_can_be_allowed(run, name):
    index, group, new, old = HYPERPARAMETERS[name]
    optimizers = changed_group(index, group, **{name: new})
    shown = list(new) if isinstance(new, tuple) else new
    place = f"{name} of optimizer {index}, group {group} is {old} there and {shown} here"
    message = refused(make(run, optimizers=optimizers), place, f"allow=['{name}']")
    assert message.count(" there and ") == 1
    trainer = make(run, optimizers=optimizers)
    assert trainer.resume(allow=[name]) and trainer.step == 6
    assert trainer.optimizers[index].param_groups[group][name] == new
    if name == "lr":
        trainer.train_step()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        assert rate == 0.5 * trainer.schedule(6)


@pytest.mark.parametrize("steps", [10, 41, 80, 1000])
def test_another_schedule_is_refused(run, steps):
    trainer = make(run, schedule=linear_schedule(steps, 3))
    refused(trainer, "schedule at step", "allow=['schedule']")
    assert trainer.resume(allow=["schedule"])


def test_another_clip_is_refused(run):
    refused(make(run, clip=0.5), "clip of the gradient is 1.0 there and 0.5 here")


@pytest.mark.parametrize(
    "other",
    [
        lambda step: batches(step + 1),
        lambda step: batches(step)._replace(mask=batches(step).mask.fill_(False)),
        lambda step: batches(step)._replace(labels=batches(step).labels.int()),
        lambda step: batches(step)._replace(labels=batches(step).labels.view(2, -1)),
    ],
)
def test_another_batch_function_is_refused(run, other):
    refused(make(run, batches=other), "batches at step 6", "allow=['batches']")


def test_only_what_can_differ_can_be_allowed(run):
    for allow in ["lr"], ["parameter"], ["weight"], ["learning rate"], "lr":
        if allow != ["lr"]:
            refused(make(run), "allow has", "betas", allow=allow)
    assert make(run).resume(allow=["lr"])


def in_one_group(model):
    muon, adamw = muon_adamw(model)
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    return [muon, torch.optim.AdamW(parameters)]


def in_another_order(model):
    muon, adamw = muon_adamw(model)
    parameters = muon.param_groups[0]["params"]
    # two matrices of the same shape: no shape would show it
    assert parameters[0].shape == parameters[1].shape
    parameters[0], parameters[1] = parameters[1], parameters[0]
    return [muon, adamw]


def with_an_empty_group(model):
    muon, adamw = muon_adamw(model)
    adamw.add_param_group({"params": []})
    return [muon, adamw]


@pytest.mark.parametrize(
    ("optimizers", "words"),
    [
        (adafactor, ["Muon", "Adafactor"]),
        (lambda model: [], ["Muon", "missing here"]),
        (lambda model: muon_adamw(model)[:1], ["AdamW", "missing here"]),
        (in_one_group, ["group 1", "missing here"]),
        (in_another_order, ["parameter 0"]),
        (with_an_empty_group, ["group 2", "missing there"]),
    ],
)
def test_a_checkpoint_of_other_optimizers_is_refused(run, optimizers, words):
    refused(make(run, optimizers=optimizers), *words)


def test_weights_of_another_shape_or_dtype_are_refused(run):
    model = small_t5(dropout=0.1).bfloat16()
    refused(make(run, model=model), "float32", "bfloat16", "another folder")
    model = small_t5(dropout=0.1)
    model.enc_emb.weight.data = torch.randn(20, 16)
    refused(make(run, model=model), "weight enc_emb.weight", "(32, 16)", "(20, 16)")


def test_numbers_of_numpy_and_torch_are_numbers(run):
    trainer = make(run, sizes=dict(dropout=np.float64(0.1), dim=np.int64(16)))
    trainer.clip = torch.tensor(1.0)
    assert trainer.resume()


def test_what_cannot_be_known_is_not_compared(tmp_path):
    """Tables for the schedule and the batches, which end with the run."""
    data = [batches(step) for step in range(4)]
    rates = [1.0, 0.5, 0.25, 0.125]

    def make_short():
        return make(tmp_path, batches=data.__getitem__, schedule=rates.__getitem__)

    make_short().fit(4, every=2)
    trainer = make_short()
    assert trainer.resume() and trainer.step == 4
    assert make(tmp_path, schedule=rates.__getitem__).resume()


def test_looking_at_the_next_batch_draws_no_random_number(tmp_path):
    def careless(step):
        torch.manual_seed(step)
        return batches(step)

    often, seldom = make(tmp_path / "a"), make(tmp_path / "b")
    often.batches = seldom.batches = careless
    often.fit(8, every=1)
    seldom.fit(8, every=8)
    assert same_weights(often, seldom)


# --- 5. Errors of the disk ------------------------------------------------


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), OSError(5, "I/O error"), MemoryError()]
)
@pytest.mark.parametrize("where", ["io.open", "torch.load", "t5_book.checkpoints.load_file"])
def test_a_good_file_that_cannot_be_read_is_not_called_damaged(run, error, where, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    trainer = make(run)
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(error)) as caught:
            trainer.resume()
    assert caught.value is error and trainer.step == 0
    assert steps(run)[-1] == "step-000006" and trainer.resume()


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_keeps_the_old_and_leaves_nothing(run, name):
    """A limit on the size of a file, below that of this one."""
    resource = pytest.importorskip("resource")
    trainer = make(run)
    trainer.resume()
    before, log = steps(run), (run / "log.jsonl").read_text()
    sizes = {file.name: file.stat().st_size for file in (run / "step-000006").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.step = 7
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] // 2, limits[1]))
        with pytest.raises(OSError) as caught:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert steps(run) == before and (run / "log.jsonl").read_text() == log
    assert set(names(run)) == {*before, ".lock", "log.jsonl"}
    trainer.save()
    assert steps(run)[-1] == "step-000007"


# --- 6. One writer --------------------------------------------------------


def test_a_second_writer_is_refused_while_the_first_trains(tmp_path):
    second = make(tmp_path)

    def measure(model):
        for call in second.resume, second.save, lambda: second.fit(1):
            refuses(call, tmp_path, "another", error=RuntimeError)
        return {}

    make(tmp_path).fit(2, measure)
    assert second.resume() and second.step == 2


def test_the_lock_of_a_dead_process_is_gone(run):
    code = "import sys, time, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
    code += "print(flush=True)\ntime.sleep(600)"
    command = [sys.executable, "-c", code, run / ".lock"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        refused(make(run), run, error=RuntimeError)
    finally:
        process.kill()
        process.communicate()
    assert make(run).resume()


def test_a_run_does_not_write_beside_another(run):
    trainer = make(run)
    refuses(lambda: trainer.fit(2), run, "step-000006", "resume()", error=RuntimeError)
    refuses(trainer.save, "resume()", error=RuntimeError)
    assert trainer.step == 0
    other = make(run)
    other.resume()
    trainer.resume()
    trainer.fit(8)
    refuses(lambda: other.fit(8), "step-000008", "resume()", error=RuntimeError)
    assert other.resume() and other.step == 8


# --- 7. Ctrl-C ------------------------------------------------------------


def with_signals(*places, step=7):
    """Batches during one of which Ctrl-C is pressed, once or more."""

    def signalled(at):
        for _ in places if at == step else ():
            signal.raise_signal(signal.SIGINT)
        return batches(at)

    return signalled


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, straight):
    trainer = make(tmp_path, batches=with_signals("once"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 8.*step-000008"):
        trainer.fit(20, every=5)
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.step == 8 and steps(tmp_path) == ["step-000005", "step-000008"]
    again = make(tmp_path, seed=1)
    assert again.resume() and again.step == 8
    for one in again, trainer:
        if one is trainer:
            one.resume()
        one.fit(20, every=5)
        assert same_weights(one, straight) and one.history == straight.history


def test_ctrl_c_at_a_step_that_is_saved_anyway(tmp_path):
    trainer = make(tmp_path, batches=with_signals("once", step=4))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(20, every=5)
    assert steps(tmp_path) == ["step-000005"] and trainer.history[-1]["step"] == 5


def test_ctrl_c_while_measuring(tmp_path, straight):
    def measure(model):
        if trainer.step == 10:
            signal.raise_signal(signal.SIGINT)
        return {}

    trainer = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(20, measure, every=5)
    assert trainer.step == 10 and steps(tmp_path) == ["step-000005", "step-000010"]
    trainer.fit(20, every=5)
    assert same_weights(trainer, straight)


def test_a_second_ctrl_c_stops_at_once(tmp_path, straight):
    trainer = make(tmp_path, batches=with_signals("once", "twice"))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(20, every=5)
    assert trainer.step == 7 and steps(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("index", [0, 1])
def test_half_a_step_must_be_resumed(tmp_path, straight, index):
    trainer = make(tmp_path)

    def stop(*_):
        if trainer.step == 7:
            raise KeyboardInterrupt

    hook = trainer.optimizers[index].register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(20, every=5)
    hook.remove()
    for call in trainer.save, lambda: trainer.fit(20):
        refuses(call, "resume()", error=RuntimeError)
    assert trainer.resume() and trainer.step == 5
    trainer.fit(20, every=5)
    assert same_weights(trainer, straight) and trainer.history == straight.history


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
@pytest.mark.parametrize("where", ["batches", "before", "after"])
def test_a_step_that_failed_before_it_changed_anything_can_be_repeated(
    straight, error, where
):
    failures = [error("once")]

    def fail(place, step):
        if failures and place == where and step == 7:
            raise failures.pop()

    def failing_batches(step):
        fail("batches", step)
        return batches(step)

    def loss(model, batch):
        fail("before", trainer.step)
        value = model.loss(batch.src, batch.labels, batch.mask)
        fail("after", trainer.step)
        return value

    trainer = make(batches=failing_batches, loss=loss)
    with pytest.raises(error):
        trainer.fit(20, every=5)
    trainer.fit(20, every=5)
    assert same_weights(trainer, straight) and trainer.history == straight.history


def test_other_threads_and_other_handlers_keep_their_ctrl_c():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("theirs"))
    try:
        make(batches=with_signals("once", step=1)).fit(3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["theirs"]
    thread = threading.Thread(target=lambda: seen.append(make().fit(3)))
    thread.start()
    thread.join()
    assert len(seen[1]) == 1


# --- 8. The log -----------------------------------------------------------


def read_log(folder):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_the_log_holds_the_history(tmp_path):
    history = make(tmp_path).fit(5, lambda model: {"loss": 1.5}, every=2)
    assert read_log(tmp_path) == history
    assert [record["step"] for record in history] == [2, 4, 5]
    assert set(history[0]) == {"step", "train_loss", "gradient_norm", "loss"}


@pytest.mark.parametrize("text", [None, "", "cut shor"])
def test_a_log_that_is_behind_is_written_again(run, text):
    history = read_log(run)
    (run / "log.jsonl").unlink() if text is None else (run / "log.jsonl").write_text(text)
    make(run).resume()
    assert read_log(run) == history and len(history) == 3


def test_a_record_holds_plain_numbers_and_null(tmp_path):
    numbers = {
        "double": np.float64(0.75), "single": np.float32(0.75),
        "tensor": torch.tensor(0.75), "nan": math.nan, "inf": [np.float32("inf")],
    }  # fmt: skip
    trainer = make(tmp_path)
    trainer.fit(2, lambda model: numbers)
    again = make(tmp_path)
    assert again.resume() and again.history == trainer.history == read_log(tmp_path)
    expected = {"double": 0.75, "single": 0.75, "tensor": 0.75, "nan": None, "inf": [None]}
    assert expected.items() <= again.history[0].items()


@pytest.mark.parametrize("name", ["step", "train_loss", "gradient_norm"])
def test_measure_may_not_overwrite_a_record(tmp_path, name):
    refuses(lambda: make(tmp_path).fit(2, lambda model: {name: 1}), "measure", name)
    assert read_log(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_measure_that_raises_loses_no_record(tmp_path, straight, error):
    def measure(model):
        if trainer.step == 10:
            raise error("once")
        return {}

    trainer = make(tmp_path)
    with pytest.raises(error):
        trainer.fit(20, measure, every=5)
    assert steps(tmp_path) == ["step-000005", "step-000010"]
    assert read_log(tmp_path) == trainer.history and len(trainer.history) == 2
    again = make(tmp_path, seed=1)
    assert again.resume() and again.step == 10
    again.fit(20, every=5)
    assert again.history == straight.history


def test_an_impossible_folder_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in tmp_path / "file", tmp_path / "file" / "below":
        trainer = make(folder)
        with pytest.raises(OSError):
            trainer.fit(2)
        assert trainer.step == 0
    if getattr(os, "getuid", int)():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            make(tmp_path / "closed").fit(2)


# --- 9. Compiled, and tied ------------------------------------------------


@pytest.mark.parametrize("compiled", [(True, False), (False, True), (True, True)])
def test_a_compiled_model_and_a_plain_one_share_checkpoints(tmp_path, compiled):
    def model(compile, seed):
        plain = small_t5(seed, dropout=0.1)
        if not compile:
            return plain
        plain.encoder = torch.compile(plain.encoder, backend="eager")
        return torch.compile(plain, backend="eager")

    first = make(tmp_path, model=model(compiled[0], 0))
    first.fit(2)
    second = make(tmp_path, model=model(compiled[1], 1))
    assert second.resume() and second.step == 2
    assert same_weights(first, second)
    assert not re.search("_orig_mod", (tmp_path / "step-000002/settings.json").read_text())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("tie_token_emb", [False, True])
def test_loading_does_not_untie_the_head(assign, tie_token_emb):
    model, other = (small_t5(seed, tie_token_emb=tie_token_emb) for seed in (0, 1))
    model.load_state_dict(other.state_dict(), assign=assign)
    assert model.head.weight is model.dec_emb.weight
    assert torch.equal(model.head.weight, other.head.weight)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_loading_as_a_part_does_not_untie_the_head_either():
    one, other = (torch.nn.ModuleList([small_t5(seed)]) for seed in (0, 1))
    one.load_state_dict(other.state_dict(), assign=True)
    assert one[0].head.weight is one[0].dec_emb.weight


def test_an_untied_head_stays_untied_when_loaded():
    model, other = (small_t5(seed, tie_head=False) for seed in (0, 1))
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.head.weight is not model.dec_emb.weight
    assert torch.equal(model.head.weight, other.head.weight)


@pytest.mark.parametrize("sizes", [{}, dict(tie_head=False), dict(tie_token_emb=False)])
def test_resuming_keeps_what_is_tied(tmp_path, sizes):
    make(tmp_path, sizes=sizes).fit(2)
    trainer = make(tmp_path, seed=1, sizes=sizes)
    trainer.resume()
    model = trainer.model
    assert (model.head.weight is model.dec_emb.weight) == sizes.get("tie_head", True)
    assert (model.enc_emb is model.dec_emb) == sizes.get("tie_token_emb", True)
    trainer.fit(4)


# --- 10. Resuming is exact ------------------------------------------------


@pytest.mark.parametrize("optimizers", [muon_adamw, adafactor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(tmp_path, optimizers, dtype):
    def make_one(folder, seed):
        model = small_t5(seed, dropout=0.1).to(dtype)
        return make(folder, model=model, optimizers=optimizers)

    torch.manual_seed(1)
    one = make_one(tmp_path / "a", 1)
    one.fit(12, every=4)
    make_one(tmp_path / "b", 1).fit(8, every=4)
    two = make_one(tmp_path / "b", 2)
    assert two.resume() and two.step == 8
    two.fit(12, every=4)
    assert same_weights(one, two) and one.history == two.history
    for a, b in zip(one.optimizers, two.optimizers):
        assert str(a.state_dict()) == str(b.state_dict())


def test_resuming_in_the_same_process(run, straight):
    trainer = make(run, seed=1)
    trainer.resume()
    trainer.fit(11, every=3)
    assert trainer.resume(step=9) and trainer.step == 9
    trainer.fit(20, every=5)
    assert same_weights(trainer, straight)

"""The training loop, and exact resuming."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from t5_book import T5
from t5_book.batches import Batch
from t5_book.evaluation import evaluate
from t5_book.losses import batch_loss
from t5_book.optimizers import adafactor, muon_adamw
from t5_book.packing import pack
from t5_book.schedules import linear_schedule
from t5_book.training import Trainer
from tests import conftest
from tests.conftest import refuses

pytestmark = pytest.mark.rounding

small_t5 = partial(conftest.small_t5, num_tokens=16, dim_head=8, dropout=0.1)
RATES = [[0.005], [0.05, 0.3]]  # of muon_adamw


def batches(step):
    generator = torch.Generator().manual_seed(step)
    src = torch.randint(2, 16, (4, 7), generator=generator)
    labels = src[:, :5].clone()
    labels[0, 3:] = -100
    return Batch(src, torch.ones_like(src).bool(), labels)


def measure(model):
    return evaluate(model, [batches(99)])


def make_trainer(folder=None, seed=0, optimizers=muon_adamw, clip=1.0):
    model = small_t5(seed)
    options = dict(schedule=linear_schedule(20, 3), clip=clip, folder=folder)
    return Trainer(model, batches, optimizers(model), **options)


# --- The loop -------------------------------------------------------------


def test_records_hold_means_of_losses_and_of_norms_before_clipping():
    model, batch = small_t5(), batches(0)
    model.loss(batch.src, batch.labels, batch.mask).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    history = make_trainer(clip=0.01).fit(5, every=3)

    trainer, clipped = make_trainer(clip=0.01), []

    def note(*_):
        grads = [p.grad for p in trainer.model.parameters()]
        clipped.append(torch.nn.utils.get_total_norm(grads).item())

    trainer.optimizers[0].register_step_pre_hook(note)
    found = [(trainer.train_step(), trainer.gradient_norm) for _ in range(5)]
    assert clipped == pytest.approx([0.01] * 5, rel=0.01)
    assert found[0][1] == pytest.approx(norm.item(), rel=1e-6)
    for record, part in zip(history, [found[:3], found[3:]], strict=True):
        means = [sum(values) / len(part) for values in zip(*part)]
        kept = record["train_loss"], record["gradient_norm"]
        assert kept == pytest.approx(tuple(means), rel=1e-12)


def test_every_step_trains_with_dropout():
    """Though ``measure``, or the caller, has switched it off."""
    trainer, modes = make_trainer(), []
    trainer.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))

    def measure_carelessly(model):
        model.eval()
        return {}

    trainer.fit(4, measure_carelessly, every=1)
    trainer.model.eval()
    trainer.train_step()
    assert modes == [True] * 5


def test_every_rate_follows_the_schedule_in_a_second_trainer_too():
    model = small_t5()
    optimizers = muon_adamw(model)
    for factor in (linear_schedule(20, 3), linear_schedule(10, 2), None):
        options = {} if factor is None else {"schedule": factor}
        trainer = Trainer(model, batches, optimizers, **options)
        for step in range(6):
            trainer.fit(step + 1)
            share = 1.0 if factor is None else factor(step)
            for optimizer, rates in zip(optimizers, RATES, strict=True):
                found = [(g["initial_lr"], g["lr"]) for g in optimizer.param_groups]
                assert found == [(rate, rate * share) for rate in rates]


def test_gradients_of_weights_without_optimizer_do_not_add_up():
    model = small_t5(dropout=0.0)
    trainer = Trainer(model, lambda step: batches(0), [], clip=1e9)
    trainer.train_step()
    first = model.head.weight.grad.clone()
    trainer.fit(3)
    assert torch.allclose(model.head.weight.grad, first, atol=1e-6)


def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(tmp_path):
    def without_slope(model, batch):  # the root has none at zero
        return batch_loss(model, batch) + (model.head.weight.sum() * 0).abs().sqrt()

    empty = batches(0)._replace(labels=torch.full((4, 5), -100))
    for source, loss in [(batches, without_slope), (lambda step: empty, batch_loss)]:
        model = small_t5()
        trainer = Trainer(model, source, muon_adamw(model), loss=loss, folder=tmp_path)
        before = [p.clone() for p in model.parameters()]
        words = "nan", "at step 0", "empty batch"
        refuses(lambda: trainer.fit(1), *words, error=FloatingPointError)
        assert all(map(torch.equal, before, model.parameters()))
        assert not (tmp_path / "checkpoint.pt").exists()


def test_every_and_clip_are_positive():
    trainer = make_trainer()
    for every in (0, -1, 2.5, "10", True):
        refuses(lambda: trainer.fit(2, every=every), "every is")
    assert trainer.step == 0
    for clip in (0, -1.0, math.nan):
        refuses(lambda: Trainer(small_t5(), batches, [], clip=clip), f"clip is {clip}")


def train(batches, **loss):
    model = small_t5(dropout=0.0)
    trainer = Trainer(model, batches, muon_adamw(model), **loss)
    return model, [trainer.train_step() for _ in range(4)]


def packed_batches(step):
    return pack([batches(step)], 14, 12)


def test_packed_rows_train_as_plain_rows_do():
    (one, plain), (two, packed) = train(batches), train(packed_batches)
    assert packed == pytest.approx(plain, abs=1e-4)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.allclose(a, b, atol=1e-3)


def test_the_loss_that_was_asked_for_is_trained_with():
    loss = partial(batch_loss, label_smoothing=0.1, z_loss=0.1)
    fresh, (model, losses) = small_t5(dropout=0.0), train(batches, loss=loss)
    assert losses[0] == pytest.approx(loss(fresh, batches(0)).item(), abs=1e-6)
    assert abs(losses[0] - batch_loss(fresh, batches(0)).item()) > 0.1
    assert loss(model, batches(0)) < loss(fresh, batches(0)) - 0.1


@pytest.mark.parametrize("kind", [batches, packed_batches])
def test_every_part_of_a_batch_goes_to_the_device(kind):
    """A device that holds no numbers shows whatever stayed behind."""

    def loss(model, batch):
        assert type(batch) is type(kind(0)) and all(part.is_meta for part in batch)
        raise InterruptedError

    trainer = Trainer(small_t5().to("meta"), kind, [], loss=loss)
    with pytest.raises(InterruptedError):
        trainer.train_step()


# --- Checkpoints: saving and resuming ---------------------------------------

SIDE = dict(num_tokens=16, depth=1, heads=2, dim_head=8, mlp_mult=2)


def state_of(trainer):
    """All that ``resume`` may change, as plain numbers and copies."""
    weights = [weight.clone() for weight in trainer.model.parameters()]
    optimizers = [str(o.state_dict()) for o in trainer.optimizers]
    random = torch.get_rng_state()
    return weights, optimizers, random, trainer.step, list(trainer.history)


def same_state(one, two):
    return (
        all(map(torch.equal, one[0], two[0]))
        and one[1] == two[1]
        and torch.equal(one[2], two[2])
        and one[3:] == two[3:]
    )


def refused(trainer, match):
    """``resume`` must raise, and change nothing."""
    before = state_of(trainer)
    with pytest.raises(ValueError, match=match):
        trainer.resume()
    assert same_state(before, state_of(trainer))


@pytest.mark.parametrize("optimizers", [muon_adamw, adafactor])
def test_resuming_is_exact(tmp_path, optimizers):
    straight = make_trainer(tmp_path / "a", 1, optimizers)
    straight.fit(20, measure, every=4)
    make_trainer(tmp_path / "b", 1, optimizers).fit(8, measure, every=4)
    resumed = make_trainer(tmp_path / "b", 2, optimizers)
    assert resumed.resume() and resumed.step == 8
    resumed.fit(20, measure, every=4)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    assert straight.history == resumed.history


def test_nothing_to_resume(tmp_path):
    assert make_trainer(tmp_path / "none").resume() is False
    assert make_trainer().resume() is False


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_damaged_checkpoints_are_clear_errors(tmp_path):
    """Cut anywhere, or of something else; the trainer stays as it was."""
    make_trainer(tmp_path).fit(2)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    broken = [whole[:n] for n in range(0, len(whole), len(whole) // 20)]
    for held in ([1, 2], 3, torch.ones(2), small_t5().state_dict()):
        torch.save(held, path)
        broken.append(path.read_bytes())
    for data in broken:
        path.write_bytes(data)
        refused(make_trainer(tmp_path), "checkpoint.pt .*not a checkpoint")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), OSError(5, "I/O error"), MemoryError()]
)
def test_a_good_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path, error, monkeypatch
):
    make_trainer(tmp_path).fit(2)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        make_trainer(tmp_path).resume()


def test_no_error_advises_to_delete_a_file(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError) as caught:
        make_trainer(tmp_path).resume()
    assert "delete" not in str(caught.value) and "folder" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("step", "ten"),
        ("history", None),
        ("model", 3),
        ("optimizers", {}),
        ("places", "Muon"),
        ("rng", [1]),
        ("cuda_rng", None),
    ],
)
def test_parts_of_another_type_are_refused(tmp_path, part, value):
    make_trainer(tmp_path).fit(2)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {part: value}, path)
    refused(make_trainer(tmp_path), f"not a checkpoint.* no {part};")
    del state[part]
    torch.save(state, path)
    refused(make_trainer(tmp_path), f"not a checkpoint.* no {part};")


def test_a_checkpoint_of_other_optimizers_is_refused(tmp_path):
    make_trainer(tmp_path, optimizers=adafactor).fit(2)
    refused(make_trainer(tmp_path), "Adafactor.*Muon")
    refused(make_trainer(tmp_path, optimizers=lambda model: []), "Adafactor.*missing")


def in_one_group(model):
    muon, adamw = muon_adamw(model)
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    return [muon, torch.optim.AdamW(parameters)]


def in_another_order(model):
    muon, adamw = muon_adamw(model)
    parameters = muon.param_groups[0]["params"]
    # two matrices of the same shape: no shape would show it
    i, j = 0, 1
    assert parameters[i].shape == parameters[j].shape
    parameters[i], parameters[j] = parameters[j], parameters[i]
    return [muon, adamw]


def with_an_empty_group(model):
    muon, adamw = muon_adamw(model)
    adamw.add_param_group({"params": []})
    return [muon, adamw]


@pytest.mark.parametrize(
    ("optimizers", "match"),
    [
        (in_one_group, "group 1.*group 0"),
        (in_another_order, "parameter 0"),
        (with_an_empty_group, "missing.*nothing.*group 2"),
    ],
)
def test_parameters_in_other_places_are_refused(tmp_path, optimizers, match):
    make_trainer(tmp_path).fit(2)
    refused(make_trainer(tmp_path, optimizers=optimizers), match)


def test_a_checkpoint_with_too_few_optimizers_is_refused(tmp_path):
    make_trainer(tmp_path).fit(2)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["optimizers"].pop()
    torch.save(state, path)
    refused(make_trainer(tmp_path), "1 optimizers.* 2")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(dim=24), r"enc_emb.*\(16, 16\).*\(16, 24\)"),
        (dict(enc_depth=2), "encoder.blocks.1.* missing in the file"),
        (dict(dec_depth=2), "decoder.blocks.1.* missing in the file"),
        (dict(enc_heads=4), r"\(16, 16\).*\(32, 16\)"),
        (dict(enc_num_tokens=20, dec_num_tokens=20), r"\(16, 16\).*\(20, 16\)"),
        (dict(feed_forward="gated-gelu"), "missing"),
    ],
)
def test_another_model_is_refused_before_anything_changes(tmp_path, change, match):
    make_trainer(tmp_path).fit(2)
    sides = {f"{s}_{k}": v for s in ("enc", "dec") for k, v in SIDE.items()}
    model = T5(**dict(dim=16, **sides) | change)
    refused(Trainer(model, batches, muon_adamw(model), folder=tmp_path), match)


def test_a_model_of_another_dtype_is_refused(tmp_path):
    make_trainer(tmp_path).fit(2)
    model = small_t5().bfloat16()
    trainer = Trainer(model, batches, muon_adamw(model), folder=tmp_path)
    refused(trainer, "float32.*bfloat16")


def with_gpus(path, number):
    """Give a checkpoint the random states of so many GPUs."""
    state = torch.load(path, weights_only=True)
    state["cuda_rng"] = [torch.get_rng_state()] * number
    torch.save(state, path)


def test_a_checkpoint_of_more_gpus_is_refused(tmp_path, monkeypatch):
    make_trainer(tmp_path).fit(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with_gpus(tmp_path / "checkpoint.pt", 3)
    refused(make_trainer(tmp_path), "3 GPUs.* 2 ")


def test_random_states_of_as_many_gpus_are_restored(tmp_path, monkeypatch):
    make_trainer(tmp_path).fit(2)
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", seen.extend)
    with_gpus(tmp_path / "checkpoint.pt", 2)
    assert make_trainer(tmp_path).resume()
    assert len(seen) == 2


def test_rates_after_resuming_are_those_of_the_file(tmp_path):
    make_trainer(tmp_path).fit(8)
    trainer = make_trainer(
        tmp_path, optimizers=lambda model: muon_adamw(model, lr=1.0, table_lr=2.0)
    )
    assert trainer.resume()
    trainer.train_step()
    factor = linear_schedule(20, 3)(8)
    for optimizer, rates in zip(trainer.optimizers, [[0.005], [0.05, 0.3]]):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            assert group["initial_lr"] == rate
            assert group["lr"] == rate * factor


def test_resuming_in_the_same_process_after_an_interrupt(tmp_path):
    """What the interrupted step left in the gradients does not count."""
    straight = make_trainer(tmp_path / "one")
    straight.fit(6, every=2)
    stopped, steps = make_trainer(tmp_path / "two"), []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt

    stopped.optimizers[0].register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(6, every=2)
    assert stopped.resume() and stopped.step == 2
    stopped.fit(6, every=2)
    pairs = zip(straight.model.parameters(), stopped.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.fit(2)

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(torch, "save", full_disk)
        trainer.fit(4)
    again = make_trainer(tmp_path, seed=1)
    assert again.resume() and again.step == 2


def test_a_record_holds_plain_numbers(tmp_path):
    """So that the checkpoint can be read without running code."""
    numbers = {
        "double": np.float64(0.75), "single": np.float32(0.75),
        "tensor": torch.tensor(0.75),
    }  # fmt: skip
    trainer = make_trainer(tmp_path)
    trainer.fit(2, lambda model: numbers)
    again = make_trainer(tmp_path)
    assert again.resume() and again.history == trainer.history
    assert all(again.history[0][name] == 0.75 for name in numbers)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"step": 1, "history": Evil()}, tmp_path / "checkpoint.pt")
    refused(make_trainer(tmp_path), "not a checkpoint")
    assert not (tmp_path / "evil").exists()


def test_the_log_holds_the_history(tmp_path):
    history = make_trainer(tmp_path).fit(5, measure, every=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [record["step"] for record in history] == [2, 4, 5]
    names = {"step", "train_loss", "gradient_norm", "loss", "accuracy"}
    assert set(history[0]) == names

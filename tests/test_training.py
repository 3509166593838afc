"""The training loop, and exact resuming."""

import math
from functools import partial

import pytest
import torch

from t5_book.batches import Batch
from t5_book.evaluation import evaluate
from t5_book.losses import batch_loss
from t5_book.optimizers import muon_adamw
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
        assert not list(tmp_path.glob("step-*"))


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

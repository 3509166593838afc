"""Chapter 18: evaluation, the loop, and exact resuming."""

import json

import pytest
import torch

from t5_book import T5
from t5_book.optimizers import adafactor, linear_schedule, muon_adamw
from t5_book.span_corruption import Batch
from t5_book.training import Trainer, evaluate

SIDE = dict(num_tokens=16, depth=1, heads=2, dim_head=8, mlp_mult=2)


def small_t5(seed=0, dropout=0.1):
    torch.manual_seed(seed)
    sides = {f"{s}_{k}": v for s in ("enc", "dec") for k, v in SIDE.items()}
    return T5(dim=16, dropout=dropout, **sides)


def batches(step):
    generator = torch.Generator().manual_seed(step)
    src = torch.randint(2, 16, (4, 7), generator=generator)
    labels = src[:, :5].clone()
    labels[0, 3:] = -100
    return Batch(src, torch.ones_like(src).bool(), labels)


def measure(model):
    return evaluate(model, [batches(99)])


def make_trainer(folder=None, seed=0, optimizers=muon_adamw):
    model = small_t5(seed)
    return Trainer(
        model,
        batches,
        optimizers(model),
        schedule=linear_schedule(20, 3),
        folder=folder,
    )


def test_evaluate_counts_tokens_and_not_batches():
    model = small_t5()
    full, short = batches(0), batches(1)
    short = Batch(short.src[:1], short.mask[:1], short.labels[:1])
    both = evaluate(model, [full, short])
    model.eval()
    with torch.no_grad():
        losses = [model.loss(b.src, b.labels, b.mask) for b in (full, short)]
    counts = [(b.labels != -100).sum() for b in (full, short)]
    mean = sum(x * n for x, n in zip(losses, counts)) / sum(counts)
    assert both["loss"] == pytest.approx(mean.item(), abs=1e-5)


def test_evaluate_switches_dropout_off_and_on_again():
    model = small_t5(dropout=0.5)
    assert evaluate(model, [batches(0)]) == evaluate(model, [batches(0)])
    assert model.training


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


def test_a_broken_checkpoint_is_a_clear_error(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint of a Trainer"):
        make_trainer(tmp_path).resume()


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"step": 1, "history": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a Trainer"):
        make_trainer(tmp_path).resume()
    assert not (tmp_path / "evil").exists()


def test_the_log_holds_the_history(tmp_path):
    history = make_trainer(tmp_path).fit(5, measure, every=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [record["step"] for record in history] == [2, 4, 5]
    assert set(history[0]) == {"step", "train_loss", "loss", "accuracy"}


def test_the_gradient_is_clipped():
    trainer = make_trainer()
    trainer.clip = 0.01
    norms = []

    def note(*_):
        grads = [p.grad for p in trainer.model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    trainer.optimizers[0].register_step_pre_hook(note)
    trainer.fit(3)
    assert len(norms) == 3 and max(norms) < 0.0101


def test_a_loss_that_is_not_finite_stops_the_training():
    trainer = make_trainer()
    torch.nn.init.constant_(trainer.model.enc_emb.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        trainer.fit(1)


def test_a_small_t5_learns_one_batch_by_heart():
    model = small_t5(dropout=0.0)
    trainer = Trainer(model, lambda step: batches(0), muon_adamw(model))
    trainer.fit(150)
    assert evaluate(model, [batches(0)])["accuracy"] == 1.0


def test_every_rate_follows_the_schedule():
    trainer = make_trainer()
    for step in range(2):
        trainer.fit(step + 1)
        factor = linear_schedule(20, 3)(step)
        for optimizer, rates in zip(trainer.optimizers, trainer.rates):
            now = [group["lr"] for group in optimizer.param_groups]
            assert now == pytest.approx([rate * factor for rate in rates])
    assert trainer.rates == [[0.005], [0.05, 0.3]]

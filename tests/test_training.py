"""Losses, evaluation, the training loop, and exact resuming."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from t5_book import T5
from t5_book.batches import Batch
from t5_book.evaluation import evaluate
from t5_book.losses import batch_loss, cross_entropy
from t5_book.optimizers import muon_adamw
from t5_book.packing import PackedBatch, batch_logits, pack
from t5_book.schedules import linear_schedule
from t5_book.training import Trainer

pytestmark = pytest.mark.rounding

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


def test_gradients_of_weights_without_optimizer_do_not_add_up():
    model = small_t5(dropout=0.0)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.0)
    trainer = Trainer(model, lambda step: batches(0), [optimizer], clip=1e9)
    trainer.fit(1)
    first = model.head.weight.grad.clone()
    trainer.fit(3)
    assert torch.allclose(model.head.weight.grad, first, atol=1e-6)


def test_records_hold_means_since_the_last_one():
    one, two = make_trainer(), make_trainer()
    losses, norms = [], []
    for _ in range(5):
        losses.append(one.train_step())
        norms.append(one.gradient_norm)
    torch.manual_seed(0)
    two = make_trainer()
    history = two.fit(5, every=3)
    for record, part in zip(history, [slice(0, 3), slice(3, 5)], strict=True):
        for name, values in ("train_loss", losses), ("gradient_norm", norms):
            mean = sum(values[part]) / len(values[part])
            assert record[name] == pytest.approx(mean, rel=1e-12)


def test_the_norm_in_the_record_is_that_before_clipping():
    trainer = make_trainer()
    trainer.clip = 0.01
    [record] = trainer.fit(1)
    model, batch = small_t5(), batches(0)
    loss = model.loss(batch.src, batch.labels, batch.mask)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)


def test_every_step_trains_with_dropout():
    """Though ``measure``, or the caller, has switched it off."""
    trainer, modes = make_trainer(), []
    trainer.loss = lambda model, batch: modes.append(model.training) or batch_loss(
        model, batch
    )

    def measure_carelessly(model):
        model.eval()
        return {}

    trainer.fit(4, measure_carelessly, every=1)
    trainer.model.eval()
    trainer.train_step()
    assert modes == [True] * 5


@pytest.mark.parametrize("every", [0, -1, 2.5, "10", True])
def test_every_is_a_positive_integer(every):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="every is"):
        trainer.fit(2, every=every)
    assert trainer.step == 0


@pytest.mark.parametrize("clip", [0, -1.0, math.nan])
def test_clip_is_positive(clip):
    with pytest.raises(ValueError, match=f"clip is {clip}"):
        Trainer(small_t5(), batches, [], clip=clip)


def test_the_schedule_climbs_and_falls_to_zero():
    factor = linear_schedule(steps=10, warmup=4)
    values = [factor(step) for step in range(12)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[3:11] == sorted(values[3:11], reverse=True)
    assert values[10:] == [0, 0]


@pytest.mark.parametrize("warmup", [0, 10, 11])
def test_a_warmup_outside_the_run_is_an_error(warmup):
    with pytest.raises(ValueError, match=f"warmup is {warmup} .* 10 steps"):
        linear_schedule(steps=10, warmup=warmup)


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


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    def loss(model, batch):  # the root has no slope at zero
        plain = model.loss(batch.src, batch.labels, batch.mask)
        return plain + (model.head.weight.sum() * 0).abs().sqrt()

    model = small_t5()
    trainer = Trainer(
        model, batches, muon_adamw(model), loss=loss, folder=tmp_path
    )
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        trainer.fit(1)
    assert all(map(torch.equal, before, model.parameters()))
    assert not list(tmp_path.glob("step-*"))


def test_an_empty_batch_is_named_as_a_cause():
    empty = batches(0)._replace(labels=torch.full((4, 5), -100))
    model = small_t5()
    trainer = Trainer(model, lambda step: empty, muon_adamw(model))
    with pytest.raises(FloatingPointError, match="empty batch"):
        trainer.fit(1)


def test_evaluate_needs_a_label():
    model = small_t5()
    batch = batches(0)
    for nothing in [], [batch._replace(labels=batch.labels * 0 - 100)]:
        with pytest.raises(ValueError, match="no label"):
            evaluate(model, nothing)


def test_evaluate_sums_in_float32():
    """In half precision a sum of a few thousand nats loses its digits."""
    model = small_t5().bfloat16().eval()
    many = [batches(step) for step in range(200)]
    sources, labels = [torch.cat([b[i] for b in many]) for i in (0, 2)]
    mask = torch.ones_like(sources).bool()
    with torch.no_grad():
        logits = batch_logits(model, Batch(sources, mask, labels)).double()
    exact = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = evaluate(model, [Batch(sources, mask, labels.int())])
    assert found["loss"] == pytest.approx(exact.item(), rel=1e-6)


def test_a_second_trainer_begins_with_the_first_rates():
    model = small_t5()
    optimizers = muon_adamw(model)
    for _ in range(2):
        trainer = Trainer(
            model, batches, optimizers, schedule=linear_schedule(10, 2)
        )
        trainer.fit(9)
        assert kept_rates(trainer) == [[0.005], [0.05, 0.3]]


def kept_rates(trainer):
    return [[g["initial_lr"] for g in o.param_groups] for o in trainer.optimizers]


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
        for optimizer, rates in zip(trainer.optimizers, [[0.005], [0.05, 0.3]]):
            now = [group["lr"] for group in optimizer.param_groups]
            assert now == [rate * factor for rate in rates]
    assert kept_rates(trainer) == [[0.005], [0.05, 0.3]]


# --- The loss of t5x --------------------------------------------------------


def slowly(logits, labels, smoothing=0.0, z_loss=0.0):
    """t5x's compute_weighted_cross_entropy, one number at a time."""
    total, count = 0.0, 0
    for scores, label in zip(logits.flatten(0, 1).tolist(), labels.flatten()):
        if label == -100:
            continue
        v, log_z = len(scores), math.log(sum(map(math.exp, scores)))
        on, off = 1.0 - smoothing, smoothing / (v - 1)
        target = [on if i == label else off for i in range(v)]
        total -= sum(p * (s - log_z) for p, s in zip(target, scores))
        total += sum(p * math.log(p) for p in target if p > 0)
        total += z_loss * log_z**2
        count += 1
    return total / count


def drawn(seed=0, v=16):
    torch.manual_seed(seed)
    labels = torch.randint(0, v, (3, 7))
    labels[1, 4:] = labels[2, 1:] = -100
    return (2 * torch.randn(3, 7, v)).double() + 1, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("v", [2, 16, 130])
def test_cross_entropy_by_loop(smoothing, z_loss, v):
    logits, labels = drawn(v=v)
    ours = cross_entropy(logits, labels, smoothing, z_loss)
    assert abs(ours - slowly(logits, labels, smoothing, z_loss)) < 1e-12


def test_labels_are_whole_numbers():
    with pytest.raises(TypeError, match="float32"):
        cross_entropy(torch.randn(2, 3, 16), torch.full((2, 3), 0.7))


def test_without_extras_it_is_that_of_pytorch_and_of_the_model():
    logits, labels = drawn()
    theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(cross_entropy(logits, labels), theirs, rtol=1e-14)
    model, batch = small_t5(dropout=0.0), batches(0)
    own = model.loss(batch.src, batch.labels, batch.mask)
    assert torch.equal(batch_loss(model, batch), own)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_is_that_of_pytorch_but_for_two_things(smoothing):
    """PyTorch gives the label a share, too, and leaves the entropy in."""
    logits, labels = drawn()
    theirs = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        label_smoothing=smoothing * 16 / 15,
    )
    off = smoothing / 15
    entropy = -(1 - smoothing) * math.log(1 - smoothing)
    entropy -= smoothing * math.log(off)
    ours = cross_entropy(logits, labels, smoothing)
    assert torch.allclose(ours, theirs - entropy, rtol=1e-12)


def test_gradient_is_that_which_t5x_writes_by_hand():
    """(1 + 2 z log Z) softmax - target, of its cross_entropy_with_logits."""
    logits, labels = drawn()
    logits.requires_grad_()
    cross_entropy(logits, labels, 0.1, 0.01).backward()
    real = (labels != -100)[..., None]
    target = torch.full_like(logits, 0.1 / 15)
    target.scatter_(-1, labels.clamp(min=0)[..., None], 0.9)
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    expected = (1 + 0.02 * log_z) * logits.softmax(dim=-1) - target
    expected = (expected * real / real.sum()).detach()
    assert torch.allclose(logits.grad, expected, rtol=0, atol=1e-15)


def test_labels_of_minus_100_do_not_count():
    logits, labels = drawn()
    plain = cross_entropy(logits, labels, 0.1, 1e-4)
    logits[labels == -100] = 50.0
    assert torch.equal(cross_entropy(logits, labels, 0.1, 1e-4), plain)


def test_half_precision_is_summed_in_float32():
    logits, labels = drawn(v=2000)
    half = logits.bfloat16()
    ours = cross_entropy(half, labels, 0.1, 1e-4)
    expected = cross_entropy(half.double(), labels, 0.1, 1e-4)
    assert ours.dtype == torch.float32
    assert abs(ours - expected) < 1e-5


@pytest.mark.parametrize("smoothing", [-0.1, 15 / 16, 1.0, 10, math.nan])
def test_a_smoothing_that_hides_the_label_is_refused(smoothing):
    """From 15/16 on, each of 15 other ids would be as likely as the label."""
    with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}"):
        cross_entropy(*drawn(), label_smoothing=smoothing)


def test_labels_that_do_not_fit_are_refused():
    logits, labels = drawn()
    with pytest.raises(ValueError, match=r"shape \(3, 7, 16\).*\(3, 6\)"):
        cross_entropy(logits, labels[:, :6])
    with pytest.raises(IndexError, match="0 to 16"):
        cross_entropy(logits, 16 * torch.eye(3, 7).long())


# --- Any loss, any batch ----------------------------------------------------


def packed_batches(step):
    return pack([batches(step)], 14, 12)


def train(batches, **loss):
    model = small_t5(dropout=0.0)
    trainer = Trainer(model, batches, muon_adamw(model), **loss)
    return model, [trainer.train_step() for _ in range(4)]


def test_packed_rows_train_as_plain_rows_do():
    assert packed_batches(0).src.shape == (2, 14)
    one, plain = train(batches)
    two, packed = train(packed_batches)
    assert packed == pytest.approx(plain, abs=1e-4)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.allclose(a, b, atol=1e-3)


def test_the_loss_that_was_asked_for_is_trained_with():
    _, plain = train(batches)
    loss = partial(batch_loss, label_smoothing=0.1, z_loss=0.1)
    model, other = train(batches, loss=loss)
    with torch.no_grad():
        expected = loss(small_t5(dropout=0.0), batches(0)).item()
    assert other[0] == pytest.approx(expected, abs=1e-6)
    assert abs(other[0] - plain[0]) > 0.1
    log_z = batch_logits(model, batches(0)).logsumexp(dim=-1)
    assert log_z.abs().mean() < log_z_of(small_t5(dropout=0.0))


def log_z_of(model):
    return batch_logits(model, batches(0)).logsumexp(dim=-1).abs().mean()


def test_evaluate_takes_packed_rows():
    model = small_t5(dropout=0.5)
    plain, packed = (evaluate(model, [b(3)]) for b in (batches, packed_batches))
    assert packed == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("kind", [batches, packed_batches])
def test_every_part_of_a_batch_goes_to_the_device(kind):
    """A device that holds no numbers shows whatever stayed behind."""
    model = small_t5(dropout=0.0).to("meta")
    seen = []

    def loss(model, batch):
        seen.append(batch)
        raise InterruptedError

    trainer = Trainer(model, kind, [], loss=loss)
    with pytest.raises(InterruptedError):
        trainer.train_step()
    assert type(seen[0]) is type(kind(0))
    assert all(part.is_meta for part in seen[0])
    assert isinstance(seen[0], Batch | PackedBatch)

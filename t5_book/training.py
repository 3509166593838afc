"""Training: evaluation, and a loop that can be stopped and resumed.

Built in chapter 18, "Set up the training" (chapters/training.md). Edit the
chapter, not this file.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm.auto import tqdm

from t5_book.batches import Batch
from t5_book.checks import check_ids
from t5_book.inference import evaluating
from t5_book.packing import PackedBatch, batch_logits

__all__ = ["Trainer", "cross_entropy", "evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch | PackedBatch]
) -> dict:
    """Measure a ``T5`` on batches, without dropout.

    Args:
        model: the ``T5``.
        batches: what to measure it on; labels of -100 do not count.

    Returns:
        ``loss``, nats per target token, and ``accuracy``, the share of
        target tokens whose most likely choice is right, teacher-forced.

    Raises:
        ValueError: if the batches hold no label that counts.

    Built in chapter 18, "Set up the training".
    """
    loss, right, count = 0.0, 0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            batch = batch._make(part.to(device) for part in batch)
            real = batch.labels != -100
            logits = batch_logits(model, batch)[real].float()  # [n v]
            labels = batch.labels[real].long()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(dim=-1) == labels).sum().item()
            count += len(labels)
    if count == 0:
        raise ValueError("no label to measure; are the batches used up?")
    return {"loss": loss / count, "accuracy": right / count}


class Trainer:
    """Train a T5, with evaluation, logging, checkpoints and resuming.

    Args:
        model: the ``T5`` to train, on the device where it shall train.
        batches: a function from the step, counted from 0, to its
            ``Batch``. The same step must give the same batch.
        optimizers: which together step with the model's parameters.
        schedule: from the step to a factor on every learning rate;
            default: always 1.
        loss: from model and batch to what shall be small; default: the
            model's own loss, which wants a ``Batch``.
        clip: longest gradient, as the norm over all weights; default 1.
        folder: where ``checkpoint.pt`` and ``log.jsonl`` are kept;
            default: nothing is saved.

    Built in chapter 18, "Set up the training".
    """

    def __init__(
        self, model: nn.Module, batches: Callable[[int], Batch],
        optimizers: Sequence[Optimizer], *,
        schedule: Callable[[int], float] = lambda step: 1.0,
        loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: (
            model.loss(batch.src, batch.labels, batch.mask)
        ),
        clip: float = 1.0, folder: str | Path | None = None,
    ):
        self.model, self.batches = model, batches
        self.optimizers, self.schedule = optimizers, schedule
        self.loss, self.clip = loss, clip
        self.folder = None if folder is None else Path(folder)
        self.rates = [
            [g.setdefault("initial_lr", g["lr"]) for g in o.param_groups]
            for o in optimizers
        ]
        self.step = 0
        self.history: list[dict] = []

    def train_step(self) -> float:
        """Learn from the batch of this step; return its loss.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite;
                the weights are then as they were.
        """
        device = next(self.model.parameters()).device
        batch = self.batches(self.step)
        batch = batch._make(part.to(device) for part in batch)
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * self.schedule(self.step)
        self.model.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not (loss + norm).isfinite():
            wrong = f"the loss is {loss.item()}, its gradient {norm.item()}"
            hint = "lower the learning rate, or look for an empty batch"
            raise FloatingPointError(f"{wrong} at step {self.step}; {hint}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write checkpoint and log, if the trainer has a folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "kinds": [type(o).__name__ for o in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.folder / "checkpoint.pt")
        lines = [json.dumps(record) + "\n" for record in self.history]
        (self.folder / "log.jsonl").write_text("".join(lines))

    def fit(
        self, steps: int,
        measure: Callable[[nn.Module], dict] = lambda model: {},
        every: int = 100,
    ) -> list[dict]:
        """Train until ``steps`` steps are done, in all.

        Args:
            steps: where to stop, counted from the very first step.
            measure: what to add to a record; default: nothing.
            every: steps between two records, each of which is also saved.

        Returns:
            The history: records with ``step``, ``train_loss`` (mean since
            the last record) and what ``measure`` returns.
        """
        losses = []
        bar = tqdm(total=steps, initial=self.step, desc="Training")
        self.model.train()
        while self.step < steps:
            losses.append(self.train_step())
            bar.update()
            if self.step % every == 0 or self.step == steps:
                train_loss = sum(losses) / len(losses)
                record = {"step": self.step, "train_loss": train_loss}
                record |= measure(self.model)
                text = json.dumps(record, default=float)
                self.history.append(json.loads(text))  # plain numbers
                self.save()
                bar.set_postfix(loss=f"{train_loss:.3f}")
                losses = []
        bar.close()
        return self.history

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder, if there is one.

        Returns:
            Whether there was a checkpoint.

        Raises:
            ValueError: if the file there is not a trainer's checkpoint, or
                one of other optimizers.
            RuntimeError: if it holds a model of another shape.
        """
        path = self.folder / "checkpoint.pt" if self.folder else None
        if path is None or not path.exists():
            return False
        model, optimizers, rng, cuda_rng, *rest = self._read(path)
        self.model.load_state_dict(model)
        for optimizer, saved in zip(self.optimizers, optimizers):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(rng)
        torch.cuda.set_rng_state_all(cuda_rng)
        self.step, self.history = rest
        return True

    def _read(self, path: Path) -> list:
        """What a checkpoint for these optimizers holds, in order."""
        names = "model", "optimizers", "rng", "cuda_rng", "step", "history"
        kinds = [type(optimizer).__name__ for optimizer in self.optimizers]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found, values = state["kinds"], [state[name] for name in names]
        except Exception as error:  # damaged files break in many ways
            name = type(error).__name__
            wrong = f"is not a checkpoint of a Trainer ({name})"
        else:
            if found == kinds:
                return values
            wrong = f"is of a Trainer with {found}, not {kinds}"
        hint = "delete it to start from the beginning"
        raise ValueError(f"{path} {wrong}; {hint}")


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean cross-entropy in nats, smoothed and held in place as in t5x.

    ``logits [b t v]`` and ``labels [b t]``, -100 where one does not count.
    The other ids share ``label_smoothing``, and the entropy of such a
    target is subtracted; ``z_loss`` (1e-4 in t5x) weighs log(Z) squared.
    ValueError for shape or smoothing, IndexError or TypeError for a label.

    Built in chapter 18, "Set up the training" (t5x, ``losses.py``).
    """
    if not 0 <= label_smoothing < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, logits have shape "
            f"{tuple(logits.shape)} and labels {tuple(labels.shape)}; pass "
            "0 <= label_smoothing < 1, logits (b, t, v) and labels (b, t)"
        )
    real, v = labels != -100, logits.shape[-1]
    labels = labels.masked_fill(~real, 0)
    check_ids("label", labels, v)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    on, off = 1 - label_smoothing, label_smoothing / (v - 1)
    entropy = -on * math.log(on) - (v - 1) * off * math.log(off + 1e-20)
    log_z = logits.logsumexp(dim=-1)  # [b t]
    own = logits.gather(-1, labels[..., None].long())[..., 0]
    loss = log_z - (on - off) * own - off * logits.sum(dim=-1)
    loss = loss - entropy + z_loss * log_z**2
    return (loss * real).sum() / real.sum()

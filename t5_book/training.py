"""Training: evaluation, and a loop that can be stopped and resumed.

Built in chapter 18, "Set up the training" (chapters/18_training.md). Edit
the chapter, not this file.
"""

import json
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from t5_book.encoder import check_ids
from t5_book.generation import evaluating
from t5_book.objectives import PackedBatch, batch_logits
from t5_book.span_corruption import Batch

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

    Built in chapter 18, "Set up the training".
    """
    loss, right, count = 0.0, 0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            batch = batch._make(part.to(device) for part in batch)
            logits, labels = batch_logits(model, batch), batch.labels
            real = labels != -100
            loss += nn.functional.cross_entropy(
                logits[real], labels[real], reduction="sum"
            ).item()
            right += (logits.argmax(dim=-1) == labels)[real].sum().item()
            count += real.sum().item()
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
        self,
        model: nn.Module,
        batches: Callable[[int], Batch],
        optimizers: Sequence[Optimizer],
        *,
        schedule: Callable[[int], float] = lambda step: 1.0,
        loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: (
            model.loss(batch.src, batch.labels, batch.mask)
        ),
        clip: float = 1.0,
        folder: str | Path | None = None,
    ):
        self.model, self.batches = model, batches
        self.optimizers, self.schedule = optimizers, schedule
        self.loss, self.clip = loss, clip
        self.folder = None if folder is None else Path(folder)
        self.rates = [
            [group["lr"] for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self.step = 0
        self.history: list[dict] = []

    def train_step(self) -> float:
        """Learn from the batch of this step; return its loss.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        device = next(self.model.parameters()).device
        batch = self.batches(self.step)
        batch = batch._make(part.to(device) for part in batch)
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * self.schedule(self.step)
        loss = self.loss(self.model, batch)
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}; lower the "
                "learning rate or lengthen the warm-up"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
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
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.folder / "checkpoint.pt")
        lines = [json.dumps(record) + "\n" for record in self.history]
        (self.folder / "log.jsonl").write_text("".join(lines))

    def fit(
        self,
        steps: int,
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
                self.history.append(record | measure(self.model))
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
            ValueError: if the file there is not a trainer's checkpoint.
            RuntimeError: if it holds a model of another shape.
        """
        path = self.folder / "checkpoint.pt" if self.folder else None
        if path is None or not path.exists():
            return False
        errors = RuntimeError, KeyError, EOFError, pickle.PickleError
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.step, self.history = state["step"], state["history"]
        except errors as error:
            raise ValueError(
                f"{path} is not a checkpoint of a Trainer ({error}); "
                "delete it to start from the beginning"
            ) from error
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        return True


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean cross-entropy in nats, smoothed and held in place as in t5x.

    ``logits [b t v]`` and ``labels [b t]``, -100 where one does not count.
    The other ids share ``label_smoothing``, and the entropy of such a
    target is taken off; ``z_loss`` (1e-4 in t5x) weighs log(Z) squared.
    ValueError for a wrong shape or smoothing, IndexError for a wrong label.

    Built in chapter 18, "Set up the training" (t5x, ``losses.py``).
    """
    if not 0 <= label_smoothing < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, logits have shape "
            f"{tuple(logits.shape)} and labels {tuple(labels.shape)}; pass "
            "0 <= label_smoothing < 1, logits (b, t, v) and labels (b, t)"
        )
    real, v = labels != -100, logits.shape[-1]
    labels = labels.masked_fill(~real, 0).long()
    check_ids("label", labels, v)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    on, off = 1 - label_smoothing, label_smoothing / (v - 1)
    entropy = -on * math.log(on) - (v - 1) * off * math.log(off + 1e-20)
    log_z = logits.logsumexp(dim=-1)  # [b t]
    own = logits.gather(-1, labels[..., None])[..., 0]
    loss = log_z - (on - off) * own - off * logits.sum(dim=-1)
    loss = loss - entropy + z_loss * log_z**2
    return (loss * real).sum() / real.sum()

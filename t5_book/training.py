"""Training: a loop that logs, and that can be stopped and resumed.

Built in chapter 19, "A training loop that can be stopped and resumed"
(chapters/training.md). Edit the chapter, not this file.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from t5_book.batches import Batch
from t5_book.checkpoints import check_fit, places_of, read_checkpoint, write_checkpoint
from t5_book.checks import check_integer
from t5_book.losses import batch_loss
from t5_book.packing import PackedBatch

__all__ = ["Trainer"]


def full_rate(step: int) -> float:
    """The default schedule: the rates stay as they are."""
    return 1.0


def measure_nothing(model: nn.Module) -> dict:
    """The default measurement of ``Trainer.fit``."""
    return {}


class Trainer:
    """Train a ``T5``, with evaluation, logging, checkpoints and resuming.

    Args:
        model: the ``T5``, on the device where it is to be trained.
        batches: a function from the step, counted from 0, to its ``Batch`` or
            ``PackedBatch``. The same step must give the same batch.
        optimizers: those that together step with the model's parameters.
        schedule: from the step to a factor on every learning rate; default:
            always 1.
        loss: maps model and batch to the scalar to minimise; default:
            ``batch_loss``, the mean cross-entropy.
        clip: longest gradient, as the norm over all weights; default 1.
        folder: where ``checkpoint.pt`` and ``log.jsonl`` are kept; default:
            nothing is saved.

    Attributes:
        step: number of steps done.
        history: the records that ``fit`` has made.
        gradient_norm: norm of the last step's gradient, before clipping.

    Raises:
        ValueError: if ``clip`` is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], Batch | PackedBatch],
        optimizers: Sequence[Optimizer],
        *,
        schedule: Callable[[int], float] = full_rate,
        loss: Callable[[nn.Module, Batch | PackedBatch], Tensor] = batch_loss,
        clip: float = 1.0,
        folder: str | Path | None = None,
    ):
        if not clip > 0:
            raise ValueError(f"clip is {clip}; pass a number above 0")
        self.model = model
        self.batches = batches
        self.optimizers = optimizers
        self.schedule = schedule
        self.loss = loss
        self.clip = clip
        self.folder = None if folder is None else Path(folder)
        self.step = 0
        self.history: list[dict] = []
        self.gradient_norm = 0.0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def train_step(self) -> float:
        """Learn from the batch of this step; return its loss.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite; the
                weights are then as they were.
        """
        device = next(self.model.parameters()).device
        batch = self.batches(self.step).to(device)
        factor = self.schedule(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.model.train()
        self.model.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not (loss + norm).isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item():.4g}, its gradient {norm.item():.4g} at step "
                f"{self.step}; lower the learning rate, or look for an empty batch"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.gradient_norm = norm.item()
        self.step += 1
        return loss.item()

    def fit(
        self,
        steps: int,
        measure: Callable[[nn.Module], dict] = measure_nothing,
        every: int = 100,
    ) -> list[dict]:
        """Train until ``steps`` steps are done, in all.

        Args:
            steps: where to stop, counted from the very first step.
            measure: what to add to a record; default: nothing.
            every: steps between two records, each of which is also saved;
                default 100.

        Returns:
            The history: records with ``step``, ``train_loss`` and
            ``gradient_norm`` (means since the last record; the norm before
            clipping) and what ``measure`` returns.

        Raises:
            ValueError: if ``every`` is not an integer of at least 1.
            FloatingPointError: as ``train_step``.
        """
        check_integer("every", every, 1)
        losses, norms = [], []
        with tqdm(total=steps, initial=self.step, desc="Training") as bar:
            while self.step < steps:
                losses.append(self.train_step())
                norms.append(self.gradient_norm)
                bar.update()
                if self.step % every == 0 or self.step == steps:
                    record = {
                        "step": self.step,
                        "train_loss": sum(losses) / len(losses),
                        "gradient_norm": sum(norms) / len(norms),
                    }
                    record |= measure(self.model)
                    # Through JSON and back: a checkpoint holds plain numbers only.
                    self.history.append(json.loads(json.dumps(record, default=float)))
                    self.save()
                    bar.set_postfix(loss=f"{record['train_loss']:.3f}")
                    losses, norms = [], []
        return self.history

    def save(self) -> None:
        """Write checkpoint and log, if the trainer has a folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "places": places_of(self.model, self.optimizers),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        write_checkpoint(self.folder / "checkpoint.pt", state)
        lines = [json.dumps(record) + "\n" for record in self.history]
        (self.folder / "log.jsonl").write_text("".join(lines))

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder, if there is one.

        Weights, optimizers (with their rates), random numbers, step and history
        are then those of the file. Nothing changes if there's an error.

        Returns:
            Whether there was a checkpoint.

        Raises:
            OSError: if the file can't be read.
            ValueError: if it is damaged or no checkpoint, or if it is of another
                model, of other optimizers, or of more GPUs than there are.
        """
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return False
        path = self.folder / "checkpoint.pt"
        state = read_checkpoint(path)
        check_fit(path, state, self.model, self.optimizers)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step = state["step"]
        self.history = state["history"]
        return True

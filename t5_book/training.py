"""Training: a loop that logs, and that can be stopped and resumed.

Built in chapter 20, "A training loop that can be stopped and resumed"
(chapters/training.md). Edit the chapter, not this file.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from t5_book.batches import Batch
from t5_book.checkpoints import Checkpoints, Run, full_rate, rewinding
from t5_book.checks import check_integer
from t5_book.losses import batch_loss
from t5_book.packing import PackedBatch

__all__ = ["Trainer"]


def measure_nothing(model: nn.Module) -> dict:
    """The default measurement of ``Trainer.fit``."""
    return {}


class Trainer(Run):
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
        folder: where checkpoints and ``log.jsonl`` are kept; default: nothing
            is saved.
        keep: how many checkpoints stay there; default 3, the newest.

    Attributes:
        step: number of steps done.
        history: the records that ``fit`` has made.
        gradient_norm: norm of the last step's gradient, before clipping.
        checkpoints: those in the folder.
        quiet: if True, no progress bar; default False.

    Raises:
        ValueError: if ``clip`` is not above 0, or ``keep`` not at least 1.
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
        keep: int = 3,
    ):
        if not clip > 0:
            raise ValueError(f"clip is {clip}; pass a number above 0")
        super().__init__(model, batches, optimizers, schedule, clip)
        self.loss = loss
        self.checkpoints = Checkpoints(folder, keep)
        self.gradient_norm = 0.0
        self.quiet = False
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def gradient(self, batch: Batch | PackedBatch) -> tuple[Tensor, Tensor]:
        """Compute the loss and its gradient; return the loss and the gradient's norm."""
        self.model.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        return loss, nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def train_step(self) -> float:
        """Learn from the batch of this step; return its loss.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite; the
                weights are then as they were.
        """
        batch = self.batches(self.step).to(self.device)
        factor = self.schedule(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.model.train()
        with rewinding(self.device):
            loss, norm = self.gradient(batch)
            if not (loss + norm).isfinite():
                raise FloatingPointError(
                    f"the loss is {loss.item():.4g}, its gradient {norm.item():.4g} at step "
                    f"{self.step}; lower the learning rate, or look for an empty batch; "
                    f"{self.checkpoints.advice(self)}"
                )
            self.half_done = True
        for optimizer in self.optimizers:
            optimizer.step()
        self.gradient_norm = norm.item()
        self.recent.append((loss.item(), self.gradient_norm))
        self.step += 1
        self.half_done = False
        return loss.item()

    def fit(
        self,
        steps: int,
        measure: Callable[[nn.Module], dict] = measure_nothing,
        every: int = 100,
    ) -> list[dict]:
        """Train until ``steps`` steps are done, in all.

        The first Ctrl-C finishes the step and saves; a second stops at once.

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
            ValueError: if ``every`` is not an integer of at least 1, or if
                ``measure`` returns what a record has already.
            FloatingPointError: as ``train_step`` and ``save``.
            RuntimeError: if another program writes to the folder, or if the
                folder's run or a step that was stopped must be resumed first.
            OSError: if the folder can't be written to, at once; or later, if the
                disk is full.
        """
        check_integer("every", every, 1)
        bar = tqdm(total=steps, initial=self.step, desc="Training", disable=self.quiet)
        with bar, self.checkpoints.guarding(self) as asked_to_stop:
            while self.step < steps and not asked_to_stop.is_set():
                self.train_step()
                bar.update()
                if self.step % every == 0 or self.step == steps:
                    self.record(measure)
                    bar.set_postfix(loss=f"{self.history[-1]['train_loss']:.3f}")
        return self.history

    def record(self, measure: Callable[[nn.Module], dict]) -> None:
        """Add a record to the history, and save."""
        losses, norms = zip(*self.recent)
        record = {
            "step": self.step,
            "train_loss": sum(losses) / len(losses),
            "gradient_norm": sum(norms) / len(norms),
        }
        self.recent = []
        self.history.append(record)
        try:
            measured = measure(self.model)
            if taken := sorted(record.keys() & measured.keys()):
                raise ValueError(
                    f"measure returned {taken}, which a record has already"
                )
            text = json.dumps(record | measured, default=float)
            self.history[-1] = json.loads(text, parse_constant=lambda name: None)
        finally:
            self.save()

    def save(self) -> None:
        """Write checkpoint and log, if the trainer has a folder.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is written.
            RuntimeError, OSError: as ``Checkpoints.save``.
        """
        self.checkpoints.save(self)

    def resume(self, step: int | None = None, allow: Sequence[str] = ()) -> bool:
        """Go on from the newest checkpoint in the folder that is whole, if any.

        Weights, optimizers, random numbers, step and history are then those of
        the checkpoint. Nothing changes if there's an error.

        Args:
            step: go back to the checkpoint of this step instead; those after it
                are renamed.
            allow: what may differ from the run that was saved, such as
                ``["lr", "schedule"]``; what is here then holds.

        Returns:
            Whether there was a checkpoint.

        Raises:
            ValueError, RuntimeError, OSError: as ``Checkpoints.load``.
        """
        return self.checkpoints.load(self, step, allow)

"""Training by several processes: each takes its rows, and all take one step.

Built in chapter 22, "Train it on many machines"
(chapters/many_machines.md). Edit the chapter, not this file.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from t5_book.batches import Batch
from t5_book.checkpoints import whole
from t5_book.checks import check_choice, check_integer
from t5_book.losses import batch_loss
from t5_book.packing import PackedBatch
from t5_book.t5 import T5
from t5_book.training import Trainer

__all__ = ["ParallelTrainer"]


def rows_of(batch: Batch | PackedBatch, k: int, n: int) -> Batch | PackedBatch:
    """Part ``k`` of ``n`` of a batch: every ``n``-th row.

    Raises:
        ValueError: if the rows can't be shared evenly.
    """
    rows = len(batch.labels)
    if rows % n:
        raise ValueError(
            f"a batch of {rows} rows can't be shared by {n}; pass a multiple of {n}"
        )
    return type(batch)(*[part[k::n] for part in batch])


class LossOf(nn.Module):
    """A model and its loss as one module, so that an engine sees one forward."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch | PackedBatch) -> Tensor:
        """The loss of a batch, a scalar."""
        return self.loss(self.model, batch)


def start_processes() -> tuple[int, int]:
    """Join the processes that ``torchrun`` has started; return rank and world.

    A process that was started without it is the only one: 0 and 1. On GPUs they
    talk by NCCL, else by gloo.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


STRATEGIES = ("ddp", "fsdp")


class ParallelTrainer(Trainer):
    """A ``Trainer`` in each of several processes, which all take the same steps.

    Args:
        model: the ``T5``, on this process's device. All start with the weights
            of process 0.
        batches: as for ``Trainer``: a function from the step to the whole batch,
            of which each process takes its rows. Or a ``CorpusBatches``, which
            has this process's rows alone.
        optimizers: a function that makes the optimizers of a model, such as
            ``adafactor``. (They are made when the weights have been shared out.)
        strategy: ``"ddp"`` (default): each process has the whole model; or
            ``"fsdp"``: each has a part.
        accumulate: pieces in which a process computes its rows, to save memory;
            default 1.
        precision: ``"float32"`` (default), or ``"bfloat16"`` for the products of
            matrices, by autocast.
        options: those of ``Trainer``. Process 0 writes the checkpoints.

    Raises:
        ValueError: if ``strategy``, ``precision`` or ``accumulate`` is no such
            thing; in a step, if the rows can't be shared evenly.
    """

    def __init__(
        self,
        model: T5,
        batches: Callable[[int], Batch | PackedBatch],
        optimizers: Callable[[nn.Module], Sequence[Optimizer]],
        *,
        loss: Callable[[nn.Module, Batch | PackedBatch], Tensor] = batch_loss,
        strategy: str = "ddp",
        accumulate: int = 1,
        precision: str = "float32",
        **options,
    ):
        check_choice("strategy", strategy, STRATEGIES)
        check_choice("precision", precision, ("float32", "bfloat16"))
        check_integer("accumulate", accumulate, 1)
        self.rank, self.world = start_processes()
        self.accumulate = accumulate
        self.low_precision = precision == "bfloat16"
        self.sharded = strategy == "fsdp" and self.world > 1
        self.engine = LossOf(model, loss)
        if self.world > 1:
            for weight in model.parameters():
                dist.broadcast(weight.data, 0)
        if self.sharded:
            # These take seconds to import, which others need not wait for.
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.world,))
            for block in [*model.encoder.blocks, *model.decoder.blocks]:
                fully_shard(block, mesh=mesh)
            fully_shard(self.engine, mesh=mesh)
        elif self.world > 1:
            self.engine = DistributedDataParallel(self.engine)
        super().__init__(model, batches, optimizers(model), loss=loss, **options)
        self.quiet = self.rank > 0
        self.checkpoints.writes = self.checkpoints.writes and self.rank == 0

    def total(self, number: Tensor) -> Tensor:
        """The sum of a number over all processes."""
        if self.world > 1:
            dist.all_reduce(number)
        return number

    def gradient(self, batch: Batch | PackedBatch) -> tuple[Tensor, Tensor]:
        """The loss of all processes and the norm of its gradient, as ``Trainer``."""
        self.engine.zero_grad()
        if not hasattr(self.batches, "state_dict"):
            batch = rows_of(batch, self.rank, self.world)
        count = self.total((batch.labels != -100).sum())
        loss = torch.zeros((), device=self.device)
        for k in range(self.accumulate):
            piece = rows_of(batch, k, self.accumulate)
            share = (piece.labels != -100).sum() / count
            with self.talking(k == self.accumulate - 1):
                with torch.autocast(
                    self.device.type, torch.bfloat16, self.low_precision
                ):
                    part = self.engine(piece) * share
                (part * self.world).backward()
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return self.total(loss), whole(norm)

    def talking(self, now: bool):
        """A context in which the engine averages gradients now, or not yet."""
        if self.sharded:
            self.engine.set_requires_gradient_sync(now)
        elif self.world > 1 and not now:
            return self.engine.no_sync()
        return nullcontext()

    def gather(self, own):
        """What each of the processes has, in their order."""
        found = [None] * self.world
        if self.world == 1:
            return [own]
        dist.all_gather_object(found, own)
        return found

    def random_states(self) -> list[list[Tensor]]:
        """The state of the random numbers, in each process of the run."""
        return self.gather(Trainer.random_states(self)[0])

    def set_random_states(self, states: list[list[Tensor]]) -> None:
        """Each process takes its own; one more than there were draws new numbers."""
        Trainer.set_random_states(self, states[self.rank % len(states) :])
        if self.rank >= len(states):
            torch.manual_seed(torch.initial_seed() + self.rank)

    def data_state(self) -> dict | None:
        """The places of all streams, those of the other processes included."""
        own = Trainer.data_state(self)
        if own is None:
            return None
        states = self.gather(own)
        places = {
            number: place
            for state in states
            for number, place in state["places"].items()
        }
        return own | {"places": places}

    def record(self, measure: Callable[[nn.Module], dict]) -> None:
        """As ``Trainer``; ``measure`` gets a model that has all its weights."""
        Trainer.record(self, lambda model: measure(self.whole_model()))

    def whole_model(self) -> T5:
        """The model; if its weights are shared out, a copy that has them all."""
        if not self.sharded:
            return self.model
        model = T5(**vars(self.model.config)).to(self.device)
        weights = self.model.state_dict()
        model.load_state_dict({name: whole(weight) for name, weight in weights.items()})
        return model

    def save(self) -> None:
        """As ``Trainer``: process 0 writes, and the others wait for it."""
        Trainer.save(self)
        self.gather("saved")

    def resume(self, step: int | None = None, allow: Sequence[str] = ()) -> bool:
        """As ``Trainer``; process 0 says from which checkpoint all go on."""
        found = error = None
        if self.rank == 0:
            try:
                found = self.checkpoints.newest(step)
            except (OSError, ValueError) as caught:
                error = caught
        found, error = self.gather((found, error))[0]
        if error is not None:
            raise error
        if found is None:
            return False
        return Trainer.resume(self, found, allow)

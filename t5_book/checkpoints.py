"""Checkpoints that survive: all that a training run needs to go on, on disk.

Built in chapter 19, "Checkpoints that survive" (chapters/checkpoints.md).
Edit the chapter, not this file.
"""

import hashlib
import json
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from t5_book.batches import Batch
from t5_book.checks import check_integer
from t5_book.packing import PackedBatch
from t5_book.pretrained import naming_damage, write_safetensors, write_through

__all__ = ["Checkpoints"]


def full_rate(step: int) -> float:
    """The default schedule: the rates stay as they are."""
    return 1.0


@dataclass(eq=False, repr=False)
class Run:
    """A training run: what it works with, and how far it is.

    ``Trainer`` is one. The random numbers belong to it, too; torch keeps them.
    """

    model: nn.Module  # a T5
    batches: Callable[[int], Batch | PackedBatch]
    optimizers: Sequence[Optimizer]
    schedule: Callable[[int], float] = full_rate
    clip: float = 1.0
    step: int = 0  # steps done
    history: list[dict] = field(default_factory=list)
    # loss and length of the gradient in each step since the last record
    recent: list[tuple[float, float]] = field(default_factory=list)
    half_done: bool = False  # stopped while the weights were changing

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def random_states(self) -> list[list[Tensor]]:
        """The state of the random numbers, in each process of the run."""
        return [random_state(self.device)]

    def set_random_states(self, states: list[list[Tensor]]) -> None:
        """Put the random numbers to where ``random_states`` found them."""
        set_random_state(states[0], self.device)

    def data_state(self) -> dict | None:
        """Where the batches come from, if they come from a stream."""
        stream = hasattr(self.batches, "state_dict")
        return self.batches.state_dict() if stream else None


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the random numbers, on the CPU and on a GPU."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put the random numbers to where ``random_state`` found them."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) == 2:
        torch.cuda.set_rng_state(states[1], device)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """The name of each weight, the same whether the model is compiled or not."""
    names: dict[Tensor, str] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        # A tied weight has several names; the first is kept.
        names.setdefault(weight, name.replace("_orig_mod.", ""))
    return names


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Each weight of the model once, and not a copy."""
    return {name: weight.detach() for weight, name in names_of(model).items()}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which several processes may have parts of."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether several processes have parts of it: PyTorch's ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def share(values: Tensor, like: Tensor) -> Tensor:
    """Share values out as another tensor is; whole to each, if the shapes differ."""
    if not is_shared(like):
        return values
    # Only who trains with several processes waits for this import.
    from torch.distributed.tensor import Replicate, distribute_tensor

    alike = values.shape == like.shape
    return distribute_tensor(
        values, like.device_mesh, like.placements if alike else [Replicate()]
    )


def shapes_of(weights: dict[str, Tensor]) -> dict[str, str]:
    """Which weights there are, as settings."""
    return {
        f"weight {name}": f"{w.dtype} {tuple(w.shape)}" for name, w in weights.items()
    }


def settings_of(run: Run, step: int) -> dict:
    """What must agree for a run to go on at a step: plain values by name."""
    settings = {f"{k} of the model": v for k, v in asdict(run.model.config).items()}
    settings["device of the model"] = run.device.type
    settings["clip of the gradient"] = run.clip
    names = names_of(run.model)
    for i, optimizer in enumerate(run.optimizers):
        settings[f"type of optimizer {i}"] = type(optimizer).__name__
        for j, group in enumerate(optimizer.param_groups):
            place = f"optimizer {i}, group {j}"
            for k, parameter in enumerate(group["params"]):
                settings[f"parameter {k} of {place}"] = names.get(
                    parameter, "no weight"
                )
            for name, value in group.items():
                if name not in ("params", "initial_lr"):
                    settings[f"{name} of {place}"] = value
            # where a schedule moves the rate, the one that was chosen
            settings[f"lr of {place}"] = group.get("initial_lr", group.get("lr"))
    for at in sorted({step, *(2**k for k in range(21))}):
        try:
            settings[f"schedule at step {at}"] = float(run.schedule(at))
        except LookupError:  # a table that ends before
            settings[f"schedule at step {at}"] = "unknown"
    settings[f"batches at step {step}"] = fingerprint(run, step)
    return json.loads(json.dumps(settings, default=plain))


def plain(value) -> float | str:
    """A number of torch or numpy, or anything, for JSON."""
    return value.item() if hasattr(value, "item") else str(value)


def fingerprint(run: Run, step: int) -> str:
    """A hash of the batch of a step; "unknown" if there is none, or in a stream."""
    if run.data_state() is not None:
        return "unknown"
    before = random_state(run.device)
    try:
        parts = [part for part in run.batches(step) if isinstance(part, Tensor)]
    except Exception:  # it's the end of the data, or the step will tell
        return "unknown"
    finally:
        set_random_state(before, run.device)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# What a run can't go on without: each weight, and its place in the optimizers.
FIXED = {"weight", "parameter", "type"}


def check_settings(path: Path, there: dict, here: dict, allow: Sequence[str]) -> None:
    """Refuse to go on from a checkpoint of other settings.

    Args:
        path: of the checkpoint.
        there, here: what ``settings_of`` gave then and gives now.
        allow: what may differ, such as ``["lr", "schedule"]``: the first
            words of their names.

    Raises:
        ValueError: if something else differs.
    """
    known = {name.split()[0] for name in there | here} - FIXED
    if unknown := set(allow) - known:
        raise ValueError(f"allow has {sorted(unknown)}; pass some of {sorted(known)}")
    lines, kinds = [], {}
    for name in there | here:
        old, new = there.get(name, "missing"), here.get(name, "missing")
        kind = name.split()[0]
        if old != new and "unknown" not in (old, new) and kind not in allow:
            lines.append(f"  {name} is {old} there and {new} here")
            kinds[kind] = None
    if not lines:
        return
    advice = f"make it as it was, or call resume(allow={list(kinds)})"
    if FIXED & kinds.keys():
        advice = "make model and optimizers as they were, or use another folder"
    if len(lines) > 8:
        lines[8:] = [f"  ... and {len(lines) - 8} more"]
    raise ValueError(f"{path} is of another run; {advice}:\n" + "\n".join(lines))


FILES = ("config.json", "model.safetensors", "settings.json", "training.pt")


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or is not what was written."""


def sum_lines(folder: Path) -> list[str]:
    """The lines of ``SHA256SUMS``, in the format of the program ``sha256sum``."""
    lines = []
    for name in FILES:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {name}\n")
    return lines


def content_of(run: Run) -> tuple[dict, dict, dict]:
    """What a checkpoint holds: weights, settings and training state."""
    weights = {name: whole(weight) for name, weight in weights_of(run.model).items()}
    training = {
        "step": run.step,
        "history": run.history,
        "recent": run.recent,
        "random": run.random_states(),
        "data": run.data_state(),
        "optimizers": [state_of(optimizer) for optimizer in run.optimizers],
    }
    return weights, settings_of(run, run.step), training


def state_of(optimizer: Optimizer) -> dict:
    """What an optimizer knows of each parameter; the settings have the rest."""
    return {
        number: {
            name: whole(value) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        for number, state in optimizer.state_dict()["state"].items()
    }


def set_state(optimizer: Optimizer, states: dict) -> None:
    """Give an optimizer what ``state_of`` found."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[name] = share(value, parameter)


def write_checkpoint(folder: Path, config: str, content: tuple) -> None:
    """Write the files of a checkpoint, and wait until they are on the disk."""
    weights, settings, training = content
    (folder / "config.json").write_text(config)
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    try:
        with (folder / "training.pt").open("wb") as file:
            torch.save(training, file)
    except RuntimeError as error:
        # torch hides what the disk said behind a complaint of its own.
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    (folder / "SHA256SUMS").write_text("".join(sum_lines(folder)))
    for name in (*FILES, "SHA256SUMS"):
        write_through(folder / name)
    write_through(folder)


def read_checkpoint(folder: Path) -> tuple[dict, dict, dict]:
    """Read weights, settings and training state; runs no code from a file.

    Raises:
        DamagedCheckpoint: if a file is missing or is not what was written.
        OSError: if a file can't be read.
    """
    try:
        found = (folder / "SHA256SUMS").read_bytes().splitlines(keepends=True)
        expected = [line.encode() for line in sum_lines(folder)]
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{error.filename} is missing") from None
    for name, line in zip(FILES, expected):
        if line not in found:
            raise DamagedCheckpoint(
                f"{folder / name} is damaged: it is not what SHA256SUMS says"
            )
    if found != expected:
        raise DamagedCheckpoint(f"{folder / 'SHA256SUMS'} is damaged")
    weights = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "settings.json").read_text())
    with naming_damage(folder / "training.pt"):
        training = torch.load(folder / "training.pt", "cpu", weights_only=True)
    return weights, settings | shapes_of(weights), training


class Checkpoints:
    """The checkpoints of one run, in a folder.

    Each is a folder ``step-000100``, which ``write_checkpoint`` fills. What
    was damaged, or left behind when a run went back, is called ``aside-...``.

    Args:
        folder: where they are; None: nothing is saved.
        keep: how many stay; default 3, the newest.
        writes: whether this process writes there; default True. Of several
            that train together, one does.

    Attributes:
        last: path of the checkpoint that this run has last saved or loaded.

    Raises:
        ValueError: if ``keep`` is no integer of at least 1.
    """

    def __init__(self, folder: str | Path | None, keep: int = 3, writes: bool = True):
        check_integer("keep", keep, 1)
        self.folder = None if folder is None else Path(folder).expanduser()
        self.writes = writes and folder is not None
        self.keep = keep
        self.last: Path | None = None
        self.lock = FileLock(self.folder / ".lock") if folder is not None else None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other writers out, and remove what dead ones have left.

        Raises:
            RuntimeError: if another one is writing.
            OSError: if nothing can be written there.
        """
        if not self.writes:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = self.lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"another program or Trainer is writing to {self.folder}; wait for it, "
                "or use another folder"
            ) from None
        with lock:
            for part in self.folder.glob(".part-*"):
                shutil.rmtree(part)
            yield

    def paths(self) -> list[Path]:
        """The checkpoints, the newest first."""
        if self.folder is None:
            return []
        found = [p for p in self.folder.glob("step-*") if step_of(p) is not None]
        return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)

    def advice(self, run: Run) -> str:
        """Where to go back to, for the end of the message of an error."""
        if self.last is None:
            return "there is no checkpoint to go back to"
        older = [step_of(path) for path in self.paths() if step_of(path) < run.step]
        if step_of(self.last) == run.step and older:
            return (
                f"it comes right after {self.last}, which may be spoilt; "
                f"resume(step={older[0]}) goes back to the checkpoint before"
            )
        return f"the last good checkpoint is {self.last}; resume() goes back to it"

    def save(self, run: Run) -> None:
        """Save a run, and let go of all checkpoints but the newest.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is saved then.
            RuntimeError: if the run stands in the middle of a step, or if it
                does not continue the newest checkpoint of the folder.
            OSError: if the disk is full or broken; the old checkpoints stay.
        """
        self.check_mine(run)
        content = content_of(run)
        for name, weight in content[0].items():
            if not weight.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after step {run.step}, so nothing was saved; "
                    f"{self.advice(run)}"
                )
        if not self.writes:
            return
        with self.writing():
            with TemporaryDirectory(prefix=".part-", dir=self.folder) as part:
                new = Path(part, "checkpoint")
                new.mkdir()
                write_checkpoint(new, run.model.config.to_json(), content)
                self.last = new.rename(free_name(self.folder / f"step-{run.step:06}"))
            write_through(self.folder)
            self.write_log(run.history)
            for old in self.paths()[self.keep :]:
                with TemporaryDirectory(prefix=".part-", dir=self.folder) as part:
                    old.rename(Path(part, old.name))

    def check_mine(self, run: Run) -> None:
        """Refuse to go on from half a step, or beside another run's checkpoints.

        Raises:
            RuntimeError: if that is so.
        """
        if run.half_done:
            raise RuntimeError(
                f"step {run.step} was stopped while the weights were changing; call "
                "resume(), or make model and optimizers anew"
            )
        for newest in self.paths()[:1]:
            if self.writes and newest != self.last:
                raise RuntimeError(
                    f"{self.folder} has checkpoints up to {newest.name}, and this run does "
                    "not go on from there; call resume(), or use another folder"
                )

    def write_log(self, history: list[dict]) -> None:
        """Write ``log.jsonl``, a line for each record, unless it is up to date."""
        log = self.folder / "log.jsonl"
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in history)
        if not log.exists() or log.read_text() != text:
            with TemporaryDirectory(prefix=".part-", dir=self.folder) as part:
                new = Path(part, "log.jsonl")
                new.write_text(text)
                write_through(new)
                new.replace(log)

    def load(
        self, run: Run, step: int | None = None, allow: Sequence[str] = ()
    ) -> bool:
        """Bring a run to where a checkpoint is; an error leaves it as it was.

        Newer checkpoints, damaged or skipped, are renamed to ``aside-...``.

        Args:
            run: made with the same choices as the one that was saved.
            step: which checkpoint; default: the newest that is whole.
            allow: what may differ, such as ``["lr", "schedule"]``; the values of
                ``run`` then hold.

        Returns:
            Whether there was a checkpoint.

        Raises:
            DamagedCheckpoint: if none is whole.
            ValueError: if there is none of that step, or if ``run`` is not the
                run that was saved; the message has all differences.
            RuntimeError: if another program is writing there.
            OSError: if a file can't be read.
        """
        if self.folder is None or not self.folder.exists():
            return False
        with self.writing():
            found = self.find(step)
            if found is None:
                return False
            path, newer, weights, settings, training = found
            own = weights_of(run.model)
            here = settings_of(run, training["step"]) | shapes_of(own)
            check_settings(path, settings, here, allow)
            if self.writes:
                for other in newer:
                    other.rename(free_name(other.with_name(f"aside-{other.name}")))
                self.write_log(training["history"])

            # Into the tensors that are there: so what is tied stays tied.
            for name, weight in weights.items():
                own[name].copy_(share(weight, own[name]))
            for optimizer, state in zip(run.optimizers, training["optimizers"]):
                set_state(optimizer, state)
            if training["data"] is not None:
                run.batches.load_state_dict(training["data"])
            run.step, run.history = training["step"], training["history"]
            run.recent, run.half_done = training["recent"], False
            run.set_random_states(training["random"])
            self.last = path
            return True

    def newest(self, step: int | None = None) -> int | None:
        """The step of the checkpoint that ``load`` would take, or None.

        Raises:
            ValueError, OSError: as ``load``.
        """
        found = self.find(step)
        return None if found is None else step_of(found[0])

    def find(self, step: int | None) -> tuple | None:
        """The newest checkpoint that is whole, those newer than it, and its content."""
        damage, newer = [], []
        for path in self.paths():
            if step in (None, step_of(path)):
                try:
                    content = read_checkpoint(path)
                except DamagedCheckpoint as error:
                    damage.append(str(error))
                else:
                    for line in damage:
                        warnings.warn(
                            f"{line}; going back to {path.name}", stacklevel=4
                        )
                    return path, newer, *content
            newer.append(path)
        if damage:
            raise DamagedCheckpoint("; ".join(damage) + "; no whole checkpoint is left")
        if step is not None:
            names = ", ".join(path.name for path in newer) or "none"
            raise ValueError(
                f"{self.folder} has no checkpoint of step {step}; it has {names}"
            )
        return None

    @contextmanager
    def guarding(self, run: Run) -> Iterator[threading.Event]:
        """What stands around the steps of a run: the lock, and Ctrl-C.

        Yields:
            An event. Once it is set, finish the step and leave; the run is then
            saved, and the KeyboardInterrupt goes on.

        Raises:
            RuntimeError, OSError: as ``writing`` and ``check_mine``, at once.
        """
        with self.writing():
            self.check_mine(run)
            with ctrl_c_waits() as asked:
                yield asked
            if asked.is_set():
                if self.last is None or step_of(self.last) != run.step:
                    self.save(run)
                saved = f", saved as {self.last}" if self.last else ""
                raise KeyboardInterrupt(f"stopped after step {run.step}{saved}")


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, from its name; None if it is none."""
    found = re.fullmatch(r"step-(\d{6,})\+*", path.name)
    return int(found[1]) if found else None


def free_name(path: Path) -> Path:
    """The path, or if there is something already, one with a plus after it."""
    while path.exists():
        path = path.with_name(path.name + "+")
    return path


@contextmanager
def ctrl_c_waits() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C only sets an event; the second stops at once."""
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        signal.signal(signal.SIGINT, before)
        asked.set()

    # Python lets only the main thread do this. And who has switched Ctrl-C off,
    # as nohup does, or has an answer of their own, keeps it.
    main = threading.current_thread() is threading.main_thread()
    if main and before is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)


@contextmanager
def rewinding(device: torch.device) -> Iterator[None]:
    """If the block fails, put the random numbers back to where they were."""
    before = random_state(device)
    try:
        yield
    except BaseException:
        set_random_state(before, device)
        raise

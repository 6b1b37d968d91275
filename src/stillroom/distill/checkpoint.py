"""Checkpoints: all of a run's state, written whole or not at all."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim.lr_scheduler import LRScheduler

from stillroom.distill.ahead import ReadAhead
from stillroom.distill.step import StudentStep
from stillroom.errors import DataError, StorageError
from stillroom.files import crc32, read_json, sync_folder, write_json


@dataclass
class TrainState:
    """All that training changes."""

    module: StudentStep
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    stream: ReadAhead
    step: int = 0
    """Optimizer steps done."""
    num_tokens: int = 0
    """Kept positions learnt from so far."""
    time_s: float = 0.0
    """Time spent in steps so far."""
    held_out: dict[str, float] = field(default_factory=dict)
    """What was measured last."""
    measured_at: int = 0
    """The step after which it was measured."""
    best: dict[str, float] = field(default_factory=dict)
    """What was measured at the best step, with ``step``."""
    frozen_saved: bool = True
    """Whether frozen parameters belong into a checkpoint; a student with adapters gets them from its own folder."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


PLAIN = ("step", "num_tokens", "time_s", "held_out", "measured_at", "best")
"""What of a TrainState is plain numbers."""


class Checkpoints:
    """The checkpoints of one run: ``step-00000100/`` and so on, of which the last ``keep`` and the best stay.

    Tensors are `torch.distributed.checkpoint`'s, everything else is in ``state.json``. A checkpoint is written under a
    temporary name, synced and renamed, so one that has its name is whole.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """In the order of their steps."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, state: TrainState) -> Path:
        """Writes the state, and removes checkpoints that are no longer to be kept.

        Raises:
            StorageError: it could not be written, on a full disk say; the earlier checkpoints are as they were.
        """
        path, temporary = self.at(state.step), self.folder / f".step-{state.step:08d}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with _quiet():
                save_tensors(_tensors(state), checkpoint_id=temporary, no_dist=True)
            write_json(temporary / "state.json", {**_numbers(state), "files": _checksums(temporary)})
            sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            sync_folder(self.folder)
        except (Exception, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error)):
                raise KeyboardInterrupt from error
            if not _is_disk(error):
                raise
            raise StorageError(
                f"the checkpoint of step {state.step} could not be written",
                {"reason": _reason(error), "free": f"{_free_bytes(self.folder) / 2**20:.0f} MiB"},
                why=f"Training stopped here. The last good checkpoint is {self.latest() or 'none'}.",
                fix="Make room, then run the same command with --resume.",
            ) from error
        self._prune(int(state.best["step"]) if state.best else None)
        return path

    def load(self, state: TrainState, path: Path) -> None:
        """Sets the state to what was saved.

        Raises:
            DataError: the checkpoint is damaged.
        """
        tensors = _tensors(state)
        try:
            numbers = read_json(path / "state.json")
            if numbers["files"] != (found := _checksums(path)):
                raise ValueError(f"its files have the checksums {found} and were written with {numbers['files']}")
            with _quiet():
                load_tensors(tensors, checkpoint_id=path, no_dist=True)
            set_model_state_dict(state.module, tensors["model"], options=StateDictOptions(strict=False))
            set_optimizer_state_dict(state.module, state.optimizer, tensors["optimizer"])
            state.schedule.load_state_dict(
                {**numbers["schedule"], "lr_lambdas": state.schedule.state_dict()["lr_lambdas"]}
            )
            for name in PLAIN:
                setattr(state, name, numbers[name])
            _set_random_state(tensors["random"], state.device)
            place = numbers["stream"]
        except (Exception, CheckpointException) as error:
            others = [p.name for p in self.all() if p != path]
            raise DataError(
                f"the checkpoint {path} cannot be read",
                {"reason": _reason(error), "other checkpoints": ", ".join(others) or "none"},
                why="The run cannot go on from a state that is not whole.",
                fix=f"Delete {path} to go on from an earlier checkpoint, or start again with --overwrite.",
            ) from error
        state.stream.restore(place)

    def _prune(self, best_step: int | None) -> None:
        kept = {*self.all()[-self.keep :], *([] if best_step is None else [self.at(best_step)])}
        for path in self.all():
            if path not in kept:
                shutil.rmtree(path)


def _tensors(state: TrainState) -> dict[str, Any]:
    """What is stored as tensors. A parameter with two names (a head tied to the embeddings) is stored once."""
    names = dict(state.module.named_parameters())
    aliases = dict(state.module.named_parameters(remove_duplicate=False)).keys() - names.keys()
    frozen = {name for name, parameter in names.items() if not parameter.requires_grad}
    left_out = aliases if state.frozen_saved else aliases | frozen
    model = get_model_state_dict(state.module)
    return {
        "model": {name: tensor for name, tensor in model.items() if name not in left_out},
        "optimizer": get_optimizer_state_dict(state.module, state.optimizer),
        "random": _random_state(state.device),
    }


def _numbers(state: TrainState) -> dict[str, Any]:
    return {
        **{name: getattr(state, name) for name in PLAIN},
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
        "stream": state.stream.state(),
    }


def _checksums(folder: Path) -> dict[str, int]:
    """The checksum of each file of tensors."""
    return {path.name: crc32(path) for path in sorted(folder.iterdir()) if path.name != "state.json"}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that it saves in one process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*", category=UserWarning)
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        yield


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, those of other processes too, the innermost last."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for inner, _ in error.failures.values():
                yield from _causes(inner)
        error = error.__cause__ or error.__context__


def _is_disk(error: BaseException) -> bool:
    return any(isinstance(e, OSError) or "PytorchStreamWriter" in str(e) for e in _causes(error))


def _reason(error: BaseException) -> str:
    """The first cause in one line."""
    inner = list(_causes(error))[-1]
    plain = inner.strerror if isinstance(inner, OSError) else None
    return plain or f"{type(inner).__name__}: {' '.join(str(inner).split())[:160]}"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free

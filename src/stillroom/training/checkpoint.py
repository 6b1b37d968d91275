"""Checkpoints: all of a run's state, written whole or not at all."""

import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
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

from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.errors import DataError, StillroomError, StorageError
from stillroom.runs import crc32, read_json, replace_folder, sync_folder, write_json
from stillroom.training.prefetch import Prefetcher
from stillroom.training.step import StudentStep


@dataclass
class TrainState:
    """All that training changes."""

    module: StudentStep
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    stream: Prefetcher
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
    ranks: RankGroup = SINGLE_RANK
    """Those that train together."""
    parallel: nn.Module | None = None
    """What is called in the place of ``module`` while training, where each process holds a whole one."""
    place: torch.device | None = None
    """Where batches go; None is where the parameters are."""
    stopped_by: int = 0
    """The signal that asked for an end, or 0."""

    @property
    def device(self) -> torch.device:
        return self.place or next(self.module.parameters()).device

    @property
    def forward(self) -> nn.Module:
        """The student step as it is called while training."""
        return self.parallel or self.module


PLAIN = ("step", "num_tokens", "time_s", "held_out", "measured_at", "best")
"""What of a TrainState is plain numbers."""


class Checkpoints:
    """The checkpoints of one run: ``step-00000100/`` and so on, of which the last ``keep`` and the best stay.

    Tensors are `torch.distributed.checkpoint`'s, everything else is in ``state.json``. A checkpoint is written under a
    temporary name, synced and renamed, so one that has its name is whole. Several processes write each what it holds,
    and any number of them can load it.

    Args:
        processes: those that train together, which all save and load at the same steps.
        background: write a copy, in a thread, while training goes on.
    """

    def __init__(self, folder: Path, *, keep: int, ranks: RankGroup = SINGLE_RANK, background: bool = False) -> None:
        self.folder, self.keep, self.ranks, self.background = folder, keep, ranks, background
        self._writing: tuple[threading.Thread, list[BaseException]] | None = None

    def all(self) -> list[Path]:
        """In the order of their steps."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, state: TrainState) -> Path:
        """Writes the state, and removes checkpoints that are no longer to be kept. In the background, it is written
        when the next one is, or by ``finish``.

        Raises:
            StorageError: it, or one before it, could not be written, on a full disk say; earlier checkpoints are as
                they were.
        """
        self.finish()
        tensors, numbers = _tensors(state), _numbers(state)
        best = int(state.best["step"]) if state.best else None
        path = self.at(state.step)
        if not self.background:
            self._write(path, tensors, numbers, best)
            return path
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied: Any = stager.stage(tensors)
        stager.close()
        errors: list[BaseException] = []

        def write() -> None:
            try:
                self._write(path, copied, numbers, best)
            except BaseException as error:
                errors.append(error)

        self._writing = threading.Thread(target=write, name="checkpoint"), errors
        self._writing[0].start()
        return path

    def finish(self) -> None:
        """Waits until what is written in the background is there.

        Raises:
            StorageError: it could not be written.
        """
        if self._writing is not None:
            thread, errors = self._writing
            thread.join()
            self._writing = None
            if errors:
                raise errors[0]

    def _write(self, path: Path, tensors: dict[str, Any], numbers: dict[str, Any], best: int | None) -> None:
        temporary, others = self.folder / f".{path.name}.tmp", self.ranks.for_checkpoints
        try:
            others.on_rank0(lambda: _make_empty(temporary))
            with _quiet():
                save_tensors(
                    tensors, checkpoint_id=temporary, process_group=others.group, no_dist=self.ranks.world_size == 1
                )
            files = _merged(others.all_gather(_checksums(temporary, others.checkpoint_files(temporary))))
            others.on_rank0(lambda: self._name(temporary, path, {**numbers, "files": files}, best))
        except (Exception, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error)):
                raise KeyboardInterrupt from error
            if isinstance(error, StillroomError) or not _is_disk(error):
                raise
            raise StorageError(
                f"the checkpoint of step {int(path.name[5:])} could not be written",
                {"reason": _reason(error), "free": f"{_free_bytes(self.folder) / 2**20:.0f} MiB"},
                why=f"Training stopped here. The last good checkpoint is {self.latest() or 'none'}.",
                fix="Make room, then run the same command with --resume.",
            ) from error

    def _name(self, temporary: Path, path: Path, numbers: dict[str, Any], best: int | None) -> None:
        """Gives a checkpoint that is written its name, once all its files are there."""
        if lost := [name for name in numbers["files"] if not (temporary / name).is_file()]:
            raise StorageError(
                f"the checkpoint {path} is not in one place",
                {"folder": self.folder, "files of other processes": ", ".join(lost[:3])},
                why="Each process writes its part into the run's folder, and this one does not see the others'.",
                fix="Put `out` on a file system that all hosts share.",
            )
        write_json(temporary / "state.json", numbers)
        sync_folder(temporary)
        replace_folder(temporary, path)
        self._prune(best)

    def load(self, state: TrainState, path: Path) -> None:
        """Sets the state to what was saved, by any number of processes.

        Raises:
            DataError: the checkpoint is damaged.
        """
        ranks = self.ranks
        tensors = _tensors(state)
        try:
            numbers = read_json(path / "state.json")
            mine = ranks.shard(sorted(_tensor_files(path)))
            found = _merged(ranks.all_gather(_checksums(path, mine)))
            if numbers["files"] != found:
                raise ValueError(f"its files have the checksums {found} and were written with {numbers['files']}")
            there = FileSystemReader(path).read_metadata().state_dict_metadata
            known = {
                name for name in tensors["random"] if f"random.{name}" in there
            }  # not of others, nor other devices
            tensors["random"] = {name: tensors["random"][name] for name in known}
            with _quiet():
                load_tensors(tensors, checkpoint_id=path, process_group=ranks.group, no_dist=ranks.world_size == 1)
            set_model_state_dict(state.module, tensors["model"], options=StateDictOptions(strict=False))
            set_optimizer_state_dict(state.module, state.optimizer, tensors["optimizer"])
            state.schedule.load_state_dict(
                {**numbers["schedule"], "lr_lambdas": state.schedule.state_dict()["lr_lambdas"]}
            )
            for name in PLAIN:
                setattr(state, name, numbers[name])
            _set_random_state(tensors["random"], state)
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
        "random": _random_state(state),
    }


def _numbers(state: TrainState) -> dict[str, Any]:
    return {
        **{name: getattr(state, name) for name in PLAIN},
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
        "stream": state.stream.state(),
    }


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _tensor_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "state.json"]


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """The checksums of some files of tensors."""
    return {name: crc32(folder / name) for name in names}


def _merged(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sorted({name: value for part in parts for name, value in part.items()}.items()))


def _random_state(state: TrainState) -> dict[str, torch.Tensor]:
    """Each process's own, by names that only it has; the first's are those of a process alone."""
    whose = f" of rank {state.ranks.rank}" if state.ranks.rank else ""
    states = {f"cpu{whose}": torch.get_rng_state()}
    if state.device.type == "cuda":
        states[f"device{whose}"] = torch.cuda.get_rng_state(state.device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], state: TrainState) -> None:
    """A process that was not there when it was saved goes on with the state that it began with."""
    for name, saved in states.items():
        if name.startswith("cpu"):
            torch.set_rng_state(saved)
        else:
            torch.cuda.set_rng_state(saved, state.device)


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

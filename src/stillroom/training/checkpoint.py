"""Checkpoints: all of a run's state, written whole or not at all."""

import io
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
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

from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.errors import DataError, StillroomError, StorageError
from stillroom.recipe import plain
from stillroom.runs import crc32, read_json, replace_folder, seal, write_json
from stillroom.training.state import TrainState

PLAIN = ("step", "num_tokens", "time_s", "held_out", "measured_at", "best")
"""The fields of a TrainState that are written as JSON."""
ZIP_WRITER = "PytorchStreamWriter|inline_container"
"""What errors of torch's zip writer name."""


class Checkpoints:
    """The checkpoints of one run: ``step-00000100/`` and so on, of which the last ``keep`` and the best stay.

    Tensors are `torch.distributed.checkpoint`'s, everything else is in ``state.json``. A checkpoint is written under a
    temporary name, synced and renamed, so one that has its name is whole. Several processes write each what it holds,
    and any number of them can load it.

    Args:
        ranks: the processes that train together, which all save and load at the same steps.
        background: writes a copy, in a thread, while training goes on.
    """

    def __init__(self, folder: Path, *, keep: int, ranks: RankGroup = SINGLE_RANK, background: bool = False) -> None:
        self.folder, self.keep, self.ranks, self.background = folder, keep, ranks, background
        self.seal_metrics: Callable[[], dict[str, int] | None] = lambda: None
        """Gives the seal of what metrics.jsonl says until now, where this process writes it."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def all(self) -> list[Path]:
        """Returns the checkpoints in the order of their steps."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, state: TrainState) -> Path:
        """Writes the state, and removes checkpoints that are no longer to be kept. In the background it is written by
        the time of the next ``save`` or ``finish``.

        Raises:
            StorageError: this checkpoint, or one before it, could not be written, on a full disk say; earlier
                checkpoints are as they were.
        """
        self.finish()
        tensors = _tensors(state)
        numbers = {
            **{name: getattr(state, name) for name in PLAIN},
            "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
            "stream": state.stream.state(),
            "metrics": self.seal_metrics(),
        }
        best = int(state.best["step"]) if state.best else None
        path = self.at(state.step)
        if not self.background:
            self._write(path, tensors, numbers, best)
            return path
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied: Any = stager.stage(tensors)
        stager.close()
        self._writing = self._thread.submit(self._write, path, copied, numbers, best)
        return path

    def finish(self) -> None:
        """Waits for the checkpoint that is written in the background.

        Raises:
            StorageError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, path: Path, tensors: dict[str, Any], numbers: dict[str, Any], best: int | None) -> None:
        temporary, ranks = self.folder / f".{path.name}.tmp", self.ranks.for_checkpoints

        def make_empty() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        try:
            ranks.on_rank0(make_empty)
            with _quiet():
                save_tensors(tensors, checkpoint_id=temporary, process_group=ranks.group, no_dist=ranks.world_size == 1)
            own = "*" if ranks.world_size == 1 else f"__{ranks.rank}_*"
            names = {file.name for file in temporary.glob(own)} | ({".metadata"} if ranks.is_rank0 else set())
            files = _checksums(temporary, names, ranks)
            ranks.on_rank0(lambda: self._name(temporary, path, {**numbers, "files": files}, best))
        except (Exception, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error)):
                raise KeyboardInterrupt from error
            # another process tells what torch's zip writer said, and not the OSError behind it
            of_disk = any(isinstance(e, OSError) or re.search(ZIP_WRITER, str(e)) for e in _causes(error))
            if isinstance(error, StillroomError) or not of_disk:
                raise
            there = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
            raise StorageError(
                f"the checkpoint of step {int(path.name[5:])} could not be written",
                {"reason": _reason(error), "free": f"{shutil.disk_usage(there).free / 2**20:.0f} MiB"},
                why=f"Training stopped here. The last good checkpoint is {self.latest() or 'none'}.",
                fix="Make room, then run the same command with --resume.",
            ) from error

    def _name(self, temporary: Path, path: Path, numbers: dict[str, Any], best: int | None) -> None:
        """Gives a written checkpoint its name, and removes those that are no longer to be kept."""
        if lost := [name for name in numbers["files"] if not (temporary / name).is_file()]:
            raise StorageError(
                f"the checkpoint {path} is not in one place",
                {"folder": self.folder, "files of other processes": ", ".join(lost[:3])},
                why="Each process writes its part into the run's folder, and this one does not see the others'.",
                fix="Put `out` on a file system that all hosts share.",
            )
        write_json(temporary / "state.json", seal(plain(numbers)))
        replace_folder(temporary, path)
        everything = self.all()
        kept = {*everything[-self.keep :], *([] if best is None else [self.at(best)])}
        for other in everything:
            if other not in kept:
                shutil.rmtree(other)

    def load(self, state: TrainState, path: Path) -> None:
        """Sets the state to a saved one, of any number of processes.

        Raises:
            DataError: the checkpoint is damaged.
        """
        ranks = self.ranks
        tensors = _tensors(state)
        try:
            numbers = read_json(path / "state.json")
            names = sorted(file.name for file in path.iterdir() if file.name != "state.json")
            found = _checksums(path, ranks.shard(names), ranks)
            if numbers["files"] != found:
                raise ValueError(f"its files have the checksums {found} and were written with {numbers['files']}")
            saved = _Reader(path).read_metadata().state_dict_metadata
            # a process that was not there when it was saved goes on with the random state that it began with
            random = {name: value for name, value in tensors["random"].items() if f"random.{name}" in saved}
            tensors["random"] = random
            with _quiet():
                load_tensors(
                    tensors,
                    storage_reader=_Reader(path),
                    planner=_Planner(),
                    process_group=ranks.group,
                    no_dist=ranks.world_size == 1,
                )
            set_model_state_dict(state.module, tensors["model"], options=StateDictOptions(strict=False))
            set_optimizer_state_dict(state.module, state.optimizer, tensors["optimizer"])
            state.schedule.load_state_dict(
                {**numbers["schedule"], "lr_lambdas": state.schedule.state_dict()["lr_lambdas"]}
            )
            for name in PLAIN:
                setattr(state, name, numbers[name])
            state.metrics = numbers.get("metrics")  # which a run of an earlier version does not have
            for name, value in random.items():
                if name.startswith("cpu"):
                    torch.set_rng_state(value)
                else:
                    torch.cuda.set_rng_state(value, state.device)
            position = numbers["stream"]
        except (Exception, CheckpointException) as error:
            others = [p.name for p in self.all() if p != path]
            raise DataError(
                f"the checkpoint {path} cannot be read",
                {"reason": _reason(error), "other checkpoints": ", ".join(others) or "none"},
                why="The run cannot go on from a state that is not whole.",
                fix=f"Delete {path} to go on from an earlier checkpoint, or start again with --overwrite.",
            ) from error
        state.stream.restore(position)


def _tensors(state: TrainState) -> dict[str, Any]:
    """Returns what is saved as tensors. A parameter with two names (a head tied to the embeddings) is saved once."""
    names = dict(state.module.named_parameters())
    aliases = dict(state.module.named_parameters(remove_duplicate=False)).keys() - names.keys()
    frozen = {name for name, parameter in names.items() if not parameter.requires_grad}
    left_out = aliases if state.frozen_saved else aliases | frozen
    model = get_model_state_dict(state.module)
    of_rank = f" of rank {state.ranks.rank}" if state.ranks.rank else ""
    random = {f"cpu{of_rank}": torch.get_rng_state()}
    if state.device.type == "cuda":
        random[f"device{of_rank}"] = torch.cuda.get_rng_state(state.device)
    return {
        "model": {name: tensor for name, tensor in model.items() if name not in left_out},
        "optimizer": get_optimizer_state_dict(state.module, state.optimizer),
        "random": random,
    }


def _checksums(folder: Path, names: Iterable[str], ranks: RankGroup) -> dict[str, int]:
    """Returns the checksums of all files, of which this process reads those of ``names``."""
    parts = ranks.all_gather({name: crc32(folder / name) for name in names})
    return dict(sorted(item for part in parts for item in part.items()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's warning that it saves in one process, which is what is meant."""
    with warnings.catch_warnings():
        message = ".*torch.distributed.*|TypedStorage is deprecated"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes, those in other processes too, the innermost last."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for inner, _ in error.failures.values():
                yield from _causes(inner)
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """Returns the first cause in one line."""
    inner = list(_causes(error))[-1]
    plain = inner.strerror if isinstance(inner, OSError) else None
    return plain or f"{type(inner).__name__}: {' '.join(str(inner).split())[:160]}"


# --- what is trusted -------------------------------------------------------------------------------------------------
_OF_METADATA = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip
"""What torch writes into a checkpoint's ``.metadata``, by module."""


class _Metadata(pickle.Unpickler):
    """Reads ``.metadata``, a pickle, and refuses every name that torch does not write there: a checkpoint that comes
    from elsewhere must not run its author's code."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _OF_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's reader, but for ``.metadata``, and for files outside the checkpoint's folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Metadata(file).load()
        if outside := [info.relative_path for info in metadata.storage_data.values() if "/" in info.relative_path]:
            raise ValueError(f"it names {outside[0]}, which lies outside its folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """torch's planner, but that values which are no tensors are numbers, texts and lists of them alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        found = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)

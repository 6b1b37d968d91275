"""Checkpoints: all of a run's state, bit for bit, written whole or not at all."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from conftest import build_documents, build_model, build_stream
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.errors import DataError, MismatchError, StorageError
from stillroom.losses.divergences import forward_kl
from stillroom.losses.objective import Objective
from stillroom.runs import crc32, read_json, seal, write_json
from stillroom.teachers.live import LiveTeacher
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.config import AdamWConfig
from stillroom.training.loop import train
from stillroom.training.prefetch import Prefetcher
from stillroom.training.state import TrainState, build_optimizer, build_schedule
from stillroom.training.step import StudentStep
from stillroom.training.student import build_student

# peft itself still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

LENGTHS = [6, 33, 12, 7, 29, 31, 18, 33, 5, 24, 9, 33, 16]
CONFIG = AdamWConfig(learning_rate=1e-2, warmup=0.3)


def build_state(model=None, *, num_steps: int = 6, frozen_saved: bool = True, seed: int = 0) -> TrainState:
    """A fresh state; gpt2 has dropout, so its steps depend on the random numbers too."""
    model = build_model("gpt2", seed=1) if model is None else model
    module = StudentStep(model, [Objective("kl", forward_kl)], vocab_size=None, logits_bytes=2**20)
    optimizer = build_optimizer(module, CONFIG)
    torch.manual_seed(seed)
    stream = Prefetcher(build_stream(build_documents(LENGTHS), tokens=96), None)
    return TrainState(
        module, optimizer, build_schedule(optimizer, CONFIG, num_steps), stream, frozen_saved=frozen_saved
    )


def go_on(state: TrainState, folder: Path, num_steps: int, *, keep: int = 9, every: int | None = None, **settings: Any):
    """Trains up to ``num_steps``, and gives the losses."""
    losses: list[float] = []
    values = {"measure": None, "measure_every": None, "keep_best": False, "report": lambda *_: None, **settings}
    train(
        state,
        LiveTeacher(build_model(seed=2)),
        num_steps=num_steps,
        clip=1.0,
        checkpoints=Checkpoints(folder, keep=keep),
        checkpoint_every=every,
        record=lambda line: losses.append(line["loss_nats"]) if "loss_nats" in line else None,
        **values,
    )
    return losses


def same(a: Any, b: Any) -> bool:
    """Bitwise, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def everything(state: TrainState) -> dict[str, Any]:
    schedule = {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"}
    return {
        "model": dict(state.module.state_dict()),
        "optimizer": state.optimizer.state_dict(),
        "schedule": schedule,
        "stream": state.stream.state(),
        "random": torch.get_rng_state(),
        "step": state.step,
        "num_tokens": state.num_tokens,
        "time_s": state.time_s,
        "held_out": state.held_out,
        "best": state.best,
    }


def names(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in Checkpoints(folder, keep=1).all()]


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_everything_comes_back_bit_for_bit(family, tmp_path):
    state = build_state(build_model(family, seed=1))
    go_on(state, tmp_path, 3)
    state.held_out, state.best = {"loss_nats": 0.1 + 0.2}, {"step": 2, "loss_nats": 1 / 3}
    path = Checkpoints(tmp_path, keep=9).save(state)
    wanted = everything(state)
    assert wanted["optimizer"]["state"]
    other = build_state(build_model(family, seed=9), seed=7)
    assert not same(everything(other), wanted)
    Checkpoints(tmp_path, keep=9).load(other, path)
    assert same(everything(other), wanted)


def test_a_tied_table_stays_one(tmp_path):
    state = build_state(build_model("qwen2", seed=1))
    go_on(state, tmp_path, 2)
    other = build_state(build_model("qwen2", seed=9))
    Checkpoints(tmp_path, keep=9).load(other, tmp_path / "step-00000002")
    model = other.module.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_checkpoint_is_read_by_eye_but_for_its_tensors(tmp_path):
    go_on(build_state(), tmp_path, 2)
    numbers = json.loads((tmp_path / "step-00000002" / "state.json").read_text())
    assert numbers["step"] == 2
    assert numbers["stream"]["step"] == 2
    assert numbers["schedule"]["last_epoch"] == 2


@pytest.mark.parametrize("at", [1, 4])
def test_going_on_at_any_step_is_as_if_never_interrupted(at, tmp_path):
    whole = build_state()
    losses = go_on(whole, tmp_path / "whole", 6)
    first = build_state()
    begun = go_on(first, tmp_path / "parts", at)
    torch.manual_seed(999)
    second = build_state(build_model("gpt2", seed=9))
    Checkpoints(tmp_path / "parts", keep=9).load(second, Checkpoints(tmp_path / "parts", keep=9).latest())
    assert begun + go_on(second, tmp_path / "parts", 6) == losses
    wanted, found = everything(whole), everything(second)
    assert wanted.pop("time_s") > 0
    assert found.pop("time_s") > 0
    assert same(found, wanted)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(recipe, tmp_path, saved_model):
    def build(seed: int = 0) -> TrainState:
        settings = [f"student.model={saved_model('gpt2', seed=1)}", 'student.lora={rank: 2, targets: ["c_attn"]}']
        config = load(DistillConfig, recipe, ["device=cpu", f"seed={seed}", f"out={tmp_path}/run", *settings])
        student = build_student(config.student, dtype=torch.float32, device="cpu", seed=seed)
        return build_state(student.model, frozen_saved=False)

    return build


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_adapters_go_on_too_and_only_they_are_stored(adapted, tmp_path):
    whole = adapted()
    losses = go_on(whole, tmp_path / "whole", 4)
    begun = go_on(adapted(), tmp_path / "parts", 2)
    second = adapted(seed=5)
    Checkpoints(tmp_path / "parts", keep=9).load(second, tmp_path / "parts" / "step-00000002")
    assert begun + go_on(second, tmp_path / "parts", 4) == losses
    wanted, found = everything(whole), everything(second)
    del wanted["time_s"], found["time_s"]
    assert same(found, wanted)
    stored = FileSystemReader(tmp_path / "parts" / "step-00000002").read_metadata().state_dict_metadata
    assert {name for name in stored if name.startswith("model.")} == {
        f"model.{name}" for name, _ in whole.module.named_parameters() if "lora_" in name
    }


# --- which stay ------------------------------------------------------------------------------------------------------


def test_the_last_n_stay(tmp_path):
    go_on(build_state(), tmp_path, 5, keep=2, every=1)
    assert names(tmp_path) == [4, 5]
    assert Checkpoints(tmp_path, keep=2).latest() == tmp_path / "step-00000005"


def test_the_best_stays_too(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    state = build_state()
    go_on(
        state, tmp_path, 5, keep=2, every=1,
        measure=lambda _: {"loss_nats": next(losses)}, measure_every=1, keep_best=True,
    )  # fmt: skip
    assert names(tmp_path) == [2, 4, 5]


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    state = build_state()
    for step in (9, 10, 999, 10_000):
        state.step = step
        checkpoints.save(state)
    assert names(tmp_path) == [9, 10, 999, 10_000]


def test_saving_a_step_again_replaces_it(tmp_path):
    state, checkpoints = build_state(), Checkpoints(tmp_path, keep=2)
    checkpoints.save(state)
    state.num_tokens = 77
    path = checkpoints.save(state)
    assert json.loads((path / "state.json").read_text())["num_tokens"] == 77
    assert names(tmp_path) == [0]


def test_half_a_checkpoint_is_none(tmp_path):
    go_on(build_state(), tmp_path, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000003.tmp")
    checkpoints = Checkpoints(tmp_path, keep=9)
    assert checkpoints.latest() == tmp_path / "step-00000002"
    state = build_state()
    checkpoints.load(state, tmp_path / "step-00000002")
    go_on(state, tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nowhere", keep=1).latest() is None


# --- damage ----------------------------------------------------------------------------------------------------------


def tensor_file(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


def truncate(path: Path) -> None:
    file = tensor_file(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit of the student's weights."""
    file = tensor_file(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)


DAMAGES = {
    "truncated tensors": truncate,
    "no tensors": lambda path: tensor_file(path).unlink(),
    "a flipped bit": flip,
    "no index": lambda path: (path / ".metadata").unlink(),
    "half an index": lambda path: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:200]),
    "no numbers": lambda path: (path / "state.json").unlink(),
    "half the numbers": lambda path: (path / "state.json").write_text((path / "state.json").read_text()[:60]),
    "other numbers": lambda path: (path / "state.json").write_text('{"step": 2}'),
    "a list of numbers": lambda path: (path / "state.json").write_text("[2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told(damage, tmp_path):
    go_on(build_state(), tmp_path, 2, every=1)
    DAMAGES[damage](tmp_path / "step-00000002")
    with pytest.raises(DataError) as raised:
        Checkpoints(tmp_path, keep=9).load(build_state(), tmp_path / "step-00000002")
    assert str(tmp_path / "step-00000002") in str(raised.value)
    Checkpoints(tmp_path, keep=9).load(build_state(), tmp_path / "step-00000001")


def test_a_checkpoint_of_smaller_student_is_told(tmp_path):
    go_on(build_state(), tmp_path, 2)
    with pytest.raises((DataError, MismatchError)):
        Checkpoints(tmp_path, keep=9).load(build_state(build_model("gpt2", n_layer=3)), tmp_path / "step-00000002")


def test_a_checkpoint_over_other_data_is_told(tmp_path):
    go_on(build_state(), tmp_path, 2)
    state = build_state()
    state.stream = Prefetcher(build_stream(build_documents(LENGTHS, seed=8), tokens=96), None)
    with pytest.raises(MismatchError, match="the saved data stream differs in its documents"):
        Checkpoints(tmp_path, keep=9).load(state, tmp_path / "step-00000002")


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """No file can grow beyond that, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1000, 60_000])
def test_a_full_disk_loses_nothing(room, tmp_path):
    state = build_state()
    go_on(state, tmp_path, 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-00000002").iterdir()}
    losses = go_on(build_state(), tmp_path / "whole", 4)
    with file_size_limit(room), pytest.raises(StorageError, match="the checkpoint of step 3 could not be written") as e:
        go_on(state, tmp_path, 4, every=1)
    assert str(tmp_path / "step-00000002") in e.value.why
    assert "--resume" in e.value.fix
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["step-00000002"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "step-00000002").iterdir()} == before
    again = build_state()
    Checkpoints(tmp_path, keep=9).load(again, tmp_path / "step-00000002")
    assert go_on(again, tmp_path, 4) == losses[2:]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1).save(build_state())


def test_a_disk_that_fails_under_another_process(tmp_path, monkeypatch):
    """The zip writer of that process could not write its end; the OSError before it does not travel."""
    said = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *_: (_ for _ in ()).throw(said))
    with pytest.raises(StorageError, match="could not be written"):
        Checkpoints(tmp_path, keep=1).save(build_state())
    assert list(tmp_path.iterdir()) == []


def test_a_bug_while_saving_is_no_storage_error(tmp_path, monkeypatch):
    state = build_state()
    monkeypatch.setattr(state.stream, "state", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Checkpoints(tmp_path, keep=1).save(state)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_tensors_are_written_is_an_interruption(tmp_path, monkeypatch):
    """The second one, say, which stops at once; torch would make an exception of its own of it."""
    go_on(build_state(), tmp_path, 1)
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *_: signal.raise_signal(signal.SIGINT))
    state = build_state()
    state.step = 2
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path, keep=1).save(state)
    assert names(tmp_path) == [1]


# --- checkpoints from elsewhere --------------------------------------------------------------------------------------
class Attack:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def sealed_again(path: Path) -> None:
    """Makes a checkpoint consistent, as an attacker would who may write all of it."""
    numbers = read_json(path / "state.json")
    numbers["files"] = {name: crc32(path / name) for name in sorted(numbers["files"])}
    write_json(path / "state.json", seal(numbers))


def with_metadata(path: Path, change: Callable[[Any], Any]) -> None:
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # noqa: S301
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata)))


def attack_metadata(path: Path, proof: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Attack(proof)))


def attack_metadata_that_is_whole(path: Path, proof: Path) -> None:
    with_metadata(path, lambda metadata: (setattr(metadata, "planner_data", Attack(proof)), metadata)[1])


def attack_values(path: Path, proof: Path) -> None:
    file = io.BytesIO()
    torch.save(Attack(proof), file)
    (path / "evil").write_bytes(file.getvalue())

    def change(metadata: Any) -> Any:
        for index, info in metadata.storage_data.items():
            if index.fqn.endswith(".lr"):
                info.relative_path, info.offset, info.length = "evil", 0, len(file.getvalue())
        return metadata

    with_metadata(path, change)
    numbers = read_json(path / "state.json")
    write_json(path / "state.json", seal({**numbers, "files": {**numbers["files"], "evil": 0}}))


def attack_with_a_path(path: Path, proof: Path) -> None:  # noqa: ARG001
    shutil.copy(path / "__0_0.distcp", path.parent / "stolen")

    def change(metadata: Any) -> Any:
        for info in metadata.storage_data.values():
            info.relative_path = "../stolen"
        return metadata

    with_metadata(path, change)


@pytest.mark.parametrize("attack", [attack_metadata, attack_metadata_that_is_whole, attack_values, attack_with_a_path])
def test_a_checkpoint_from_elsewhere_runs_no_code_and_reads_no_other_files(attack, tmp_path):
    state = build_state()
    go_on(state, tmp_path / "a", 2)
    path = Checkpoints(tmp_path / "a", keep=9).save(state)
    attack(path, tmp_path / "proof")
    sealed_again(path)
    with pytest.raises(DataError, match="cannot be read"):
        Checkpoints(tmp_path / "a", keep=9).load(build_state(), path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("key", ["step", "num_tokens", "time_s", "stream", "schedule", "files"])
def test_a_state_that_was_changed_by_hand_is_refused(key, tmp_path):
    state = build_state()
    go_on(state, tmp_path, 2)
    path = Checkpoints(tmp_path, keep=9).save(state)
    numbers = json.loads((path / "state.json").read_text())
    numbers[key] = numbers[key] + 1 if isinstance(numbers[key], int | float) else {}
    (path / "state.json").write_text(json.dumps(numbers))
    with pytest.raises(DataError, match="cannot be read"):
        Checkpoints(tmp_path, keep=9).load(build_state(), path)

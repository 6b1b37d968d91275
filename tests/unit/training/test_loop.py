"""The training loop: what a step does, what it records, when it saves, and how it stops."""

import math
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_documents, build_model, build_stream
from stillroom.data.dataloader import BatchStream
from stillroom.distributed.group import RankGroup
from stillroom.errors import Interrupted, NonFiniteError, Stopped
from stillroom.losses.divergences import forward_kl
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.teachers.live import LiveTeacher
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.config import AdamWConfig
from stillroom.training.loop import train
from stillroom.training.prefetch import Prefetcher
from stillroom.training.state import TrainState, build_optimizer, build_schedule
from stillroom.training.step import StudentStep

LENGTHS = [6, 33, 12, 7, 29, 31, 18, 33, 5, 24, 9, 33, 16, 28, 33, 11]
OBJECTIVES = (Objective("forward_kl", forward_kl, 0.5), Objective("cross_entropy", cross_entropy, 0.25))
CONFIG = AdamWConfig(learning_rate=1e-2, schedule="linear")


def state_of(num_steps: int = 4, **stream: Any) -> TrainState:
    module = StudentStep(build_model(seed=1), OBJECTIVES, vocab_size=None, logits_bytes=2**20)
    optimizer = build_optimizer(module, CONFIG)
    schedule = build_schedule(optimizer, CONFIG, num_steps)
    given = build_stream(build_documents(LENGTHS), **{"tokens": 96, **stream})
    return TrainState(module, optimizer, schedule, Prefetcher(given, None))


def run(state: TrainState, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Trains four steps, and gives what was recorded."""
    recorded: list[dict[str, Any]] = []
    values: dict[str, Any] = {
        "num_steps": 4,
        "clip": 1.0,
        "checkpoint_every": None,
        "measure": None,
        "measure_every": None,
        "keep_best": False,
        "record": recorded.append,
        "report": lambda *_: None,
    }
    values["checkpoints"] = Checkpoints(folder, keep=9)
    train(state, LiveTeacher(build_model(seed=2)), **{**values, **settings})
    return recorded


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- a step ----------------------------------------------------------------------------------------------------------


def test_what_a_step_records(tmp_path):
    state = state_of()
    stream = build_stream(build_documents(LENGTHS), tokens=96)
    lines = run(state, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, micro_batches in zip(lines, stream, strict=False):
        assert line["num_kept"] == sum(micro_batch.num_kept for micro_batch in micro_batches)
        assert line["num_tokens"] == sum(int((micro_batch.documents >= 0).sum()) for micro_batch in micro_batches)
        assert line["num_kept"] < line["num_tokens"] <= 96
        assert line["loss_nats"] == pytest.approx(0.5 * line["forward_kl_nats"] + 0.25 * line["cross_entropy_nats"])
        assert line["time_s"] > 0
        assert line["epoch"] >= 0
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert state.num_tokens == sum(line["num_kept"] for line in lines)
    assert state.step == 4
    assert lines[-1]["loss_nats"] < lines[0]["loss_nats"]


def test_the_first_loss_is_that_of_the_student_as_it_came(tmp_path):
    teacher, student = LiveTeacher(build_model(seed=2)), build_model(seed=1)
    module = StudentStep(student, OBJECTIVES, vocab_size=None, logits_bytes=2**20)
    micro_batches = next(build_stream(build_documents(LENGTHS), tokens=96))
    num_kept = sum(micro_batch.num_kept for micro_batch in micro_batches)
    wanted = sum(
        module(micro_batch, teacher.forward(micro_batch), num_kept).loss.item() for micro_batch in micro_batches
    )
    assert run(state_of(), tmp_path)[0]["loss_nats"] == pytest.approx(wanted, rel=1e-6)


def gradient_norm(state: TrainState, clip: float | None, folder: Path) -> tuple[float, float]:
    """The norm that was recorded, and that of the gradient that the optimizer was given."""
    given = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        given.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    state.optimizer.register_step_pre_hook(look)
    (line, *_) = run(state, folder, clip=clip)
    return line["grad_norm"], math.sqrt(sum(g.double().square().sum().item() for g in given[0]))


def test_gradients_are_clipped_together(tmp_path):
    recorded, given = gradient_norm(state_of(), 0.01, tmp_path / "clipped")
    free = gradient_norm(state_of(), None, tmp_path / "free")
    assert given == pytest.approx(0.01, rel=1e-3)
    assert recorded == pytest.approx(free[0]) == pytest.approx(free[1], rel=1e-5)
    assert recorded > 0.1


def test_the_student_trains_with_dropout_and_the_teacher_without(tmp_path):
    state = state_of()
    state.module.eval()
    teacher = build_model("gpt2", seed=2)
    training = []
    state.module.register_forward_pre_hook(lambda module, _: training.append((module.training, teacher.training)))
    run(state, tmp_path)
    assert set(training) == {(True, False)}


# --- measuring and saving --------------------------------------------------------------------------------------------


def test_when_it_saves(tmp_path):
    run(state_of(), tmp_path / "every", checkpoint_every=3)
    assert saved(tmp_path / "every") == ["step-00000003", "step-00000004"]
    run(state_of(), tmp_path / "last", checkpoint_every=None)
    assert saved(tmp_path / "last") == ["step-00000004"]


def test_when_it_measures(tmp_path):
    state, modes = state_of(), []

    def measure(_: Callable[[], bool]) -> dict[str, float]:
        state.module.eval()
        modes.append(state.step)
        return {"loss_nats": 1.0, "num_tokens": 3}

    lines = run(state, tmp_path, measure=measure, measure_every=3)
    assert modes == [3, 4]
    assert [line["step"] for line in lines if "held_out" in line] == [3, 4]
    assert lines[-1] == {"step": 4, "held_out": {"loss_nats": 1.0, "num_tokens": 3}}
    assert state.held_out == {"loss_nats": 1.0, "num_tokens": 3}
    assert state.best == {}
    run(state_of(), tmp_path / "end", measure=lambda _: modes.append("end") or {"loss_nats": 1.0}, measure_every=None)
    assert modes == [3, 4, "end"]


def test_the_best_step_is_saved(tmp_path):
    state, losses = state_of(), iter([3.0, 1.0, math.nan, 2.0])
    run(state, tmp_path, measure=lambda _: {"loss_nats": next(losses)}, measure_every=1, keep_best=True)
    assert state.best == {"step": 2, "loss_nats": 1.0}
    assert saved(tmp_path) == ["step-00000001", "step-00000002", "step-00000004"]


def test_it_goes_on_from_where_the_state_is(tmp_path):
    state = state_of()
    run(state, tmp_path, num_steps=2)
    assert [line["step"] for line in run(state, tmp_path)] == [3, 4]
    assert run(state, tmp_path) == []


# --- stopping --------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_saves_and_stops(tmp_path):
    def press(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    state = state_of()
    with pytest.raises(Interrupted, match=r"interrupted after step 2 of 4; saved as .*step-00000002"):
        run(state, tmp_path, report=press)
    assert state.step == 2
    assert saved(tmp_path) == ["step-00000002"]


def test_ctrl_c_in_the_last_step_stops_what_would_follow(tmp_path):
    def press(event: str, _: Any) -> None:
        if event == "step":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted after step 1 of 1"):
        run(state_of(), tmp_path, report=press, num_steps=1)
    assert saved(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_measurement_is_given_up_and_made_after_the_resume(tmp_path, number):
    """Nothing that was trained is lost to a long measurement."""
    state, made = state_of(), []

    def measure(stop: Callable[[], bool]) -> dict[str, float] | None:
        if not made:
            made.append("begun")
            signal.raise_signal(number)
        return None if stop() else {"loss_nats": 1.0}

    notes: list[str] = []
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        run(state, tmp_path, measure=measure, measure_every=3, report=lambda e, v: notes.append(v.get("text", e)))
    assert any("press Ctrl-C again" in note for note in notes)
    assert saved(tmp_path) == ["step-00000003"]
    lines = run(state, tmp_path, measure=measure, measure_every=3)
    assert [(line["step"], "held_out" in line) for line in lines] == [(3, True), (4, False), (4, True)]


def stream_like(state: TrainState) -> BatchStream:
    """A stream that stands where that of the state stands."""
    stream = build_stream(build_documents(LENGTHS), tokens=96)
    stream.restore(state.stream.state())
    return stream


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, value):
    state = state_of()
    run(state, tmp_path, num_steps=2)
    with torch.no_grad():
        state.module.model.model.norm.weight[3] = value
    before = {name: tensor.clone() for name, tensor in state.module.state_dict().items()}
    step = next(stream_like(state))
    wanted = {
        f"text.jsonl line {d + 1}" for micro_batch in step for d in micro_batch.documents.unique().tolist() if d >= 0
    }
    with pytest.raises(NonFiniteError, match="step 3 is not finite") as raised:
        run(state, tmp_path)
    assert str(tmp_path / "step-00000002") in raised.value.why
    named = raised.value.values["documents"].split(" and ")[0].split(", ")
    assert set(named) <= wanted
    assert len(named) == min(len(wanted), 8)
    torch.testing.assert_close(dict(state.module.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    assert state.step == 2
    assert saved(tmp_path) == ["step-00000002"]


def test_a_checkpoint_that_is_still_written_is_the_last_good_one(tmp_path, monkeypatch):
    """A step that fails meanwhile waits for it, and names it."""
    state, waited, write, finish = state_of(), threading.Event(), Checkpoints._write, Checkpoints.finish

    def late(*given: Any) -> None:
        assert waited.wait(60)
        write(*given)

    def noted(checkpoints: Checkpoints) -> None:
        if checkpoints._writing is not None:
            waited.set()
        finish(checkpoints)

    def spoil(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 1:
            state.module.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)

    monkeypatch.setattr(Checkpoints, "_write", late)
    monkeypatch.setattr(Checkpoints, "finish", noted)
    checkpoints = Checkpoints(tmp_path, keep=9, background=True)
    with pytest.raises(NonFiniteError, match="step 2 is not finite") as raised:
        run(state, tmp_path, checkpoints=checkpoints, checkpoint_every=1, report=spoil)
    assert str(tmp_path / "step-00000001") in raised.value.why


def test_a_gradient_that_is_not_finite_is_noticed_though_the_loss_is(tmp_path):
    state = state_of()
    state.module.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError) as raised:
        run(state, tmp_path)
    assert math.isfinite(raised.value.values["loss"])
    assert math.isnan(raised.value.values["gradient norm"])
    assert "none: no checkpoint was due" in raised.value.why


def test_a_schedule_is_followed_step_by_step_and_told(tmp_path):
    state = state_of()

    def objectives(progress: float) -> tuple[tuple[Objective, ...], dict[str, float]]:
        cool = {"temperature": 2.0 - progress}
        soft, hard = (
            Objective("forward_kl", forward_kl, 1 - progress, cool),
            Objective("cross_entropy", cross_entropy, progress),
        )
        return (soft, hard), {}

    lines = run(state, tmp_path, objectives=objectives)
    assert [line["forward_kl_weight"] for line in lines] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [line["forward_kl_temperature"] for line in lines] == pytest.approx([2, 5 / 3, 4 / 3, 1])
    assert "cross_entropy_temperature" not in lines[0]
    for line in lines:
        share = line["cross_entropy_weight"]
        assert line["loss_nats"] == pytest.approx(
            (1 - share) * line["forward_kl_nats"] + share * line["cross_entropy_nats"]
        )


# --- a step that is read when the next has been launched, as on a CUDA device ----------------------------------------


def late_state(num_steps: int = 4) -> TrainState:
    state = state_of(num_steps)
    state.late = True
    return state


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("time_s", "tokens_per_s")} for line in lines]


def trained(state: TrainState) -> dict[str, Any]:
    return {"module": dict(state.module.state_dict()), "optimizer": state.optimizer.state_dict()["state"]}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_late_reading_changes_no_number(tmp_path, clip):
    settings: dict[str, Any] = {"clip": clip, "checkpoint_every": 3, "measure_every": 2}
    at_once, late = state_of(), late_state()
    measure = {"measure": lambda _: {"loss_nats": 1.0}}
    wanted = run(at_once, tmp_path / "at_once", **settings, **measure)
    lines = run(late, tmp_path / "late", **settings, **measure)
    assert without_times(lines) == without_times(wanted)
    assert [list(line) for line in lines] == [list(line) for line in wanted]
    assert all(line["time_s"] > 0 for line in lines if "time_s" in line)
    assert late.time_s == pytest.approx(sum(line.get("time_s", 0) for line in lines), abs=1e-3)
    torch.testing.assert_close(trained(late), trained(at_once), rtol=0, atol=0)
    assert saved(tmp_path / "late") == saved(tmp_path / "at_once")


def test_a_late_step_is_read_after_the_next_is_launched_and_before_a_boundary(tmp_path):
    state, order = late_state(6), []
    state.optimizer.register_step_post_hook(lambda *_: order.append("update"))
    run(state, tmp_path, num_steps=6, checkpoint_every=3, report=lambda _, values: order.append(values["step"]))
    assert order == ["update", "update", 1, "update", 2, 3, "update", "update", 4, "update", 5, 6]


@pytest.mark.parametrize("bad", [1, 3, 4])
def test_no_update_is_made_from_a_late_step_that_is_not_finite_on(tmp_path, bad):
    """The step after it is launched before it is read, and is not applied either."""
    wanted = state_of()
    before = run(wanted, tmp_path / "wanted", num_steps=bad - 1) if bad > 1 else []
    state, recorded, updates = late_state(), [], []
    state.module.model.model.norm.weight.register_hook(lambda g: g * math.nan if state.step == bad - 1 else g)
    state.optimizer.register_step_post_hook(lambda *_: updates.append(state.step))
    with pytest.raises(NonFiniteError, match=f"step {bad} is not finite") as raised:
        run(state, tmp_path / "late", record=recorded.append)
    assert raised.value.values["documents"]
    assert len(updates) == min(bad + 1, 4)
    assert without_times(recorded) == without_times(before)
    assert (state.step, state.num_tokens) == (wanted.step, wanted.num_tokens) == (bad - 1, wanted.num_tokens)
    torch.testing.assert_close(dict(state.module.state_dict()), dict(wanted.module.state_dict()), rtol=0, atol=0)
    if bad > 1:
        torch.testing.assert_close(trained(state), trained(wanted), rtol=0, atol=0)
    assert all(moments["step"] == bad - 1 for moments in trained(state)["optimizer"].values())
    assert state.schedule.state_dict() == wanted.schedule.state_dict()
    assert state.optimizer.param_groups[0]["lr"] == wanted.optimizer.param_groups[0]["lr"]
    assert saved(tmp_path / "late") == []


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_during_a_step_stops_after_it(tmp_path, late):
    state, recorded = late_state() if late else state_of(), []

    def press(*_: Any) -> None:
        if state.step == 2:
            handle.remove()
            signal.raise_signal(signal.SIGINT)

    handle = state.module.register_forward_pre_hook(press)
    with pytest.raises(Interrupted, match=r"interrupted after step 3 of 4; saved as .*step-00000003"):
        run(state, tmp_path, record=recorded.append)
    assert [line["step"] for line in recorded] == [1, 2, 3]
    assert saved(tmp_path) == ["step-00000003"]


@dataclass(frozen=True)
class OneOfTwo(RankGroup):
    """A rank beside another one that adds nothing but SIGTERM, from its step 2 on."""

    world_size: int = 2
    sums: list[int] = field(default_factory=list)

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums.append(len(tensor))
        tensor[-1] += len(self.sums) >= 2
        return tensor


@pytest.mark.parametrize(("late", "last"), [(False, 2), (True, 3)])
def test_a_signal_of_another_rank_stops_all_when_its_step_is_read(tmp_path, late, last):
    state, ranks = late_state() if late else state_of(), OneOfTwo()
    state.ranks, recorded = ranks, []
    with pytest.raises(Stopped, match=f"after step {last} of 4"):
        run(state, tmp_path, record=recorded.append)
    assert [line["step"] for line in recorded] == list(range(1, last + 1))
    assert state.step == last
    assert ranks.sums == [5] * last  # one sum a step: loss, square, two terms, signal
    assert saved(tmp_path) == [f"step-{last:08d}"]

"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from torch import Tensor

from stillroom.batch import Batch
from stillroom.distributed.group import RankGroup
from stillroom.distributed.sharding import squares, summed_later
from stillroom.errors import NonFiniteError, OutOfMemoryError
from stillroom.losses.objective import Objective, widest_float
from stillroom.models.dtensor import local_part
from stillroom.runs import deferred_interrupts, ended
from stillroom.teachers.base import Teacher
from stillroom.training.checkpoint import Checkpoints, TrainState
from stillroom.training.prefetch import MicroBatches

MANY = 2.0**20
"""More than there are processes."""

Measure = Callable[[Callable[[], bool]], dict[str, float] | None]
"""Makes the held-out measurement, or gives None where the function that it is given says to stop."""

Scheduled = tuple[Sequence[Objective], Mapping[str, float]]

Report = Callable[[str, Mapping[str, Any]], None]
"""Is told what happens: the name of the event ("tokenise", "step", "held_out", "note") and its values."""


def train(
    state: TrainState,
    teacher: Teacher | None,
    *,
    num_steps: int,
    clip: float | None,
    checkpoints: Checkpoints,
    checkpoint_every: int | None,
    measure: Measure | None,
    measure_every: int | None,
    keep_best: bool,
    record: Callable[[dict[str, Any]], None],
    report: Report,
    objectives: Callable[[float], Scheduled] | None = None,
) -> None:
    """Goes on from ``state`` to ``num_steps`` optimizer steps and the measurement of the last, and saves.

    Args:
        teacher: None where no objective needs one.
        clip: the longest gradient, over all parameters.
        measure: the held-out measurement, made every ``measure_every`` steps and at the end.
        record: takes each line of metrics.jsonl.
        objectives: those at a point of the run, from 0 at the first step to 1 at the last, where they change, and the
            weights of those of inner states.

    Raises:
        NonFiniteError: a loss or a gradient is not finite. The step is not taken.
        Interrupted: Ctrl-C was pressed; the state is saved.
    """

    def measurement_is_due() -> bool:
        due = state.step == num_steps or (bool(measure_every) and state.step % measure_every == 0)
        return measure is not None and due and state.step > state.measured_at

    def signal() -> int:
        return interrupted.number or getattr(teacher, "signal", 0)  # a teacher on other processes tells theirs

    asked = "finishing this step, then saving; press Ctrl-C again to stop at once, without saving"
    state.stopped_by = 0
    with deferred_interrupts(lambda: report("note", {"text": asked})) as interrupted:
        while state.step < num_steps or measurement_is_due():
            if not measurement_is_due():
                state.module.train()
                now = None if objectives is None else objectives(state.step / max(1, num_steps - 1))
                values = optimizer_step(state, teacher, clip, checkpoints, now, signal())
                record(values)
                report("step", {**values, "num_steps": num_steps, "total_time_s": state.time_s})
            if measure is not None and measurement_is_due() and not state.stopped_by:
                if (measured := measure(interrupted)) is None:
                    state.stopped_by = most_urgent(state.ranks, signal())
                else:
                    state.held_out, state.measured_at = measured, state.step
                    record({"step": state.step, "held_out": measured})
                    report("held_out", {"step": state.step, **measured})
                    if keep_best and measured["loss_nats"] < state.best.get("loss_nats", math.inf):
                        state.best = {"step": state.step, "loss_nats": measured["loss_nats"]}

            if state.ranks.world_size == 1:
                state.stopped_by = state.stopped_by or signal()
            last, is_best = state.step == num_steps, state.best.get("step") == state.step
            due = bool(checkpoint_every) and state.step % checkpoint_every == 0
            if last or due or is_best or state.stopped_by:
                path = checkpoints.save(state)
                if state.stopped_by:
                    checkpoints.finish()
                    raise ended(
                        state.stopped_by, f"interrupted after step {state.step} of {num_steps}; saved as {path}"
                    )
        checkpoints.finish()


def optimizer_step(
    state: TrainState,
    teacher: Teacher | None,
    clip: float | None,
    checkpoints: Checkpoints,
    now: Scheduled | None = None,
    signal: int = 0,
    micro_batches: MicroBatches | None = None,
) -> dict[str, Any]:
    """One optimizer step: all its micro-batches, then the update. Returns its line of metrics.

    Args:
        now: the objectives and weights of this step, where they change.
        signal: the one that asked this process to stop, or 0; the state then says so in all.
        micros: its micro-batches; None takes the next of the stream.

    Raises:
        NonFiniteError, OutOfMemoryError: the update was not made.
    """
    start = time.perf_counter()
    device = state.device
    micro_batches = next(state.stream) if micro_batches is None else micro_batches
    num_kept, num_positions = micro_batches.totals

    dtype = widest_float(device)
    total = torch.zeros((), dtype=dtype, device=device)
    sums = torch.zeros(len(state.module.terms), dtype=dtype, device=device)
    for number, (micro_batch, prefetched) in enumerate(micro_batches, 1):
        with _enough_memory(micro_batch), summed_later(state.forward, number < len(micro_batches)):
            batch = micro_batch.to(device)
            teacher_output = None if teacher is None else teacher.forward(batch, prefetched)
            result = state.forward(batch, teacher_output, num_kept, *(now or ()))
            result.loss.backward()
        total += result.loss.detach()
        sums += result.sums
    gradients = [p.grad for p in state.module.parameters() if p.grad is not None]
    mine = [total.cpu().double().view(1), squares(gradients, state.ranks).view(1), sums.cpu().double() / num_kept]
    loss, square, *terms, stopped_by = state.ranks.all_reduce_(torch.cat([*mine, _asked(signal)])).tolist()
    state.stopped_by = _most_urgent(stopped_by)
    grad_norm = math.sqrt(square)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _not_finite(state, loss, grad_norm, [batch for batch, _ in micro_batches], checkpoints)
    if clip is not None and grad_norm > clip:
        for gradient in gradients:
            local_part(gradient).mul_(clip / (grad_norm + 1e-6))
    learning_rate = state.schedule.get_last_lr()[0]
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)

    seconds = time.perf_counter() - start
    state.step += 1
    state.num_tokens += num_kept
    state.time_s += seconds
    return {
        "step": state.step,
        "epoch": state.stream.epoch,
        "loss_nats": loss,
        **{_column(name, state): value for name, value in zip(state.module.terms, terms, strict=True)},
        **({} if now is None else _settings(*now)),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": num_positions,
        "num_kept": num_kept,
        "time_s": round(seconds, 4),
        "tokens_per_s": round(num_positions / seconds, 1),
    }


def most_urgent(ranks: RankGroup, signal: int) -> int:
    """The signal that any process was sent, Ctrl-C before SIGTERM; 0 where none was."""
    return _most_urgent(ranks.all_reduce_(_asked(signal)).item())


def _asked(signal: int) -> Tensor:
    """A signal as a number of which the sum over processes still tells which came."""
    return torch.tensor([MANY if signal == SIGINT else 1.0 if signal else 0.0], dtype=torch.float64)


def _most_urgent(total: float) -> int:
    return SIGINT if total >= MANY else SIGTERM if total else 0


def _column(name: str, state: TrainState) -> str:
    """What an objective's value is called in the metrics: distances of inner states are in units of their own."""
    return f"{name}_distance" if name in state.module.hidden else f"{name}_nats"


def _settings(objectives: Sequence[Objective], hidden: Mapping[str, float]) -> dict[str, float]:
    """What a schedule has made of the objectives."""
    weights = {f"{o.name}_weight": o.weight for o in objectives}
    weights |= {f"{name}_weight": weight for name, weight in hidden.items()}
    return weights | {
        f"{o.name}_temperature": t for o in objectives if (t := o.arguments.get("temperature")) is not None
    }


@contextmanager
def _enough_memory(micro_batch: Batch) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, length = micro_batch.tokens.shape
        raise OutOfMemoryError(
            "the device has too little memory for a micro-batch",
            {"micro-batch": f"{rows} rows of {length} tokens", "device": str(error).split(". ")[0][:160]},
            why="The step was not made; what earlier checkpoints hold is whole.",
            fix="Lower batch.micro_tokens, which does not change the result, or logits_bytes, and go on with --resume; "
            "or use student.gradient_checkpointing=true in a new run.",
        ) from error


def _not_finite(
    state: TrainState, loss: float, grad_norm: float, micro_batches: Sequence[Batch], checkpoints: Checkpoints
) -> NonFiniteError:
    """The error of a step, which fails in all processes at once, with the documents of all."""
    mine = {int(d) for micro_batch in micro_batches for d in micro_batch.documents.unique() if d >= 0}
    found = sorted(set().union(*state.ranks.all_gather(mine)))
    names = list(dict.fromkeys(state.stream.documents.name(d) for d in found[:8]))
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return NonFiniteError(
        f"step {state.step + 1} is not finite",
        {"loss": loss, "gradient norm": grad_norm, "documents": ", ".join(names) + more},
        why="The update was not made: it would have spoilt every parameter. The last good checkpoint is "
        f"{checkpoints.latest() or 'none: no checkpoint was due before this step'}.",
        fix="Look at those documents. A run that is resumed meets them again with the same settings; to train with a "
        "lower optimizer.learning_rate, with optimizer.clip or in precision=float32, start again with --overwrite.",
    )

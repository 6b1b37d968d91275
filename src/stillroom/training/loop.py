"""The training loop: its steps, checkpoints and held-out measurements, and its orderly end after a signal."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from signal import SIGINT, SIGTERM
from typing import Any

import torch

from stillroom.batch import Batch
from stillroom.distributed.sharding import gradients_summed_later, squared_norm
from stillroom.errors import NonFiniteError, OutOfMemoryError
from stillroom.losses.objective import widest_float
from stillroom.models.dtensor import local_part
from stillroom.runs import deferred_interrupts, ended
from stillroom.teachers.base import Teacher
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.prefetch import MicroBatches
from stillroom.training.state import TrainState

SIGINT_CODE = 2.0**20
"""How a step's sum over ranks counts Ctrl-C, and SIGTERM as 1: more than there are ranks."""

Measure = Callable[[Callable[[], bool]], dict[str, float] | None]
"""Makes the held-out measurement; returns None where the function that it is given came to return true."""

Scheduled = tuple[Any, ...]
"""What a schedule gives the trained module's forward in a step."""

Report = Callable[[str, Mapping[str, Any]], None]
"""Takes what happens: the name of the event ("tokenise", "step", "held_out", "note") and its values."""


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
    """Trains from ``state`` to ``num_steps`` optimizer steps and the measurement of the last, and saves.

    Args:
        teacher: None where no objective needs one.
        clip: the longest gradient, over all parameters.
        measure: makes the held-out measurement, every ``measure_every`` steps and at the end.
        record: takes each line of metrics.jsonl.
        objectives: gives what the trained module's forward takes besides, where it changes, at a point of the run from
            0 at the first step to 1 at the last.

    Raises:
        NonFiniteError: a loss or a gradient is not finite. The update was not made.
        Interrupted: Ctrl-C was pressed or SIGTERM came; the state is saved.
    """

    def measurement_is_due() -> bool:
        due = state.step == num_steps or (bool(measure_every) and state.step % measure_every == 0)
        return measure is not None and due and state.step > state.measured_at

    def signal() -> int:
        return interrupted.number or getattr(teacher, "signal", 0)  # of a teacher on other processes

    note = "finishing this step, then saving; press Ctrl-C again to stop at once, without saving"
    state.stopped_by = 0
    with deferred_interrupts(lambda: report("note", {"text": note})) as interrupted:
        while state.step < num_steps or measurement_is_due():
            if not measurement_is_due():
                state.module.train()
                scheduled = None if objectives is None else objectives(state.step / max(1, num_steps - 1))
                values = optimizer_step(state, teacher, clip, checkpoints, scheduled, signal())
                record(values)
                report("step", {**values, "num_steps": num_steps, "total_time_s": state.time_s})
            if measure is not None and measurement_is_due() and not state.stopped_by:
                if (measured := measure(interrupted)) is None:
                    state.stopped_by = _most_urgent(state.ranks.all_reduce_(_signal_code(signal())).item())
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
    scheduled: Scheduled | None = None,
    signal: int = 0,
    micro_batches: MicroBatches | None = None,
) -> dict[str, Any]:
    """Makes one optimizer step: all its micro-batches, then the update. Returns its line of metrics.jsonl.

    Args:
        scheduled: what the trained module's forward takes besides, where there is a schedule.
        signal: the signal that asked this process to stop, or 0; ``state.stopped_by`` then has it in all processes.
        micro_batches: None takes the next of the stream.

    Raises:
        NonFiniteError, OutOfMemoryError: the update was not made.
    """
    start = time.perf_counter()
    device, module = state.device, state.module
    micro_batches = next(state.stream) if micro_batches is None else micro_batches
    num_counted = getattr(micro_batches.totals, module.counts)

    dtype = widest_float(device)
    total = torch.zeros((), dtype=dtype, device=device)
    sums = torch.zeros(len(module.columns), dtype=dtype, device=device)
    for number, (micro_batch, prefetched) in enumerate(micro_batches, 1):
        with _enough_memory(micro_batch), gradients_summed_later(state.forward, number < len(micro_batches)):
            batch = micro_batch.to(device)
            teacher_output = None if teacher is None else teacher.forward(batch, prefetched)
            result = state.forward(batch, teacher_output, num_counted, *(scheduled or ()))
            result.loss.backward()
        total += result.loss.detach()
        sums += result.sums
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    square = squared_norm(gradients, state.ranks)
    numbers = [total.cpu().double().view(1), square.view(1), sums.cpu().double() / num_counted, _signal_code(signal)]
    loss, square, *terms, stopped_by = state.ranks.all_reduce_(torch.cat(numbers)).tolist()
    state.stopped_by = _most_urgent(stopped_by)
    grad_norm = math.sqrt(square)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _not_finite(state, loss, grad_norm, micro_batches, checkpoints)
    if clip is not None and grad_norm > clip:
        for gradient in gradients:
            local_part(gradient).mul_(clip / (grad_norm + 1e-6))
    learning_rate = state.schedule.get_last_lr()[0]
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)

    seconds = time.perf_counter() - start
    state.step += 1
    state.num_tokens += micro_batches.totals.num_kept
    state.time_s += seconds
    num_positions = micro_batches.totals.num_positions
    return {
        "step": state.step,
        "epoch": state.stream.epoch,
        "loss_nats": loss,
        **dict(zip(module.columns, terms, strict=True)),
        **({} if scheduled is None else module.scheduled_columns(*scheduled)),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": num_positions,
        module.counts: num_counted,
        "time_s": round(seconds, 4),
        "tokens_per_s": round(num_positions / seconds, 1),
    }


def _signal_code(signal: int) -> torch.Tensor:
    """Returns a signal as a number [1] whose sum over ranks still tells which signals came."""
    return torch.tensor([SIGINT_CODE if signal == SIGINT else 1.0 if signal else 0.0], dtype=torch.float64)


def _most_urgent(total: float) -> int:
    """Returns the signal that any process was sent, Ctrl-C before SIGTERM; 0 where none was."""
    return SIGINT if total >= SIGINT_CODE else SIGTERM if total else 0


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
    state: TrainState, loss: float, grad_norm: float, micro_batches: MicroBatches, checkpoints: Checkpoints
) -> NonFiniteError:
    """Returns the error of a step, which fails in all processes at once, with the documents of all."""
    own = {int(d) for micro_batch, _ in micro_batches for d in micro_batch.documents.unique() if d >= 0}
    documents = sorted(set().union(*state.ranks.all_gather(own)))
    names = list(dict.fromkeys(state.stream.documents.name(d) for d in documents[:8]))
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return NonFiniteError(
        f"step {state.step + 1} is not finite",
        {"loss": loss, "gradient norm": grad_norm, "documents": ", ".join(names) + more},
        why="The update was not made: it would have spoilt every parameter. The last good checkpoint is "
        f"{checkpoints.latest() or 'none: no checkpoint was due before this step'}.",
        fix="Look at those documents. A run that is resumed meets them again with the same settings; to train with a "
        "lower optimizer.learning_rate, with optimizer.clip or in precision=float32, start again with --overwrite.",
    )

"""The training loop: its steps, checkpoints and held-out measurements, and its orderly end after a signal."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from torch import Tensor

from stillroom.distributed.sharding import gradients_summed_later, squared_norm
from stillroom.errors import NonFiniteError, OutOfMemoryError, StorageError
from stillroom.losses.objective import widest_float
from stillroom.models.safetensors_io import local_part
from stillroom.runs import deferred_interrupts, ended
from stillroom.teachers.base import Teacher
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.prefetch import MicroBatches
from stillroom.training.state import TrainState, skip_updates

SIGINT_CODE = 2.0**20
"""The count of Ctrl-C in a step's sum over ranks, where SIGTERM is 1: more than there are ranks."""

Measure = Callable[[Callable[[], bool]], dict[str, float] | None]
"""Makes the held-out measurement; returns None where the function that it is given came to return true."""

Scheduled = tuple[Any, ...]
"""The arguments that a schedule gives the trained module's forward in a step."""

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

    launched: list[LaunchedStep] = []

    def read(unread: int = 0) -> None:
        """Reads the steps that have been launched, but for the last ``unread``."""
        while len(launched) > unread:
            values = launched.pop(0).read()
            record(values)
            report("step", {**values, "num_steps": num_steps, "total_time_s": state.time_s})

    note = "finishing this step, then saving; press Ctrl-C again to stop at once, without saving"
    state.stopped_by = 0
    with deferred_interrupts(lambda: report("note", {"text": note})) as interrupted:
        while state.step < num_steps or measurement_is_due():
            if not measurement_is_due():
                state.module.train()
                scheduled = None if objectives is None else objectives(state.step / max(1, num_steps - 1))
                launched.append(optimizer_step(state, teacher, clip, checkpoints, scheduled, signal()))
                read(unread=int(state.late))
            if measurement_is_due():
                read()
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
                read()
                path = checkpoints.save(state)
                if state.stopped_by:
                    checkpoints.finish()
                    raise ended(
                        state.stopped_by, f"interrupted after step {state.step} of {num_steps}; saved as {path}"
                    )
        checkpoints.finish()


class LaunchedStep:
    """An optimizer step that has been launched, and its line of metrics.jsonl once its numbers are there.

    Args:
        numbers: the loss, the squared norm of the gradient, the mean of each term and the code of the signals, summed
            over all processes; where they lie on a CUDA device, they are copied without waiting for it.
        line: the values of the line that are known already, in its order; those of the numbers are None.
        start: when the step began, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        state: TrainState,
        numbers: Tensor,
        line: dict[str, Any],
        micro_batches: MicroBatches,
        checkpoints: Checkpoints,
        start: float,
    ) -> None:
        self.state, self.line, self.checkpoints, self.start = state, line, checkpoints, start
        self.documents = [micro_batch.documents for micro_batch, _ in micro_batches]
        self.numbers, self.copied, self.checked = numbers, None, False
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(numbers.device))
        rates = [group["lr"] for group in state.optimizer.param_groups]
        self.before = state.step, state.num_tokens, state.schedule.state_dict(), rates

    def check(self) -> None:
        """Waits for the numbers, and sets ``state.stopped_by`` to the signal that any process was sent.

        Raises:
            NonFiniteError: the loss or the gradient is not finite. This update was not made nor any after it, and the
                state is set to what it was when the step was launched.
        """
        if self.checked:
            return
        if self.copied is not None:
            self.copied.synchronize()
        loss, square, *terms, stopped_by = self.numbers.tolist()
        state, grad_norm, self.checked = self.state, math.sqrt(square), True
        state.stopped_by = _most_urgent(stopped_by) or state.stopped_by
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            state.step, state.num_tokens, schedule, rates = self.before
            state.schedule.load_state_dict(schedule)
            for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            skip_updates(state.optimizer, None)
            own = {int(d) for numbers in self.documents for d in numbers.unique() if d >= 0}
            documents = sorted(set().union(*state.ranks.all_gather(own)))  # since it fails in all processes at once
            with suppress(StorageError):  # then an earlier one is the last good one
                self.checkpoints.finish()
            names = list(dict.fromkeys(state.stream.documents.name(d) for d in documents[:8]))
            more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
            raise NonFiniteError(
                f"step {state.step + 1} is not finite",
                {"loss": loss, "gradient norm": grad_norm, "documents": ", ".join(names) + more},
                why="The update was not made: it would have spoiled every parameter. The last good checkpoint is "
                f"{self.checkpoints.latest() or 'none: no checkpoint was due before this step'}.",
                fix="Look at those documents. A run that is resumed meets them again with the same settings; to train "
                "with a lower optimizer.learning_rate, with optimizer.clip or in precision=float32, start again with "
                "--overwrite.",
            )
        names = ["loss_nats", *state.module.columns, "grad_norm"]
        self.line.update(zip(names, [loss, *terms, grad_norm], strict=True))

    def read(self) -> dict[str, Any]:
        """Waits for the step, and returns its line of metrics.jsonl. A step's time ends here, and begins no earlier
        than that of the step before ended.

        Raises:
            NonFiniteError: as `check` says.
        """
        self.check()
        now, state = time.perf_counter(), self.state
        seconds = now - max(self.start, state.read_at)
        state.read_at = now
        state.time_s += seconds
        return {**self.line, "time_s": round(seconds, 4), "tokens_per_s": round(self.line["num_tokens"] / seconds, 1)}


def optimizer_step(
    state: TrainState,
    teacher: Teacher | None,
    clip: float | None,
    checkpoints: Checkpoints,
    scheduled: Scheduled | None = None,
    signal: int = 0,
    micro_batches: MicroBatches | None = None,
) -> LaunchedStep:
    """Launches one optimizer step: all its micro-batches, then the update. With ``state.late`` nothing waits for the
    device, which leaves out the updates of a step that is not finite and of all after it, until that step is read.

    Args:
        scheduled: what the trained module's forward takes besides, where there is a schedule.
        signal: the signal that asked this process to stop, or 0; ``state.stopped_by`` has it in all processes once the
            step is read.
        micro_batches: None takes the next of the stream.

    Raises:
        NonFiniteError: without ``state.late``; the update was not made.
        OutOfMemoryError: the update was not made.
    """
    start = time.perf_counter()
    device, module = state.device, state.module
    micro_batches = next(state.stream) if micro_batches is None else micro_batches
    num_counted = getattr(micro_batches.totals, module.counts)

    dtype = widest_float(device)
    total = torch.zeros((), dtype=dtype, device=device)
    sums = torch.zeros(len(module.columns), dtype=dtype, device=device)
    for number, (micro_batch, prefetched) in enumerate(micro_batches, 1):
        try:
            with gradients_summed_later(state.forward, number < len(micro_batches)):
                batch = micro_batch.to(device)
                teacher_output = None if teacher is None else teacher.forward(batch, prefetched)
                result = state.forward(batch, teacher_output, num_counted, *(scheduled or ()))
                result.loss.backward()
        except torch.OutOfMemoryError as error:
            rows, length = micro_batch.tokens.shape
            raise OutOfMemoryError(
                "the device has too little memory for a micro-batch",
                {"micro-batch": f"{rows} rows of {length} tokens", "device": str(error).split(". ")[0][:160]},
                why="The step was not made; what earlier checkpoints hold is whole.",
                fix="Lower batch.micro_tokens, which does not change the result, or logits_bytes, and go on with "
                "--resume; or use student.gradient_checkpointing=true in a new run.",
            ) from error
        total += result.loss.detach()
        sums += result.sums
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    home = device if state.late else torch.device("cpu")
    square = squared_norm(gradients, state.ranks, home)
    numbers = [total.to(home).double().view(1), square.view(1), sums.to(home).double() / num_counted]
    numbers = state.ranks.all_reduce_(torch.cat([*numbers, _signal_code(signal, home)]))
    line = {
        "step": state.step + 1,
        "epoch": state.stream.epoch,
        "loss_nats": None,
        **dict.fromkeys(module.columns),
        **({} if scheduled is None else module.scheduled_columns(*scheduled)),
        "grad_norm": None,
        "learning_rate": state.schedule.get_last_lr()[0],
        "num_tokens": micro_batches.totals.num_positions,
        module.counts: num_counted,
    }
    launched = LaunchedStep(state, numbers, line, micro_batches, checkpoints, start)
    if state.late:
        skip_updates(state.optimizer, ~numbers[:2].isfinite().all())
    else:
        launched.check()
    norm = numbers[1].sqrt()
    if gradients and clip is not None and (state.late or norm > clip):
        parts = [local_part(gradient) for gradient in gradients]
        factor = torch.where(norm > clip, clip / (norm + 1e-6), 1.0)
        torch._foreach_mul_(parts, factor.to(parts[0]))  # pyright: ignore[reportPrivateImportUsage]
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.num_tokens += micro_batches.totals.num_kept
    return launched


def _signal_code(signal: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns a signal as a number [1] whose sum over ranks still tells which signals came."""
    code = SIGINT_CODE if signal == SIGINT else 1.0 if signal else 0.0
    return torch.full((1,), code, dtype=torch.float64, device=device)  # filled there: a copy would wait for the device


def _most_urgent(total: float) -> int:
    """Returns the signal that any process was sent, Ctrl-C before SIGTERM; 0 where none was."""
    return SIGINT if total >= SIGINT_CODE else SIGTERM if total else 0

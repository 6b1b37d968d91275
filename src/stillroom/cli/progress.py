"""The progress of a running verb on stderr: one live line on a terminal, plain lines now and then in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from stillroom.terminal import harmless, say

LOG_EVERY_S = 10.0


class Progress:
    """Takes a verb's events and shows them; a context manager, so that the live line ends as it should.

    What one of several workers does, as ``part`` of an event says, is told in plain lines that begin with its name.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._counts = ""
        self._name = ""
        self._last = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        if self.quiet:
            return
        if "part" in values:
            self.live, self._name = False, f"{values['part']}: "
        if event == "step":
            self._step(values)
        elif event == "capture":
            self._capture(values)
        elif event in ("score", "task"):
            self._counted(values)
        elif event == "tokenise":
            self._periodic(f"tokenizing {values['path']}: {values['rows']:,} rows")
        elif event == "held_out":
            self._write(f"held out after step {values['step']}: {_numbers(values, skip=('step', 'num_tokens'))}")
        else:
            self._write(values["text"])

    def _capture(self, values: Mapping[str, Any]) -> None:
        text = f"{_short(values['tokens_per_s'])} tokens/s"
        if "requests" in values:
            text += f", {values['requests']:,} requests ({values['retries']} tried again), cost {values['cost']:.2f}"
        if self.live:
            self._bar_at(values["done"], values["first"], values["total"], " documents", text)
        else:
            left = (values["total"] - values["done"]) * values["time_s"] / max(1, values["done"] - values["first"])
            line = f"captured {values['done']:,} of {values['total']:,} documents: {text}, {_duration(left)} left"
            self._periodic(line, now=values["done"] == values["total"])

    def _counted(self, values: Mapping[str, Any]) -> None:
        """Tokens that models have read, or questions that they have answered."""
        done, total = values["done"], values["total"]
        unit, text, counts = " tokens", values["model"], "tokens"
        if "task" in values:
            unit, text = " answers", f"{values['task']}: {values['model']}"
            counts = text
        if self._bar is not None and counts != self._counts:
            self._bar.close()
            self._bar = None
        self._counts = counts
        if self.live:
            self._bar_at(done, 0, total, unit, text)
        else:
            self._periodic(f"{text}: {done:,} of {total:,}{unit}", now=done == total)

    def _step(self, values: Mapping[str, Any]) -> None:
        terms = {k: v for k, v in values.items() if k.endswith(("_nats", "_loss", "_distance"))}
        if len(terms) == 2:  # one objective: its value is the loss
            terms = {"loss_nats": terms["loss_nats"]}
        text = f"{_short(values['tokens_per_s'])} tokens/s, {_numbers(terms)}"
        if self.live:
            self._bar_at(values["step"], values["step"] - 1, values["num_steps"], "", text)
        else:
            left = (values["num_steps"] - values["step"]) * values["total_time_s"] / values["step"]
            line = f"step {values['step']}/{values['num_steps']}: {text}, {_duration(left)} left"
            self._periodic(line, now=values["step"] in (1, values["num_steps"]))

    def _bar_at(self, done: int, first: int, total: int, unit: str, text: str) -> None:
        """Moves the live line, and begins it where there is none, at ``first``."""
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                initial=first,
                dynamic_ncols=True,
                bar_format=f"{{n_fmt}}/{{total_fmt}}{unit} |{{bar:20}}| {{elapsed}}<{{remaining}}{{postfix}}",
            )
        self._bar.set_postfix_str(harmless(text).replace("\n", " "), refresh=False)
        self._bar.update(done - self._bar.n)

    def _periodic(self, line: str, now: bool = False) -> None:
        if now or time.monotonic() - self._last >= LOG_EVERY_S:
            self._last = time.monotonic()
            self._write(line)

    def _write(self, line: str) -> None:
        with tqdm.external_write_mode(sys.stderr):  # the live line makes way
            say(f"{self._name}{line}", error=True)


def _numbers(values: Mapping[str, float], skip: tuple[str, ...] = ()) -> str:
    return ", ".join(
        f"{name.removesuffix('_nats').replace('_', ' ')} {value:.4f}"
        for name, value in values.items()
        if name not in skip
    )


def _short(number: float) -> str:
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.1f}k"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

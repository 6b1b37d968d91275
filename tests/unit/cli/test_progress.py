"""Progress: plain lines in a log, one live line on a terminal, nothing when quiet."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress

import pytest

from stillroom.cli import progress
from stillroom.cli.progress import LOG_EVERY_S, Progress


def step(number: int, **more: object) -> dict[str, object]:
    return {
        "step": number,
        "num_steps": 100,
        "loss_nats": 2.5,
        "forward_kl_nats": 2.5,
        "tokens_per_s": 12345.6,
        "total_time_s": 2.0 * number,
        **more,
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose only item is the time."""
    time = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_log_gets_the_first_step_the_last_and_one_now_and_then(capsys, clock):
    with Progress() as report:
        for number in range(1, 101):
            clock[0] += LOG_EVERY_S / 40
            report("step", step(number))
    lines = said(capsys)
    assert [line.partition(":")[0] for line in lines] == ["step 1/100", "step 41/100", "step 81/100", "step 100/100"]
    assert lines[0] == "step 1/100: 12.3k tokens/s, loss 2.5000, 3:18 left"
    assert lines[1].endswith(", 1:58 left")
    assert lines[-1].endswith(", 0:00 left")


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ({}, "loss 2.5000"),
        ({"cross_entropy_nats": 0.25}, "loss 2.5000, forward kl 2.5000, cross entropy 0.2500"),
        ({"grad_norm": 3.0, "learning_rate": 0.5, "num_kept": 9}, "loss 2.5000"),
    ],
)
@pytest.mark.usefixtures("clock")
def test_one_objective_is_not_said_twice_and_several_are_all_said(capsys, terms, text):
    with Progress() as report:
        report("step", step(1, **terms))
    assert said(capsys) == [f"step 1/100: 12.3k tokens/s, {text}, 3:18 left"]


@pytest.mark.parametrize(("rate", "text"), [(7.4, "7"), (999.0, "999"), (1000.0, "1.0k"), (123456.0, "123.5k")])
@pytest.mark.usefixtures("clock")
def test_rates_are_short(capsys, rate, text):
    with Progress() as report:
        report("step", step(1, tokens_per_s=rate))
    assert f": {text} tokens/s," in said(capsys)[0]


@pytest.mark.parametrize(
    ("total_time_s", "text"), [(0.01, "0:01"), (0.6, "0:59"), (36.36, "1:00:00"), (1000.0, "27:30:00")]
)
@pytest.mark.usefixtures("clock")
def test_the_time_left(capsys, total_time_s, text):
    with Progress() as report:
        report("step", step(1, total_time_s=total_time_s))
    assert said(capsys)[0].endswith(f" {text} left")


def test_the_rows_of_tokenizing_are_told_now_and_then(capsys, clock):
    with Progress() as report:
        for rows in range(1000, 41000, 1000):
            report("tokenise", {"path": "d.jsonl", "rows": rows})
            clock[0] += LOG_EVERY_S / 20
    assert said(capsys) == ["tokenizing d.jsonl: 1,000 rows", "tokenizing d.jsonl: 21,000 rows"]


@pytest.mark.usefixtures("clock")
def test_notes_and_measurements_are_always_told(capsys):
    with Progress() as report:
        report("note", {"text": "resumed after step 3"})
        report("note", {"text": "writing x"})
        report("held_out", {"step": 7, "loss_nats": 1.5, "top1_agreement": 0.25, "num_tokens": 4096})
    assert said(capsys) == [
        "resumed after step 3",
        "writing x",
        "held out after step 7: loss 1.5000, top1 agreement 0.2500",
    ]


@pytest.mark.usefixtures("clock")
def test_quiet_says_nothing(capsys):
    with Progress(quiet=True) as report:
        report("step", step(1))
        report("tokenise", {"path": "d", "rows": 1})
        report("held_out", {"step": 1, "loss_nats": 1.0})
        report("note", {"text": "x"})
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("clock")
def test_a_log_holds_no_control_characters(capsys):
    with Progress() as report:
        for number in range(1, 101):
            report("step", step(number))
    assert re.findall(r"[\x00-\x09\x0b-\x1f]", capsys.readouterr().err) == []


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Makes stderr a terminal of 120 columns; gives a function that tells what was shown on it."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    os.set_blocking(parent, False)

    def shown() -> str:
        parts = []
        with suppress(BlockingIOError):
            while part := os.read(parent, 65536):
                parts.append(part)
        return b"".join(parts).decode().replace("\r\n", "\n")

    stream = io.TextIOWrapper(os.fdopen(child, "wb", buffering=0), encoding="utf-8", write_through=True)
    with stream, redirect_stderr(stream):
        yield shown
    os.close(parent)


def test_a_terminal_gets_one_live_line():
    with terminal() as shown:
        with Progress() as report:
            assert report.live
            for number in range(1, 101):
                report("step", step(number))
        text = shown()
    last = text.rstrip().split("\r")[-1]
    assert last.startswith("100/100 |████████████████████|")
    assert last.endswith("12.3k tokens/s, loss 2.5000")
    assert text.count("\r") > 1
    assert text.count("\n") == 1
    assert text.endswith("\n")


def test_a_resumed_run_starts_its_line_where_it_stopped():
    with terminal() as shown:
        with Progress() as report:
            report("step", step(51))
        lines = shown().rstrip().split("\r")
    assert lines[1].startswith("50/100 |██████████ ")
    assert lines[-1].startswith("51/100 |██████████▏")


def test_notes_stand_above_the_live_line():
    with terminal() as shown:
        with Progress() as report:
            report("step", step(1))
            report("note", {"text": "writing x"})
            report("held_out", {"step": 1, "loss_nats": 1.5})
        lines = [line.split("\r")[-1].strip() for line in shown().split("\n")]
    assert lines[:2] == ["writing x", "held out after step 1: loss 1.5000"]
    assert lines[2].startswith("1/100 |")
    assert lines[3:] == [""]


def fail_at_work(report: Progress) -> None:
    with report:
        report("step", step(1))
        raise RuntimeError("boom")


def test_the_live_line_ends_when_an_error_passes():
    with terminal() as shown:
        with pytest.raises(RuntimeError, match="boom"):
            fail_at_work(Progress())
        text = shown()
    assert "1/100 |" in text
    assert text.endswith("\n")


def test_quiet_says_nothing_on_a_terminal():
    with terminal() as shown:
        with Progress(quiet=True) as report:
            report("step", step(1))
            report("note", {"text": "x"})
        assert shown() == ""


@pytest.mark.usefixtures("clock")
def test_tokens_that_models_have_read_and_answers_are_counted(capsys):
    with Progress() as report:
        report("score", {"model": "teacher", "done": 10, "total": 2000})
        report("score", {"model": "distilled", "done": 1500, "total": 2000})
        report("score", {"model": "distilled", "done": 2000, "total": 2000})
        report("task", {"task": "blimp", "model": "teacher", "done": 70, "total": 70})
    assert said(capsys) == [
        "teacher: 10 of 2,000 tokens",
        "distilled: 2,000 of 2,000 tokens",
        "blimp: teacher: 70 of 70 answers",
    ]


def test_names_and_notes_from_outside_are_harmless_and_hold_no_secret(capsys):
    with Progress() as progress:
        progress("note", {"text": "read https://me:pw@h/a?pwd=x of \x1b[2J\u202e"})
    assert said(capsys)[-1] == "read https://***@h/a?pwd=*** of \\x1b[2J\\u202e"

"""`stillroom chat` by the real command line, on a terminal and off it, and Ctrl-C."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest


class Terminal:
    """A process on a terminal of 24 rows and 80 columns."""

    def __init__(self, environment: dict[str, str], *words: str) -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stillroom", *words], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
            start_new_session=True, env={k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        while text not in self.seen:
            part = self._read()
            assert part, f"{text!r} never came: {self.seen!r}"
            self.seen += part

    def write(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def end(self) -> int:
        while part := self._read():
            self.seen += part
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._mine)

    def _read(self) -> str:
        assert select.select([self._mine], [], [], 120.0)[0], f"nothing came any more: {self.seen!r}"
        try:
            return os.read(self._mine, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""


@pytest.fixture
def terminal(environment) -> Iterator:
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(environment, *words))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_two_models_side_by_side_turn_by_turn(terminal, saved_model):
    models = [str(saved_model(seed=seed)) for seed in (1, 2)]
    talk = terminal("chat", *models, "max_tokens=6", "device=cpu")
    talk.wait_for("> ")
    talk.write("The still\n")
    talk.wait_for("─┼─")
    talk.wait_for("\n> ")
    talk.write("\x04")
    assert talk.end() == 0
    assert "\x1b[J" in talk.seen, "the answers were not drawn as they came"


def test_ctrl_c_stops_the_models_and_says_so(terminal, saved_model):
    models = [str(saved_model(seed=seed, max_position_embeddings=30_000, eos_token_id=None)) for seed in (1, 2)]
    talk = terminal("chat", *models, "prompt=The still", "max_tokens=29000", "temperature=1", "device=cpu")
    talk.wait_for("─┼─")
    talk.wait_for("\x1b[J")
    talk.process.send_signal(signal.SIGINT)
    assert talk.end() == 130
    assert talk.seen.rstrip().endswith("interrupted")
    assert "Traceback" not in talk.seen


def test_ctrl_c_ends_an_answer_and_not_the_chat(terminal, saved_model):
    models = [str(saved_model(seed=seed, max_position_embeddings=30_000, eos_token_id=None)) for seed in (1, 2)]
    talk = terminal("chat", *models, "max_tokens=29000", "temperature=1", "device=cpu")
    talk.wait_for("> ")
    talk.write("The still\n")
    talk.wait_for("─┼─")
    talk.process.send_signal(signal.SIGINT)
    talk.wait_for("stopped; this turn is forgotten\r\n> ")
    talk.write("\x04")
    assert talk.end() == 0
    assert "Traceback" not in talk.seen


def test_where_there_is_no_terminal_nobody_is_asked(command, saved_model):
    model = str(saved_model(seed=1))
    printed = command("chat", model, "max_tokens=4", "device=cpu", input="The still")
    assert printed.stdout.strip()
    assert "\x1b" not in printed.stdout
    assert "there is no prompt" in command("chat", model, input="", code=2).stderr

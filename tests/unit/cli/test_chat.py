"""`stillroom chat`: what its words mean, and what it prints where there is no terminal."""

import io
import os
import re

import pytest

from stillroom.cli.chat import _as_it_comes, _one_after_the_other, _show


def pieces(*wanted):
    from stillroom.chat.run import Piece

    return (Piece(*piece) for piece in wanted)


def test_two_answers_are_printed_one_after_the_other(capsys):
    come = pieces((1, "a", False), (0, "b", False), (1, "c", True), (0, "d\x1b[2J", True))
    _one_after_the_other(("one", "two"), come, [_as_it_comes] * 2)
    assert capsys.readouterr().out == "== one ==\nbd\x1b[2J\n\n== two ==\nac\n"


def test_one_answer_is_printed_alone(capsys):
    _one_after_the_other(("one",), pieces((0, "b", False), (0, "", True)), [_as_it_comes])
    assert capsys.readouterr().out == "b\n"


def test_on_a_narrow_terminal_lines_are_broken_at_words(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((12, 24)))
    _show(("one", "two"), pieces((1, "it dri", False), (1, "ps slowly", True), (0, "the still runs", True)))
    written = capsys.readouterr().out
    assert re.sub(r"\r(\x1b\[\d+A)?\x1b\[J", "", written) == (
        "== one ==\nthe still\nruns\n\n== two ==\nit drips\nslowly\n"
    )


def test_an_answer_to_a_prompt_and_to_stdin(here, saved_model, monkeypatch):
    model = str(saved_model(seed=1))
    settings = ["max_tokens=8", "device=cpu"]
    answer = here("chat", model, "prompt=The still", *settings).stdout
    assert answer.strip()
    for text in ("The still", "The still\n", "The still\r\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert here("chat", model, *settings).stdout == answer
    other = str(saved_model(seed=2))
    both = here("chat", model, other, "prompt=The still", *settings).stdout
    assert both.startswith(f"== {model} ==\n{answer}\n== {other} ==\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=x"], "models"),
        (["a", "b", "c", "prompt=x"], "at most 2"),
        (["a", "prompt= "], "there is no prompt"),
        (["a", "prompt=x", "--resume"], "nothing that could be planned"),
        (["a", "prompt=x", "temperature=-1"], "temperature"),
        (["a", "prompt=x", "temprature=1"], "did you mean"),
    ],
)
def test_what_cannot_be_meant(here, words, said):
    assert said in here("chat", *words, code=2).stderr


@pytest.mark.parametrize("text", ["1", "[a, b]", "a: b", "null", "'", '日本 😀 "q"\n'])
def test_a_prompt_is_taken_as_it_stands(here, monkeypatch, text):
    seen = []
    monkeypatch.setattr("stillroom.chat.run.run", lambda *given, **_: seen.extend(given[1]))
    here("chat", "a", f"prompt={text}")
    assert seen == [text]


def test_one_newline_at_the_end_of_stdin_is_not_of_the_prompt(here, monkeypatch):
    seen = []
    monkeypatch.setattr("stillroom.chat.run.run", lambda *given, **_: seen.extend(given[1]))
    for text in ("a\nb\n", "a\n\n", "a\r\n", " a "):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        here("chat", "m")
    assert seen == ["a\nb", "a\n", "a", " a "]


def test_one_prompt_that_fails_is_an_error_and_a_system_that_is_not_used_is_told(here, saved_model):
    model = str(saved_model(seed=1))
    words = ["chat", model, "prompt=The still", "system=Be brief.", "device=cpu"]
    assert here(*words, "max_tokens=4").stderr == f"{model} has no chat template: `system` is not used for it\n"
    assert "cannot read prompt and answer" in here(*words, "max_tokens=9999", code=2).stderr


def test_ctrl_c_at_the_prompt_ends_the_chat(here, saved_model, monkeypatch):
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", interrupted)
    assert here("chat", str(saved_model(seed=1)), "device=cpu", code=130).stderr == "\ninterrupted\n"


def test_an_empty_stdin_is_no_prompt(here, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no prompt" in here("chat", "a", code=2).stderr

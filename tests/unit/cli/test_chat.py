"""`stillroom chat`: what its words mean, and what it prints where there is no terminal."""

import io

import pytest

from stillroom.cli.chat import _one_after_the_other


def pieces(*wanted):
    from stillroom.chat.answer import Piece

    return (Piece(*piece) for piece in wanted)


def test_two_answers_are_printed_one_after_the_other(capsys):
    come = pieces((1, "a", False), (0, "b", False), (1, "c", True), (0, "d\x1b[2J", True))
    _one_after_the_other(("one", "two"), come)
    assert capsys.readouterr().out == "== one ==\nbd\x1b[2J\n\n== two ==\nac\n"


def test_one_answer_is_printed_alone(capsys):
    _one_after_the_other(("one",), pieces((0, "b", False), (0, "", True)))
    assert capsys.readouterr().out == "b\n"


def test_an_answer_to_a_prompt_and_to_stdin(here, saved_model, monkeypatch):
    model = str(saved_model(seed=1))
    settings = ["max_tokens=8", "device=cpu"]
    answer = here("chat", model, "prompt=The still", *settings).stdout
    assert answer.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("The still"))
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
    monkeypatch.setattr("stillroom.chat.run.run", lambda *given: seen.extend(given[1]))
    here("chat", "a", f"prompt={text}")
    assert seen == [text]


def test_an_empty_stdin_is_no_prompt(here, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no prompt" in here("chat", "a", code=2).stderr

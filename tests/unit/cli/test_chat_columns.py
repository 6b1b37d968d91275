"""Answers side by side: what a terminal shows of them, and that nothing in them is obeyed by it."""

import re

import pytest

from stillroom.cli.chat import Column, SideBySide
from stillroom.terminal import harmless, width


class Screen:
    """A terminal that knows what is needed here: newline, carriage return, cursor up, and wiping what is below."""

    def __init__(self) -> None:
        self.rows, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d+A|\x1b\[J|\n|\r|[^\x1b\n\r]+", text):
            if part == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.rows):
                    self.rows.append("")
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[J":
                self.rows[self.row :] = [self.rows[self.row][: self.column]]
            elif part.startswith("\x1b"):
                up = int(part[2:-1])
                assert up <= self.row, "above the first line"
                self.row -= up
            else:
                assert self.column == len(self.rows[self.row]), "written over something"
                self.rows[self.row] += part
                self.column += len(part)


def shown(pieces, titles=("left", "right"), columns=29, height=24) -> list[str]:
    screen, side = Screen(), SideBySide(titles, columns, height)
    screen.write(side.head())
    for piece in pieces:
        screen.write(side.add(*piece))
    return screen.rows


def test_two_answers_that_come_in_turn():
    pieces = [
        (0, "The still", False),
        (1, "Slowly,\nit", False),
        (0, " runs slowly.", False),
        (1, " drips.", True),
        (0, "", True),
    ]
    assert shown(pieces) == [
        "left          │ right",
        "──────────────┼──────────────"[:13] + "─┼─" + "─" * 13,
        "The still     │ Slowly,",
        "runs slowly.  │ it drips.",
        "",
    ]


@pytest.mark.parametrize("height", [3, 6, 50])
def test_the_screen_is_the_same_in_whatever_pieces_the_answers_come(height):
    texts = ["one two three four five six seven eight nine ten " * 4, "a\nb\n\nc " + "水" * 40]
    whole = shown([(0, texts[0], True), (1, texts[1], True)], height=height)
    signs = [[(i, sign, False) for sign in text] + [(i, "", True)] for i, text in enumerate(texts)]
    assert shown(signs[0] + signs[1], height=height) == whole
    assert shown(signs[1] + signs[0], height=height) == whole
    turns = [piece for pair in zip(signs[0], signs[1], strict=False) for piece in pair]
    n = len(turns) // 2
    assert shown(turns + signs[0][n:] + signs[1][n:], height=height) == whole
    assert all(width(row) <= 29 for row in whole)


def test_no_more_rows_than_the_screen_has_are_drawn_anew():
    side = SideBySide(("a", "b"), 29, 5)
    side.head()
    for i in range(40):
        written = side.add(0, f"line {i}\n", False)
        assert written.count("\n") <= 3
        assert all(int(up) <= 3 for up in re.findall(r"\x1b\[(\d+)A", written))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("aaaa bbbb cccc", ["aaaa bbbb", "cccc"]),
        ("abcdefghijklm", ["abcdefghij", "klm"]),
        ("水水水水水水", ["水水水水水", "水"]),
        ("x水水水水水", ["x水水水水", "水"]),
        ("e\u0301" * 12, ["e\u0301" * 10, "e\u0301" * 2]),
        ("a\n\nb", ["a", "", "b"]),
    ],
)
def test_lines_are_broken_by_the_width_of_their_signs(text, lines):
    column = Column(10)
    column.add(text)
    assert column.lines == lines


def test_nothing_is_obeyed_by_the_terminal():
    evil = "\x1b[2J\x1b]0;title\x07\u202eabc\r\x9b1m\x00"
    assert harmless(evil) == "\\x1b[2J\\x1b]0;title\\x07\\u202eabc\\r\\x9b1m\\x00"
    assert harmless("a\tb\r\nc") == "a    b\nc"
    written = SideBySide(("a\x1b[2J", "b"), 60, 24).add(0, evil, True)
    assert re.findall(r"[\x00-\x09\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]|\x1b(?!\[\d*[AJ])", written) == []


def test_a_long_title_keeps_its_end():
    head = SideBySide(("runs/a-very-long-folder/distilled", "b"), 29, 24).head()
    assert head.startswith("…er/distilled │ b")

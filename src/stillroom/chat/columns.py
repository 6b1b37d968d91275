"""Columns: answers side by side in a terminal, growing as they come. Nothing in them is obeyed by the terminal."""

from collections.abc import Sequence

from stillroom.terminal import fitted, harmless, width

BETWEEN = " │ "
NARROWEST = 24
"""The fewest columns of an answer; a terminal that has fewer for each shows them one after the other."""


class Column:
    """A text that is broken into lines of so many columns while it grows. Only its last line may still change."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.done = False

    def add(self, text: str) -> None:
        for i, part in enumerate(harmless(text).split("\n")):
            if i:
                self.lines.append("")
            self._fill(self.lines[-1] + part)

    def _fill(self, line: str) -> None:
        """Breaks the last line, at its spaces where it has any."""
        while width(line) > self.columns:
            cut = next((i for i in range(1, len(line)) if width(line[: i + 1]) > self.columns), len(line))
            space = line.rfind(" ", 1, cut + 1)
            if space > 0:
                self.lines[-1], line = line[:space], line[space + 1 :]
            else:
                self.lines[-1], line = line[:cut], line[cut:]
            self.lines.append("")
        self.lines[-1] = line

    @property
    def num_final(self) -> int:
        """Lines that will not change any more."""
        return len(self.lines) - (not self.done)


class SideBySide:
    """Draws growing columns on a terminal: gives the text to write for each piece that comes.

    Rows that all columns have done with stay as they are; those below are drawn anew. At most ``height`` rows are drawn
    anew, since a terminal cannot go back further: a column that runs ahead by more waits.
    """

    def __init__(self, titles: Sequence[str], columns: int, height: int) -> None:
        each = (columns - len(BETWEEN) * (len(titles) - 1)) // len(titles)
        self._columns = [Column(each) for _ in titles]
        self._titles, self._height = titles, max(2, height - 1)
        self._first = 0
        """The first row that may change."""
        self._drawn = 0
        """Rows from there on that are on the screen."""

    def head(self) -> str:
        """Titles and a rule."""
        each = self._columns[0].columns
        titles = []
        for title in self._titles:
            text = harmless(title).replace("\n", " ")
            if width(text) > each:  # the end stays: names of models differ at their ends
                while width(text) > each - 1:
                    text = text[1:]
                text = f"…{text}"
            titles.append(fitted(text, each))
        return f"{BETWEEN.join(titles).rstrip()}\n{'─┼─'.join('─' * each for _ in self._titles)}\n"

    def add(self, number: int, text: str, last: bool) -> str:
        """The text to write for a piece of a column's text; ``last`` says that it is the last one."""
        column = self._columns[number]
        column.add(text)
        column.done = column.done or last
        if not all(one.done for one in self._columns):
            return self._draw(self._height)
        return self._draw(max(len(one.lines) for one in self._columns)) + "\n"

    def _draw(self, most: int) -> str:
        """Goes back to the first row that may change, wipes from there on, and draws ``most`` rows."""
        back = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
        last = min(max(len(column.lines) for column in self._columns), self._first + most)
        rows = []
        for row in range(self._first, last):
            parts = [fitted(one.lines[row] if row < len(one.lines) else "", one.columns) for one in self._columns]
            rows.append(BETWEEN.join(parts).rstrip(" "))
        text = f"\r{back}\x1b[J" + "\n".join(rows)
        still = [column.num_final for column in self._columns if not column.done]
        final = min([*still, last - 1])
        self._drawn, self._first = last - final, final
        return text

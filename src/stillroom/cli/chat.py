"""``stillroom chat``."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from stillroom.chat.config import ChatConfig
from stillroom.cli.arguments import Arguments, refuse_flags
from stillroom.config import explain, load
from stillroom.errors import ConfigError
from stillroom.terminal import fitted, harmless, say, width

if TYPE_CHECKING:
    from stillroom.chat.run import Piece

Written = Callable[[str, bool], str]
BETWEEN = " │ "
NARROWEST = 24
"""The fewest columns of an answer; a terminal that has fewer for each shows them one after the other."""

USAGE = """\
usage: stillroom chat MODEL [MODEL] [key=value …]

Answers prompt=…, or what stands on stdin, less the newline at its end. On a terminal without either it asks turn by
turn, until Ctrl-D; Ctrl-C stops an answer, which is then forgotten with its question, or, at the prompt, the chat. Two
models answer side by side, in the terminal's width; where stdout is no terminal, one after the other.

settings"""


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        say(f"{USAGE}\n{explain(ChatConfig)}")
        return 0
    refuse_flags(
        "chat",
        arguments.flags,
        ("quiet", "debug", "help"),
        "It writes nothing that could be planned, resumed or overwritten.",
    )
    words = [f"models={json.dumps(arguments.words, ensure_ascii=False)}"] if arguments.words else []
    for word in arguments.overrides:
        key, _, text = word.partition("=")  # prompt=1 and prompt=[x] are texts, though they look like YAML
        words.append(f"{key}={json.dumps(text, ensure_ascii=False)}" if key in ("prompt", "system") else word)
    config = load(ChatConfig, None, words)
    try:
        prompt, typed = config.prompt, config.prompt is None and sys.stdin.isatty()
        if prompt is None and not typed:
            prompt = re.sub(r"\r?\n\Z", "", sys.stdin.read())  # which ends with a newline that nobody meant
        if prompt is not None and not prompt.strip():
            raise ConfigError(
                "there is no prompt",
                {"prompt": "not given", "stdin": "empty"},
                why="Without a terminal nobody is asked for one.",
                fix="Write prompt='…', or send it to stdin.",
            )

        from stillroom.chat.run import run
        from stillroom.models.loading import quiet

        quiet()

        def notify(text: str) -> None:
            say(text, error=True)

        prompts = _typed() if prompt is None else [prompt]
        run(config, prompts, lambda pieces: _show(config.models, pieces), notify, turn_by_turn=typed)
    except KeyboardInterrupt:
        say("\ninterrupted", error=True)
        return 130
    return 0


def _typed() -> Iterator[str]:
    """The lines that are typed on the terminal, until Ctrl-D."""
    import readline  # noqa: F401  (gives `input` its line editing)

    while True:
        try:
            line = input("> ")
        except EOFError:
            say("")
            return
        if line.strip():
            yield line


def _show(names: tuple[str, ...], pieces: "Iterator[Piece]") -> None:
    """Shows answers side by side on a terminal that is wide enough for it; else one after the other."""
    size = shutil.get_terminal_size()
    if not sys.stdout.isatty() or len(names) == 1:
        _one_after_the_other(names, pieces, [_as_it_comes] * len(names))
        return
    if size.columns < 2 * NARROWEST + len(BETWEEN):
        columns = [SideBySide([name], size.columns - 1, size.lines) for name in names]
        _one_after_the_other(names, pieces, [partial(column.add, 0) for column in columns])
        return
    screen = SideBySide(names, size.columns - 1, size.lines)
    _draw(screen.head())
    for piece in pieces:
        _draw(screen.add(*piece))


def _draw(text: str) -> None:
    """Writes a piece of an answer, in which `harmless` has left nothing but what moves the cursor here; and to a file
    or a pipe the answer as it is."""
    sys.stdout.write(text)  # noqa: TID251
    sys.stdout.flush()


def _as_it_comes(text: str, last: bool) -> str:  # kept: a callback
    return f"{harmless(text) if sys.stdout.isatty() else text}{chr(10) if last else ''}"


def _one_after_the_other(names: tuple[str, ...], pieces: "Iterator[Piece]", written: Sequence[Written]) -> None:
    """Prints the first answer as it comes; that of a second model when the first is done.

    Args:
        written: a function of each model that gives the text to write for a piece of its answer.
    """
    waiting, now, done = [""] * len(names), 0, [False] * len(names)

    def begin() -> None:
        if len(names) > 1:
            say(f"{'' if now == 0 else chr(10)}== {names[now]} ==")

    begin()
    for piece in pieces:
        waiting[piece.model] += piece.text
        done[piece.model] |= piece.last
        while now < len(names):
            _draw(written[now](waiting[now], done[now]))
            waiting[now] = ""
            if not done[now]:
                break
            now += 1
            if now < len(names):
                begin()


# --- side by side ---------------------------------------------------------------------------------------------------


class Column:
    """A text that is broken into lines of so many columns while it grows. Only its last line may still change."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.done = False

    def add(self, text: str) -> None:
        """Breaks what is longer than a line, at its spaces where it has any."""
        for i, part in enumerate(harmless(text).split("\n")):
            line = part if i else self.lines.pop() + part
            while width(line) > self.columns:
                cut = next((i for i in range(1, len(line)) if width(line[: i + 1]) > self.columns), len(line))
                space = line.rfind(" ", 1, cut + 1)
                self.lines.append(line[: space if space > 0 else cut])
                line = line[space + 1 if space > 0 else cut :]
            self.lines.append(line)


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
        final = min([*(len(one.lines) - 1 for one in self._columns if not one.done), last - 1])
        self._drawn, self._first = last - final, final
        return text

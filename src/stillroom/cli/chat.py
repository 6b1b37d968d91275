"""``stillroom chat``."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from stillroom.chat.config import ChatConfig
from stillroom.cli.arguments import Arguments
from stillroom.config import explain, load
from stillroom.errors import ConfigError
from stillroom.terminal import harmless

if TYPE_CHECKING:
    from stillroom.chat.run import Piece

Written = Callable[[str, bool], str]

USAGE = """\
usage: stillroom chat MODEL [MODEL] [key=value …]

Answers prompt=…, or what stands on stdin, less the newline at its end. On a terminal without either it asks turn by
turn, until Ctrl-D; Ctrl-C stops an answer, which is then forgotten with its question, or, at the prompt, the chat. Two
models answer side by side, in the terminal's width; where stdout is no terminal, one after the other.

settings"""


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        print(f"{USAGE}\n{explain(ChatConfig)}")
        return 0
    if flags := arguments.flags - {"quiet", "debug"}:
        raise ConfigError(
            "`chat` writes nothing that could be planned, resumed or overwritten",
            {"given": ", ".join(f"--{flag}" for flag in sorted(flags)), "flags": "--quiet, --debug, --help"},
            why="Nothing would be done for it.",
            fix="Leave it out.",
        )
    words = [f"models={json.dumps(arguments.words, ensure_ascii=False)}"] if arguments.words else []
    for word in arguments.overrides:
        key, _, text = word.partition("=")  # prompt=1 and prompt=[x] are texts, though they look like YAML
        words.append(f"{key}={json.dumps(text, ensure_ascii=False)}" if key in ("prompt", "system") else word)
    config = load(ChatConfig, None, words)
    try:
        typed = config.prompt is None and sys.stdin.isatty()
        prompts = _typed() if typed else iter([_given(config.prompt)])

        from stillroom.chat.run import run
        from stillroom.models.loading import quiet

        quiet()

        def notify(text: str) -> None:
            print(harmless(text), file=sys.stderr)

        run(config, prompts, lambda pieces: _show(config.models, pieces), notify, turn_by_turn=typed)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _given(prompt: str | None) -> str:
    """The prompt of the settings, or stdin's, which ends with a newline that nobody meant."""
    prompt = re.sub(r"\r?\n\Z", "", sys.stdin.read()) if prompt is None else prompt
    if not prompt.strip():
        raise ConfigError(
            "there is no prompt",
            {"prompt": "not given", "stdin": "empty"},
            why="Without a terminal nobody is asked for one.",
            fix="Write prompt='…', or send it to stdin.",
        )
    return prompt


def _typed() -> Iterator[str]:
    """The lines that are typed on the terminal, until Ctrl-D."""
    import readline  # noqa: F401  (gives `input` its line editing)

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _show(names: tuple[str, ...], pieces: "Iterator[Piece]") -> None:
    """Shows answers side by side on a terminal that is wide enough for it; else one after the other."""
    from stillroom.chat.columns import BETWEEN, NARROWEST, SideBySide

    size = shutil.get_terminal_size()
    if not sys.stdout.isatty() or len(names) == 1:
        _one_after_the_other(names, pieces, [_as_it_comes] * len(names))
        return
    if size.columns < 2 * NARROWEST + len(BETWEEN):
        columns = [SideBySide([name], size.columns - 1, size.lines) for name in names]
        _one_after_the_other(names, pieces, [partial(column.add, 0) for column in columns])
        return
    screen = SideBySide(names, size.columns - 1, size.lines)
    sys.stdout.write(screen.head())
    for piece in pieces:
        sys.stdout.write(screen.add(*piece))
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
            title = harmless(names[now]) if sys.stdout.isatty() else names[now]
            print(f"{'' if now == 0 else chr(10)}== {title} ==")

    begin()
    for piece in pieces:
        waiting[piece.model] += piece.text
        done[piece.model] |= piece.last
        while now < len(names):
            print(written[now](waiting[now], done[now]), end="", flush=True)
            waiting[now] = ""
            if not done[now]:
                break
            now += 1
            if now < len(names):
                begin()

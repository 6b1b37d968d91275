"""``stillroom chat``."""

import json
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stillroom.chat.config import ChatConfig
from stillroom.cli.arguments import Arguments
from stillroom.config import explain, load
from stillroom.errors import ConfigError, StillroomError
from stillroom.terminal import harmless

if TYPE_CHECKING:
    from stillroom.chat.answer import Piece

USAGE = """\
usage: stillroom chat MODEL [MODEL] [key=value …]

Answers prompt=…, or what stands on stdin. On a terminal without either it asks turn by turn, until Ctrl-D. Two models
answer side by side, in the terminal's width; where stdout is no terminal, one after the other.

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
    config = load(ChatConfig, None, [*words, *map(_literal, arguments.overrides)])
    try:
        prompts = _prompts(config)

        from stillroom.chat.run import run
        from stillroom.models import quiet

        quiet()
        run(config, prompts, lambda pieces: _show(config.models, pieces))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _literal(word: str) -> str:
    """A setting that is a text as it stands, though it may look like YAML: prompt=1, prompt=[x]."""
    key, _, text = word.partition("=")
    return f"{key}={json.dumps(text, ensure_ascii=False)}" if key in ("prompt", "system") else word


def _prompts(config: ChatConfig) -> Iterator[str]:
    """The one prompt that is given, or those that are typed."""
    if config.prompt is None and sys.stdin.isatty():
        return _typed()
    prompt = sys.stdin.read() if config.prompt is None else config.prompt
    if not prompt.strip():
        raise _no_prompt()
    return iter([prompt])


def _typed() -> Iterator[str]:
    """What is typed on the terminal, until Ctrl-D."""
    import readline  # noqa: F401  (gives `input` its line editing)

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _no_prompt() -> StillroomError:
    return ConfigError(
        "there is no prompt",
        {"prompt": "not given", "stdin": "empty"},
        why="Without a terminal nobody is asked for one.",
        fix="Write prompt='…', or send it to stdin.",
    )


def _show(names: tuple[str, ...], pieces: "Iterator[Piece]") -> None:
    """Side by side on a terminal that is wide enough for it; else one after the other."""
    from stillroom.chat.columns import BETWEEN, NARROWEST, SideBySide

    size = shutil.get_terminal_size()
    live = sys.stdout.isatty()
    if not live or len(names) == 1 or size.columns < 2 * NARROWEST + len(BETWEEN):
        _one_after_the_other(names, pieces)
        return
    screen = SideBySide(names, size.columns - 1, size.lines)
    sys.stdout.write(screen.head())
    for piece in pieces:
        sys.stdout.write(screen.add(*piece))
        sys.stdout.flush()


def _one_after_the_other(names: tuple[str, ...], pieces: "Iterator[Piece]") -> None:
    """The first answer as it comes; that of a second model when the first is done."""
    clean = harmless if sys.stdout.isatty() else str
    waiting, now, done = [""] * len(names), 0, [False] * len(names)

    def begin() -> None:
        if len(names) > 1:
            print(f"{'' if now == 0 else chr(10)}== {clean(names[now])} ==")

    begin()
    for piece in pieces:
        waiting[piece.model] += piece.text
        done[piece.model] |= piece.last
        while now < len(names):
            print(clean(waiting[now]), end="", flush=True)
            waiting[now] = ""
            if not done[now]:
                break
            print()
            now += 1
            if now < len(names):
                begin()

"""``stillroom store``: check, show, export, import, join and concat stores."""

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stillroom.cli.arguments import Arguments, refuse_flags
from stillroom.config import Config, PathText, explain, load
from stillroom.errors import ConfigError, StillroomError
from stillroom.terminal import say

if TYPE_CHECKING:
    from stillroom.store.format import Manifest

REPORT_EVERY_S = 10.0

USAGE = """\
usage: stillroom store COMMAND …

  check DIR                  verify every file, row and count, and the tokenizer; name all that is wrong
  show DIR                   what is in it: teacher, data, settings, sizes, entries of a position
  show DIR ROW               one document (from 0): its tokens, and what the teacher expected after each
  export DIR OUT.parquet     to plain columns, one row a document: document, tokens, keep, ids, log_probs, log_rest …
  import FILE… out=DIR tokenizer=PATH [key=value …]
                             from plain columns, or from DistillKit's compressed Parquet
  join OUT                   the parts of the capture in OUT, found to be all there and done, as OUT/store
  join DIR DIR… out=DIR      the same of parts that are not in one folder; keep_parts=false deletes their stores then
  concat DIR DIR… out=DIR    the parts of one capture, or stores of different data of one teacher, as one store

DIR is a store's folder; check, show, export and concat also read an address such as s3://bucket/store.
--overwrite lets export, import, join and concat replace what is there, once the new one is whole. A path with a sign
of equality in it is written as ./a=b.

settings of import"""


class JoinConfig(Config):
    """`stillroom store join OUT`: make one store of the parts of a capture."""

    out: PathText | None = None
    """The folder of the joined store, which must not exist yet; null is OUT/store."""
    keep_parts: bool = True
    """Leave the stores of the parts, or delete them once the joined one is whole."""


class ConcatConfig(Config):
    """`stillroom store concat DIR DIR…`: make one store of several."""

    out: PathText
    """The folder of the new store, which must not exist yet."""


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        from stillroom.store.config import ImportConfig

        say(f"{USAGE}\n{explain(ImportConfig)}")
        return 0
    if not arguments.words:
        raise _unknown("there is no command after `store`", {})
    command, *words = arguments.words
    if command == "merge":
        raise ConfigError(
            "`store merge` is now called `store concat`",
            {"given": "store merge", "wanted": "store concat"},
            why="A merge makes one model of several; stores are put one after the other.",
            fix="Write `stillroom store concat DIR DIR… out=DIR`, with the same settings.",
        )
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        raise _unknown(f"`{command}` is not a command of `store`", {"did you mean": near[0]} if near else {})
    why = "Nothing would be done for it: what is written appears as a whole, or not at all."
    refuse_flags(f"store {command}", arguments.flags, ("overwrite", "quiet", "debug", "help"), why)
    try:
        return COMMANDS[command](words, arguments) or 0
    except KeyboardInterrupt:
        say("\ninterrupted; nothing was left half-written", error=True)
        return 130


def check(words: Sequence[str], arguments: Arguments) -> int | None:
    (path,) = _exactly(words, arguments, "check", "DIR")
    from stillroom.models.loading import quiet
    from stillroom.store.check import check

    quiet()
    checked = check(path, _report(arguments))
    for problem in checked.problems:
        say(f"error: {problem}\n", error=True)
    if checked.whole:
        return say(checked)
    number = len(checked.problems)
    say(f"{path}: {number} problem{'s' * (number > 1)}", error=True)
    return 2


def show(words: Sequence[str], arguments: Arguments) -> None:
    path, *rows = _exactly(words, arguments, "show", "DIR", "[ROW]")
    from stillroom.models.loading import quiet
    from stillroom.store.reader import Store
    from stillroom.store.show import describe, show_row

    quiet()
    store = Store(path, partial=True)
    if not rows:
        say(describe(store))
        return
    if not rows[0].isdecimal() or int(rows[0]) >= len(store):
        raise ConfigError(
            f"there is no row `{rows[0]}`",
            {"rows": f"0 to {len(store) - 1}" if len(store) else "none"},
            why="Rows are counted from 0, in the order of the store.",
            fix="Name one of these.",
        )
    say(show_row(store, int(rows[0])))


def export(words: Sequence[str], arguments: Arguments) -> None:
    path, out = _exactly(words, arguments, "export", "DIR", "OUT.parquet")
    from stillroom.store.reader import Store
    from stillroom.store.show import check_file, export, left_out

    check_file(out, overwrite="overwrite" in arguments.flags)
    store = Store(path)
    size_bytes = export(store, out, **_options(arguments))
    say(f"exported  {len(store):,} documents, {store.manifest.positions:,} positions")
    say(f"size      {out} ({size_bytes / 2**20:.1f} MiB)")
    if (omitted := left_out(store)) is not None:
        say(f"left out  {omitted}")


def import_(words: Sequence[str], arguments: Arguments) -> None:
    from stillroom.store.config import ImportConfig

    config = load(ImportConfig, None, arguments.overrides)
    if not words:
        raise _unknown("there is no file to import", {})
    from stillroom.models.loading import quiet
    from stillroom.store.imports import import_files

    quiet()
    imported = import_files(words, config, **_options(arguments))
    say(f"store     {config.out}\n{imported}")


def join(words: Sequence[str], arguments: Arguments) -> None:
    config = load(JoinConfig, None, arguments.overrides)
    from stillroom.capture.parts import join

    _print_whole(*join(words, config.out, keep_parts=config.keep_parts, **_options(arguments)))


def concat(words: Sequence[str], arguments: Arguments) -> None:
    config = load(ConcatConfig, None, arguments.overrides)
    from stillroom.store.concat import concat

    _print_whole(config.out, concat(words, config.out, **_options(arguments)))


def _print_whole(path: object, manifest: "Manifest") -> None:
    say(f"store     {path} ({manifest.documents:,} documents, {manifest.positions:,} positions)")
    say(f"size      {manifest.size_bytes / 2**20:.1f} MiB in {len(manifest.shards)} shards")


COMMANDS: Mapping[str, Callable[[Sequence[str], Arguments], int | None]] = {
    "check": check,
    "show": show,
    "export": export,
    "import": import_,
    "join": join,
    "concat": concat,
}


def _exactly(words: Sequence[str], arguments: Arguments, command: str, *names: str) -> Sequence[str]:
    """The words, where they are as many as there are names; one in brackets may be left out."""
    least = sum(not name.startswith("[") for name in names)
    if arguments.overrides or not least <= len(words) <= len(names):
        raise ConfigError(
            f"`store {command}` takes {' and '.join(names)}",
            {"given": " ".join([*words, *arguments.overrides]) or "nothing", "wanted": " ".join(names)},
            why="Words besides these would be for nothing, and settings are for import, join and concat.",
            fix=f"Write `stillroom store {command} {' '.join(names)}`.",
        )
    return words


def _options(arguments: Arguments) -> dict[str, Any]:
    """Every command that writes takes these."""
    return {"overwrite": "overwrite" in arguments.flags, "report": _report(arguments)}


def _report(arguments: Arguments) -> Callable[[str], None]:
    """Makes a function that prints the progress to stderr, now and then."""
    start = time.monotonic()
    last = [start]

    def report(text: str) -> None:
        now = time.monotonic()
        if "quiet" not in arguments.flags and now - last[0] >= REPORT_EVERY_S:
            last[0] = now
            say(text, error=True)

    return report


def _unknown(what: str, values: Mapping[str, object]) -> StillroomError:
    return ConfigError(
        what,
        {**values, "commands": ", ".join(COMMANDS)},
        why="The word after `store` says what to do with it.",
        fix="See `stillroom store --help`.",
    )

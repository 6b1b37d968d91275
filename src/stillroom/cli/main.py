"""``stillroom``: find the verb, run it, and turn what it raises into a message and an exit code."""

import io
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from stillroom import __version__
from stillroom.cli.arguments import Arguments, parse
from stillroom.errors import ReportedElsewhere, StillroomError, Stopped
from stillroom.terminal import guard_logs, say

VERBS = {
    "capture": "ask a teacher once, and store what it said",
    "chat": "ask one model, or two side by side, in the terminal",
    "distill": "train a student to predict as its teacher does",
    "doctor": "look at a run of distill before it is paid for",
    "evaluate": "compare models with their teacher: distillation metrics and benchmarks",
    "plan": "what a run will need: memory, time, cost and storage, from headers alone",
    "prune": "cut a smaller model out of a bigger one",
    "report": "make the report of an evaluation anew from its files",
    "store": "check, show, export, import, join and concatenate stores of what teachers said",
}

HELP = f"""stillroom {__version__}: distil large language models into small ones

usage: stillroom VERB [RECIPE.yaml] [key=value …] [flags]

verbs
{chr(10).join(f"  {verb:12}{meaning}" for verb, meaning in VERBS.items())}

Any setting can come from the recipe or from key=value, with dots into the tree:
  stillroom distill recipes/qwen2-7b-to-1.5b-logits.yaml steps=100 objectives.0.weight=0.9 out=runs/x

flags
  --dry-run     print the resolved settings and what would be read and written; write nothing
  --resume      go on with the run in `out` from its last checkpoint
  --overwrite   delete the run in `out` first
  --quiet       results and errors only
  --debug       show where an error was raised
  --help        this text; `stillroom VERB --help` explains every setting of a verb

exit codes: 0 done (or ended by SIGTERM, and resumable), 1 a bug, 2 something to mend, 130 interrupted (and resumable)
"""


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign still gets the text
    guard_logs()
    try:
        if list(words) == ["--version"]:
            return _say(f"stillroom {__version__}")
        arguments = parse(words, tuple(VERBS))
        if arguments.verb is None:
            return _say(HELP.rstrip())
        for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
            logging.getLogger(name).setLevel(logging.ERROR)  # transformers imports them, and they tell of kernels
        verb: Callable[[Arguments], int] = import_module(f"stillroom.cli.{arguments.verb}").main
        return verb(arguments)
    except ReportedElsewhere:
        return 2
    except StillroomError as error:
        return _failed(f"error: {error}", "--debug" in words)
    except Stopped as error:
        if str(error):
            resumed = [word for word in words if word not in ("--resume", "--overwrite")]
            _show(f"\n{error}. Resume with: stillroom {shlex.join(resumed)} --resume")
        return 0
    except KeyboardInterrupt as error:
        instead = " in the place of --overwrite" if "--overwrite" in words else ""
        _show(f"\n{str(error) or 'interrupted'}. Go on with the same command and --resume{instead}.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:300]
        return _failed(f"error: {reason}: {error.filename or 'while reading or writing'}", "--debug" in words)
    except MemoryError:
        return _failed("error: this machine has too little memory for what was asked", "--debug" in words)
    except Exception:
        _show(traceback.format_exc().rstrip())
        return 1


def _say(text: str) -> int:
    say(text)
    return 0


def _failed(text: str, debug: bool) -> int:
    _show(traceback.format_exc().rstrip() if debug else text)
    return 2


def _show(text: str) -> None:
    """Says something on stderr, which may be a terminal that was closed."""
    with suppress(OSError):
        say(text, error=True)

"""`stillroom`: exit codes, and what the user reads."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import stillroom
from stillroom.cli import distill
from stillroom.cli.main import VERBS, main
from stillroom.errors import ConfigError, Interrupted, StorageError

RECIPE = """\
student: {model: s}
teacher: {kind: model, model: t}
data: {path: d, format: text, length: 8}
objectives: [{kind: forward_kl}]
steps: 10
batch: {tokens: 64}
optimizer: {learning_rate: 1e-3}
out: o
"""

HELP = f"""\
stillroom {stillroom.__version__}: distil large language models into small ones

usage: stillroom VERB [RECIPE.yaml] [key=value …] [flags]

verbs
  capture     ask a teacher once, and store what it said
  chat        ask one model, or two side by side, in the terminal
  distill     train a student to predict as its teacher does
  doctor      look at a run of distill before it is paid for
  evaluate    compare models with their teacher: distillation metrics and benchmarks
  plan        what a run will need: memory, time, cost and storage, from headers alone
  prune       cut a smaller model out of a bigger one
  report      make the report of an evaluation anew from its files
  store       check, show, export, import, join and concatenate stores of what teachers said

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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with one recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def stillroom_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stillroom", *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


# --- 0 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help(capsys, words):
    assert main(words) == 0
    assert capsys.readouterr() == (HELP, "")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"stillroom {stillroom.__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module_its_line_and_its_help(capsys, verb):
    assert f"\n  {verb:12}{VERBS[verb]}\n" in HELP
    assert callable(import_module(f"stillroom.cli.{verb}").main)
    assert main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    words = {
        "chat": "MODEL [MODEL] [key=value …]",
        "plan": "RECIPE.yaml [key=value …] [--json]",
        "report": "RUN…",
        "store": "COMMAND …",
    }
    assert out.startswith(f"usage: stillroom {verb} {words.get(verb, '[RECIPE.yaml] [key=value …]')}\n")
    assert err == ""


def test_help_of_a_verb_explains_its_settings(capsys):
    from stillroom.config import explain
    from stillroom.distill.config import DistillConfig

    main(["distill", "--help"])
    assert capsys.readouterr().out.endswith(f"\n\n{explain(DistillConfig)}\n")


def test_help_does_not_ask_for_a_recipe_that_is_there(here, capsys):
    assert main(["distill", "nowhere.yaml", "--help"]) == 0
    assert capsys.readouterr().err == ""
    assert list(here.iterdir()) == [here / "r.yaml"]


def test_a_reader_that_stops_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "stillroom", "distill", "--help"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# --- 2: what the user reads ------------------------------------------------------------------------------------------

ERRORS = {
    "unknown verb": (
        "distil r.yaml",
        """\
error: `distil` is not a verb
  did you mean: distill     verbs: capture, chat, distill, doctor, evaluate, plan, prune, report, store
  The first word says what to do.
  See `stillroom --help`; settings are written as key=value.
""",
    ),
    "unknown flag": (
        "distill r.yaml --steps=3",
        """\
error: `--steps=3` is not a flag
  flags: --dry-run, --resume, --overwrite, --quiet, --debug, --help
  Nothing would be done for it.
  See `stillroom --help`; settings are written as key=value.
""",
    ),
    "unknown setting": (
        "distill r.yaml optimizer.learning_rat=1",
        """\
error: unknown setting `optimizer.learning_rat`
  on the command line: learning_rat     did you mean: learning_rate
  Nothing would read it, so the run would quietly use a default instead.
  Rename or delete it; the verb's --help lists every setting.
""",
    ),
    "unknown setting of a recipe": (
        "distill typo.yaml",
        """\
error: unknown setting `objectives.0.temprature`
  typo.yaml line 4: temprature     did you mean: temperature
  Nothing would read it, so the run would quietly use a default instead.
  Rename or delete it; the verb's --help lists every setting.
""",
    ),
    "missing recipe": (
        "distill s.yaml",
        """\
error: the recipe s.yaml is not there
  did you mean: r.yaml
  A recipe holds the settings of a run, so nothing can start without it.
  Check the path; settings can also be given as key=value with no recipe at all.
""",
    ),
    "bad value of a recipe": (
        "distill bad.yaml",
        """\
error: the setting `steps` is not valid
  steps: input should be greater than 0, not -1
  Read from bad.yaml line 5.
  Change it in the recipe or by key=value; the verb's --help lists every setting with its meaning.
""",
    ),
    "key given twice": (
        "distill twice.yaml",
        """\
error: twice.yaml is not valid YAML
  twice.yaml line 9: found duplicate key "steps" with value "20" (original value: "10")
  The settings after that place cannot be read for certain.
  Mend that line; a key may be given only once.
""",
    ),
    "spaces around the sign": (
        "distill r.yaml steps = 3",
        """\
error: `steps` is neither a setting nor the recipe
  recipe: r.yaml     then: steps
  A run has one recipe, and every other word after the verb sets one value.
  Write settings as key=value, with no spaces around the sign.
""",
    ),
    "resume and overwrite": (
        "distill r.yaml --resume --overwrite",
        """\
error: --resume and --overwrite contradict each other
  --resume: goes on with the run that is there     --overwrite: deletes it
  Only one of them can be meant.
  Leave one of them out.
""",
    ),
}


@pytest.mark.parametrize(("line", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_a_users_error_is_told_in_four_parts_and_exits_with_2(here, capsys, line, text):
    (here / "typo.yaml").write_text(RECIPE.replace("{kind: forward_kl}", "{kind: forward_kl, temprature: 2}"))
    (here / "bad.yaml").write_text(RECIPE.replace("steps: 10", "steps: -1"))
    (here / "twice.yaml").write_text(RECIPE + "steps: 20\n")
    assert main(line.split()) == 2
    assert capsys.readouterr() == ("", text)
    assert not (here / "o").exists()


def test_no_settings_at_all_names_what_is_needed(here, capsys):
    assert main(["distill"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: 6 settings are not valid\n  student: is required\n")
    assert not (here / "o").exists()


def test_an_error_out_of_a_verb_exits_with_2(capsys, monkeypatch):
    def refuse(_: object) -> int:
        raise StorageError("the folder is full", {"a": 1, "b": 2}, why="So.", fix="Thus.")

    monkeypatch.setattr(distill, "main", refuse)
    assert main(["distill", "r.yaml"]) == 2
    assert capsys.readouterr() == ("", "error: the folder is full\n  a: 1     b: 2\n  So.\n  Thus.\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            StorageError("full \x1b[2Jof\u202e", {"a": "\x07"}, why="b\x9b1m", fix="c\td"),
            "full \\x1b[2Jof\\u202e\n  a: \\x07",
        ),
        (ConfigError("no answer from https://me:pw@h/?auth=x", why="So.", fix="Thus."), "https://***@h/?auth=***\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x\x1b"), "error: File name too long: x\\x1b\n"),
        (
            OSError(errno.ELOOP, "Too many levels of links", "a"),
            "error: Too many levels of links: a\n",
        ),
        (shutil.Error([("a", "b", "[Errno 28] No space left")]), "No space left"),
        (MemoryError(), "error: this machine has too little memory for what was asked\n"),
    ],
)
def test_what_is_told_is_harmless_and_holds_no_secret(capsys, monkeypatch, error, text):
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(distill, "main", fail)
    assert main(["distill", "r.yaml"]) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert out == ""
    assert not set(err) & set("\x1b\x07\x9b\u202e\t")
    assert "Traceback" not in err


def test_debug_shows_where_and_keeps_the_exit_code():
    done = stillroom_process("distill", "nowhere.yaml", "--debug")
    assert "Traceback" in done.stderr
    assert "the recipe nowhere.yaml is not there" in done.stderr
    assert done.stdout == ""
    assert done.returncode == 2


def test_the_process_exits_with_the_code_and_shows_no_traceback():
    done = stillroom_process("distill", "nowhere.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the recipe nowhere.yaml is not there\n")
    assert "Traceback" not in done.stderr


def test_flags_without_a_verb_are_not_passed_over(capsys):
    assert main(["--resume"]) == 2
    assert "verb" in capsys.readouterr().err


# --- 1 and 130 -------------------------------------------------------------------------------------------------------


def test_a_bug_is_a_traceback_and_exits_with_1(here):
    code = (
        "import sys; from stillroom.cli import distill, main\n"
        "def bug(_): raise RuntimeError('a bug')\n"
        "distill.main = bug; sys.exit(main.main(['distill', 'r.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "RuntimeError: a bug" in done.stderr
    assert "error: " not in done.stderr.replace("RuntimeError: ", "")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt(), "\ninterrupted. Go on with the same command and --resume.\n"),
        (
            Interrupted("interrupted after step 3 of 9; saved as x"),
            "\ninterrupted after step 3 of 9; saved as x. Go on with the same command and --resume.\n",
        ),
    ],
)
def test_an_interrupt_says_how_to_go_on_and_exits_with_130(capsys, monkeypatch, error, text):
    def interrupt(_: object) -> int:
        raise error

    monkeypatch.setattr(distill, "main", interrupt)
    assert main(["distill", "r.yaml"]) == 130
    assert capsys.readouterr() == ("", text)


def test_an_interrupted_overwrite_does_not_advise_what_would_be_refused(capsys, monkeypatch):
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "main", interrupt)
    assert main(["distill", "r.yaml", "--overwrite"]) == 130
    err = capsys.readouterr().err
    assert "--resume" in err
    assert "the same command and --resume" not in err or "--overwrite" in err


# --- what answers at once --------------------------------------------------------------------------------------------


def modules_after(here: Path, *words: str) -> set[str]:
    code = (
        "import sys; from stillroom.cli.main import main; code = main(sys.argv[1:])\n"
        "sys.stderr.write('\\nMODULES ' + ' '.join(m for m in sys.modules if '.' not in m))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, encoding="utf-8", cwd=here
    )
    assert "MODULES " in done.stderr
    return set(done.stderr.rpartition("MODULES ")[2].split())


HEAVY = {"torch", "transformers", "numpy", "pyarrow", "tokenizers", "datasets", "pandas"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["distil"]])
def test_the_first_help_imports_next_to_nothing(here, words):
    found = modules_after(here, *words)
    assert "stillroom" in found
    assert found & (HEAVY | {"pydantic", "ruamel", "tqdm"}) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["distill", "--help"],
        ["distill", "r.yaml", "sead=1"],
        ["distill", "r.yaml", "steps=x"],
        ["distill", "nowhere.yaml"],
        ["distill", "r.yaml", "epochs=2"],
    ],
    ids=" ".join,
)
def test_help_and_typos_import_no_torch(here, words):
    found = modules_after(here, *words)
    assert "pydantic" in found
    assert found & HEAVY == set()


def test_help_can_be_printed_where_the_locale_has_no_ellipsis():
    done = stillroom_process("--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith(f"stillroom {stillroom.__version__}")


def test_packages_of_transformers_tell_nothing_of_kernels_for_other_devices(capsys):
    assert main(["plan", "storage", "prompts=1", "vocab=8", "length=1"]) == 0
    assert capsys.readouterr().err == ""
    assert all(not logging.getLogger(name).isEnabledFor(logging.WARNING) for name in ("torchao", "bitsandbytes"))

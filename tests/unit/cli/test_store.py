"""`stillroom store`: what its words mean, what the user reads, and its exit levels."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.cli import store as module
from stillroom.cli.arguments import Arguments, parse
from stillroom.cli.main import VERBS, main
from stillroom.store.config import Full
from stillroom.store.format import FORMAT, Manifest, SourceInfo
from stillroom.store.writer import StoreWriter
from stillroom.tokenizers import fingerprint


@pytest.fixture
def here(tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the stores `a` and `b` of different data."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        manifest = Manifest(
            format=FORMAT,
            complete=False,
            teacher=SourceInfo(name="a teacher", fingerprint="1"),
            engine="transformers",
            tokenizer=SourceInfo(name="tiny", fingerprint=fingerprint(tiny_tokenizer)),
            template="none",
            data=SourceInfo(name=f"{name}.jsonl", fingerprint=name),
            num_columns=300,
            length=16,
            signal=Full(kind="full"),
            side=(),
            seed=0,
        )
        with StoreWriter(tmp_path / name, manifest) as writer:
            tiny_tokenizer.save_pretrained(tmp_path / name / "tokenizer")
            generator = np.random.default_rng(number)
            for document in range(3):
                logits = generator.normal(0, 3, (4, 300)).astype(np.float32)
                keep = np.array([True] * 4 + [False])
                writer.add(document, generator.integers(0, 300, 5, dtype=np.int32), keep, logits)
            writer.finish()
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> tuple[str, str]:
    assert main(line.split()) == code
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("store", Arguments("store")),
        ("store check DIR", Arguments("store", words=["check", "DIR"])),
        ("store show DIR 3 --quiet", Arguments("store", None, [], {"quiet"}, ["show", "DIR", "3"])),
        ("store concat A B out=C", Arguments("store", None, ["out=C"], set(), ["concat", "A", "B"])),
        ("store check ./a=b", Arguments("store", words=["check", "./a=b"])),
    ],
)
def test_words_after_the_verb(line, wanted):
    assert parse(line.split(), tuple(VERBS)) == wanted


def test_help_explains_every_command_and_setting(capsys):
    out, err = run(capsys, "store --help")
    assert out.startswith("usage: stillroom store COMMAND …\n")
    for word in (*module.COMMANDS, "tokenizer", "layout", "num_columns", "compression", "invalid", "tolerance"):
        assert f"\n  {word}" in out or f"\n{word}" in out
    assert max(map(len, out.splitlines())) <= 120
    assert err == ""


def test_check(here, capsys):
    out, err = run(capsys, "store check a")
    assert out == (
        "store     a: whole, complete\n"
        "checked   3 documents, 12 positions, 3,600 entries in 1 shard (0.0 MiB), and the tokenizer\n"
    )
    assert err == ""
    data = bytearray((here / "a" / "00000.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (here / "a" / "00000.arrow").write_bytes(data)
    out, err = run(capsys, "store check a", 2)
    assert out == ""
    assert err.count("error: the store a is damaged\n") == 2
    assert err.endswith("\na: 2 problems\n")


@pytest.mark.usefixtures("here")
def test_show(capsys):
    out, err = run(capsys, "store show a")
    assert "teacher     a teacher (1), 300 columns" in out
    out, err = run(capsys, "store show a 2")
    assert "document 2 of a.jsonl (row 2 of 3): 5 tokens, 4 positions" in out
    assert err == ""
    for row in ("3", "-1", "x", "1.0"):
        out, err = run(capsys, f"store show a {row}", 2)
        assert out == ""
        assert err.startswith("error: ")


def test_export_import_and_concat(here, capsys, tokenizer_folder):
    out, err = run(capsys, "store export a x.parquet")
    assert out.startswith("exported  3 documents, 12 positions\nsize      x.parquet (")
    assert pq.read_table("x.parquet").num_rows == 3
    assert "exists" in run(capsys, "store export a x.parquet", 2)[1]
    run(capsys, "store export a x.parquet --overwrite")
    out, err = run(capsys, f"store import x.parquet out=i tokenizer={tokenizer_folder}")
    assert out.startswith("store     i\nimported  3 documents, 12 positions, 300.0 entries a position\n")
    assert err == ""
    assert json.loads((here / "i" / "manifest.json").read_bytes())["versions"]["numpy"] == np.__version__
    run(capsys, "store check i")
    out, err = run(capsys, "store concat a b out=m")
    assert out.startswith("store     m (6 documents, 24 positions)\n")
    run(capsys, "store check m")
    assert "exists" in run(capsys, "store concat a b out=m", 2)[1]
    run(capsys, "store concat b a out=m --overwrite")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("store", "there is no command after `store`\n  commands: check, show, export, import, join, concat\n"),
        ("store chek a", "`chek` is not a command of `store`\n  did you mean: check     commands: check, "),
        ("store a", "`a` is not a command of `store`\n"),
        ("store check", "`store check` takes DIR\n  given: nothing     wanted: DIR\n"),
        ("store check a b", "`store check` takes DIR\n  given: a b     wanted: DIR\n"),
        ("store check a out=b", "`store check` takes DIR\n"),
        ("store show", "`store show` takes DIR and [ROW]\n"),
        ("store export a", "`store export` takes DIR and OUT.parquet\n"),
        ("store check nowhere", "nowhere is not a store\n"),
        ("store join", "it is not said where the joined store belongs\n"),
        ("store join a", "there are no parts of a capture in a\n"),
        ("store join a keep=1", "unknown setting `keep`\n"),
        ("store check a --resume", "`store check` has no --resume\n"),
        ("store concat a b out=c --dry-run", "`store concat` has no --dry-run\n"),
        ("store concat a b", "the setting `out` is not valid\n"),
        ("store concat a b out=c oat=d", "unknown setting `oat`\n"),
        ("store concat a out=c", "there are no two different stores to concatenate\n"),
        ("store merge a b out=c", "`store merge` is now called `store concat`\n  given: store merge     wanted: "),
        ("store import out=c tokenizer=t", "there is no file to import\n"),
        ("store import x.parquet out=c", "the setting `tokenizer` is not valid\n"),
        ("store import x.parquet out=c tokenizer=t layuot=plain", "unknown setting `layuot`\n"),
    ],
)
def test_a_users_error_exits_with_2(here, capsys, line, text):
    before = sorted(here.iterdir())
    out, err = run(capsys, line, 2)
    assert out == ""
    assert err.startswith(f"error: {text}")
    assert "Traceback" not in err
    assert sorted(here.iterdir()) == before


@pytest.mark.usefixtures("here")
def test_an_interrupt_says_that_nothing_is_left(capsys, monkeypatch):
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "COMMANDS", {"check": interrupt})
    assert main(["store", "check", "a"]) == 130
    assert capsys.readouterr() == ("", "\ninterrupted; nothing was left half-written\n")


@pytest.mark.usefixtures("here")
def test_long_work_is_told_on_stderr_unless_quiet(capsys, monkeypatch):
    monkeypatch.setattr(module, "REPORT_EVERY_S", 0.0)
    assert run(capsys, "store check a")[1] == "checking shard 1 of 1\n"
    assert run(capsys, "store check a --quiet")[1] == ""


@pytest.mark.parametrize("words", [["--help"], ["chek"], ["check"], ["import", "x", "out=y"]], ids=" ".join)
def test_help_and_typos_import_nothing_heavy(words):
    code = (
        "import sys; from stillroom.cli.main import main; main(['store', *sys.argv[1:]])\n"
        "sys.stderr.write('\\nMODULES ' + ' '.join(m for m in sys.modules if '.' not in m))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, encoding="utf-8")
    found = set(done.stderr.rpartition("MODULES ")[2].split())
    assert "stillroom" in found
    assert found & {"torch", "transformers", "numpy", "pyarrow", "tokenizers"} == set()

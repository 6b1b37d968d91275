"""`stillroom capture`, `store` and `distill` from a store, as a user runs them: in processes of their own."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from conftest import Command, texts
from stillroom.runs import read_json
from stillroom.store.reader import Store


@pytest.fixture(scope="module")
def words(saved_model, text_files: Path) -> list[str]:
    """A capture that lacks only ``out``."""
    return ["capture", f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
            "data.format=text", "data.length=32", "signal={kind: head_and_sample, head: 6, draws: 4}",
            "shard_positions=40"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command: Command, words: list[str], tmp_path_factory) -> tuple[Path, Any]:
    """The folder of an uninterrupted capture, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, command(*words, f"out={folder}")


def contents(path: Path) -> list[tuple[Any, ...]]:
    """What a store says of each document. The order of draws means nothing."""
    store = Store(path)
    found = []
    for i in range(len(store)):
        levels = store.levels([i])
        draws = sorted(zip(levels.sample_ids.tolist(), levels.sample_repeats.tolist(), strict=True))
        exact = [getattr(levels, name).tolist() for name in ("counts", "ids", "levels", "side")]
        found.append((store.document(i), store.tokens(i).tolist(), draws, *exact))
    return found


def test_capture_then_check_show_and_distil(command, here, whole, recipe, tmp_path):
    folder, printed = whole
    assert f"{folder}/store" in printed.stdout
    assert "entries a position" in printed.stdout
    assert "captured" in printed.stderr
    assert read_json(folder / "run.json")["status"] == "done"
    assert "whole, complete" in command("store", "check", str(folder / "store")).stdout
    assert "head_and_sample" in here("store", "show", str(folder / "store")).stdout
    assert "%" in here("store", "show", str(folder / "store"), "0").stdout
    out = tmp_path / "student"
    command("distill", str(recipe), f"teacher={{kind: store, path: {folder}/store}}", "data={format: store}",
            "held_out=null", "steps=2", f"out={out}")  # fmt: skip
    AutoModelForCausalLM.from_pretrained(out / "model")


def at_work(process: subprocess.Popen[Any]) -> bool:
    """Whether it has not ended two milliseconds later."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.002)
    return process.returncode is None


def test_a_killed_capture_loses_nothing_that_was_whole(environment, here, whole, words, tmp_path):
    """It is killed as soon as the first shard is there."""
    out = tmp_path / "run"
    line = [sys.executable, "-m", "stillroom", *words, f"out={out}"]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while at_work(process) and not any((out / "store").glob("*.arrow")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (out / "store").glob("0000[0-9].arrow")}
    listed = {shard["name"] for shard in read_json(out / "store" / "manifest.json")["shards"]} if before else set()
    here(*words, f"out={out}", "--resume")
    assert contents(out / "store") == contents(whole[0] / "store")
    for path, time in before.items():
        if path.stem in listed:
            assert path.stat().st_mtime_ns == time


def test_wrong_use_is_refused_without_a_traceback(here, whole, words, tmp_path):
    folder, _ = whole
    for line, text in (
        ([*words, f"out={folder}"], "exists"),
        ([*words, f"out={tmp_path}/x", "signal={kind: top_k, kk: 3}"], "kk"),
        ([*words, f"out={tmp_path}/x", "teacher.columns=7"], "cannot be kept"),
        (["store", "check", str(tmp_path)], "is not a store"),
    ):
        done = here(*line, code=2)
        assert text in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_dry_run_writes_nothing(command, words, tmp_path):
    done = command(*words, f"out={tmp_path}/x", "--dry-run")
    assert "store" in done.stdout
    assert not (tmp_path / "x").exists()


# --- many windows: stopped, and on again -----------------------------------------------------------------------------

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def many_words(words: list[str], tmp_path_factory) -> list[str]:
    """A capture of many windows, and of many shards, that lacks only ``out``."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(1500)))
    return [*words, f"data.path={path}", "shard_positions=1000"]


@pytest.fixture(scope="module")
def many(command: Command, many_words: list[str], tmp_path_factory) -> list[tuple[Any, ...]]:
    """What an uninterrupted capture of them says."""
    folder = tmp_path_factory.mktemp("all") / "run"
    command(*many_words, f"out={folder}")
    return contents(folder / "store")


@pytest.fixture
def start(environment: dict[str, str], many_words: list[str]) -> Start:
    """Begins a capture, and comes back when so many shards are in its manifest."""

    def begin(folder: Path, shards: int, *flags: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "stillroom", *many_words, f"out={folder}", *flags]
        process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while at_work(process) and num_shards(folder) < shards:
            pass
        assert process.poll() is None, process.communicate()
        return process

    return begin


def num_shards(folder: Path) -> int:
    """The shards that the manifest lists; −1 where there is no manifest."""
    try:
        return len(read_json(folder / "store" / "manifest.json")["shards"])
    except FileNotFoundError:
        return -1


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was said to stderr."""
    said = process.communicate()[1]
    return process.returncode, said


def test_ctrl_c_saves_and_the_same_command_goes_on(start, command, here, many, many_words, tmp_path):
    out = tmp_path / "run"
    process = start(out, 1)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130
    assert "Go on with the same command and --resume" in said
    assert "Traceback" not in said
    assert read_json(out / "run.json")["status"] == "interrupted"
    there = len(Store(out / "store", partial=True))
    assert f"interrupted after {there} of {len(many)} documents, saved" in said
    assert 0 < there < len(many)
    assert "NOT COMPLETE" in here("store", "check", str(out / "store")).stdout
    again = command(*many_words, f"out={out}", "--resume")
    assert f"resumed after {there} documents" in again.stderr
    assert contents(out / "store") == many
    assert read_json(out / "run.json")["status"] == "done"


def test_a_capture_killed_again_and_again_loses_nothing(start, here, many, many_words, tmp_path):
    out = tmp_path / "run"
    whole: dict[str, bytes] = {}
    for shards in (0, 3, 9):
        process = start(out, shards, "--resume")
        process.kill()
        ended(process)
        listed = [shard["name"] for shard in read_json(out / "store" / "manifest.json")["shards"]]
        assert len(listed) >= shards
        assert all((out / "store" / f"{name}.arrow").read_bytes() == data for name, data in whole.items())
        whole = {name: (out / "store" / f"{name}.arrow").read_bytes() for name in listed}
    here(*many_words, f"out={out}", "--resume")
    assert contents(out / "store") == many
    assert all((out / "store" / f"{name}.arrow").read_bytes() == data for name, data in whole.items())
    assert "whole, complete" in here("store", "check", str(out / "store")).stdout


def test_two_captures_at_once_into_one_folder_are_refused(start, here, many, many_words, tmp_path):
    out = tmp_path / "run"
    process = start(out, 1)
    process.send_signal(signal.SIGSTOP)  # so that it is still at work, however slow the others are
    try:
        for flag in ("--resume", "--overwrite"):
            refused = here(*many_words, f"out={out}", flag, code=2)
            assert "another run is at work" in refused.stderr
            assert "Traceback" not in refused.stderr
    finally:
        process.send_signal(signal.SIGCONT)
    assert ended(process)[0] == 0
    assert contents(out / "store") == many


def test_a_full_disk_leaves_whole_shards_and_it_goes_on(command, here, many, many_words, tmp_path):
    out = tmp_path / "run"

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    words = [word.replace("shard_positions=1000", "shard_positions=20000") for word in many_words]
    full = command(*words, f"out={out}", code=2, preexec_fn=fill_disk)
    assert "could not be written" in full.stderr
    assert "--resume" in full.stderr
    assert "Traceback" not in full.stderr
    there = Store(out / "store", partial=True)
    assert [there.document(i) for i in range(len(there))] == list(range(len(there)))
    here(*many_words, f"out={out}", "--resume")
    assert contents(out / "store") == many


# --- what is damaged, or does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["00000.arrow", "00000.tables", "manifest.json", "tokenizer/tokenizer.json"])
def test_a_damaged_store_is_refused_without_a_traceback(here, whole, recipe, tmp_path, file):
    broken = Path(shutil.copytree(whole[0] / "store", tmp_path / "broken"))
    data = bytearray((broken / file).read_bytes())
    at = data.index(b'"id":') if file.endswith("tokenizer.json") else len(data) // 2
    data[at] ^= 1
    (broken / file).write_bytes(data)
    for line in (
        ("distill", str(recipe), f"teacher={{kind: store, path: {broken}}}", "data={format: store}", "held_out=null",
         "steps=50", f"out={tmp_path}/student"),
        ("store", "check", str(broken)),
    ):  # fmt: skip
        refused = here(*line, code=2)
        assert "Traceback" not in refused.stderr
        assert refused.stderr.strip()
    assert not (tmp_path / "student" / "model").exists()


@pytest.mark.parametrize("setting", ["batch={tokens: 16}", "objectives=[{kind: reverse_kl}]"])
def test_a_run_that_a_store_does_not_fit_is_refused_without_a_traceback(here, whole, recipe, tmp_path, setting):
    store = f"teacher={{kind: store, path: {whole[0]}/store}}"
    refused = here("distill", str(recipe), store, "data={format: store}", "held_out=null", setting,
                   f"out={tmp_path}/student", code=2)  # fmt: skip
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "student").exists()

"""`stillroom capture`, `store` and `distill` from a store, as a user runs them: in processes of their own."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from conftest import Command
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
        draws = sorted(zip(levels.draw_ids.tolist(), levels.draw_times.tolist(), strict=True))
        exact = [getattr(levels, name).tolist() for name in ("counts", "ids", "levels", "side")]
        found.append((store.document(i), store.tokens(i).tolist(), draws, *exact))
    return found


def test_capture_then_check_show_and_distil(command, whole, recipe, tmp_path):
    folder, printed = whole
    assert f"{folder}/store" in printed.stdout
    assert "entries a position" in printed.stdout
    assert "captured" in printed.stderr
    assert read_json(folder / "run.json")["status"] == "done"
    assert "whole, complete" in command("store", "check", str(folder / "store")).stdout
    assert "head_and_sample" in command("store", "show", str(folder / "store")).stdout
    assert "%" in command("store", "show", str(folder / "store"), "0").stdout
    out = tmp_path / "student"
    command("distill", str(recipe), f"teacher={{kind: store, path: {folder}/store}}", "data={format: store}",
            "held_out=null", "steps=2", f"out={out}")  # fmt: skip
    AutoModelForCausalLM.from_pretrained(out / "model")


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_killed_capture_loses_nothing_that_was_whole(environment, command, whole, words, tmp_path, shards):
    """It is killed as soon as so many shards are there; 0 is before the first."""
    out = tmp_path / "run"
    line = [sys.executable, "-m", "stillroom", *words, f"out={out}"]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    seen = -1
    while process.poll() is None and seen < shards:
        seen = len(list((out / "store").glob("*.arrow"))) if (out / "store").exists() else -1
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (out / "store").glob("0000[0-9].arrow")}
    listed = {shard["name"] for shard in read_json(out / "store" / "manifest.json")["shards"]} if before else set()
    command(*words, f"out={out}", "--resume")
    assert contents(out / "store") == contents(whole[0] / "store")
    for path, time in before.items():
        if path.stem in listed:
            assert path.stat().st_mtime_ns == time


def test_wrong_use_is_refused_without_a_traceback(command, whole, words, tmp_path):
    folder, _ = whole
    for line, text in (
        ([*words, f"out={folder}"], "exists"),
        ([*words, f"out={tmp_path}/x", "signal={kind: top_k, kk: 3}"], "kk"),
        ([*words, f"out={tmp_path}/x", "teacher.columns=7"], "cannot be kept"),
        (["store", "check", str(tmp_path)], "is not a store"),
    ):
        done = command(*line, code=2)
        assert text in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_dry_run_writes_nothing(command, words, tmp_path):
    done = command(*words, f"out={tmp_path}/x", "--dry-run")
    assert "store" in done.stdout
    assert not (tmp_path / "x").exists()


def test_parts_merged_are_the_whole(command, whole, words, tmp_path):
    for index in range(2):
        command(*words, f"out={tmp_path}/{index}", f"part={{index: {index}, of: 2}}")
    command("store", "merge", f"{tmp_path}/0/store", f"{tmp_path}/1/store", f"out={tmp_path}/all")
    assert [row[:2] for row in contents(tmp_path / "all")] == [row[:2] for row in contents(whole[0] / "store")]

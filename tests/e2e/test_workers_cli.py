"""A capture over several workers by the real command line: one is killed and goes on alone, and they are joined."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import Command, texts
from stillroom.runs import read_json
from stillroom.store.reader import Store


@pytest.fixture(scope="module")
def words(saved_model, tmp_path_factory) -> list[str]:
    """A capture of several windows and of many shards that lacks only ``out``."""
    path = tmp_path_factory.mktemp("data") / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(700)))
    return ["capture", f"teacher.model={saved_model('llama', seed=2)}", f"data.path={path}", "data.format=text",
            "data.length=32", "shard_positions=1000"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command: Command, words: list[str], tmp_path_factory) -> list[tuple[Any, ...]]:
    """What one worker alone stores."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command(*words, f"out={folder}")
    return contents(folder / "store")


def contents(path: Path) -> list[tuple[Any, ...]]:
    """What a store says of each document. The order of draws means nothing."""
    store = Store(path)
    found = []
    for i in range(len(store)):
        levels = store.levels([i])
        draws = sorted(zip(levels.sample_ids.tolist(), levels.sample_repeats.tolist(), strict=True))
        exact = [getattr(levels, name).tolist() for name in ("counts", "sample_counts", "ids", "levels", "side")]
        found.append((store.document(i), store.tokens(i).tolist(), store.loss_mask(i).tolist(), draws, *exact))
    return found


def part_of_three(index: int) -> str:
    return f"part={{index: {index}, of: 3}}"


def has_a_shard(folder: Path) -> bool:
    with suppress(FileNotFoundError):
        return bool(read_json(folder / "store" / "manifest.json")["shards"])
    return False


def at_work(process: subprocess.Popen[Any]) -> bool:
    """Whether it has not ended two milliseconds later."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.002)
    return process.returncode is None


def test_a_worker_that_is_killed_is_started_again_alone(environment, here, whole, words, tmp_path):
    out = tmp_path / "run"
    workers = [
        subprocess.Popen([sys.executable, "-m", "stillroom", *words, f"out={out}", part_of_three(index)],
                         env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(3)
    ]  # fmt: skip
    folders = [out / f"part-000{index}-of-0003" for index in range(3)]
    while at_work(workers[1]) and not has_a_shard(folders[1]):
        pass
    workers[1].kill()
    said = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -9, 0]
    for index in (0, 2):
        assert said[index][0].startswith(f"part {index} of 3: ")
        assert all(line.startswith(f"part {index} of 3: ") for line in said[index][1].splitlines())
    missing = here("store", "join", str(out), code=2).stderr
    assert missing.startswith("error: part 1 of 3 is not finished\n")
    assert f'stillroom capture RECIPE "part={{index: 1, of: 3}}" out={out} --resume' in missing
    before = {path: path.stat().st_mtime_ns for i in (0, 2) for path in (folders[i] / "store").iterdir()}
    again = here(*words, f"out={out}", part_of_three(1), "--resume")
    assert "part 1 of 3: resumed after" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    joined = here("store", "join", str(out))
    assert joined.stdout.startswith(f"store     {out}/store ({len(whole):,} documents, ")
    assert contents(out / "store") == whole
    assert "whole, complete" in here("store", "check", str(out / "store")).stdout


def test_ranks_of_torchrun_take_their_parts_by_themselves(environment, here, whole, words, tmp_path):
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stillroom"]
    done = subprocess.run([*launch, *words, f"out={out}"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == ["part 0 of 2", "part 1 of 2"]
    here("store", "join", str(out))
    assert contents(out / "store") == whole

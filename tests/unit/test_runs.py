"""A run's folder, its run.json and its metrics.jsonl."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from stillroom import runs
from stillroom.errors import ConfigError, DataError, StorageError
from stillroom.runs import Metrics, RunFolder, read_json, read_metrics, write_json
from stillroom.terminal import redact


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def earlier(out: Path) -> Path:
    """The folder of a run that has settings, a checkpoint and a result."""
    with RunFolder(out, {"steps": 3, "optimizer": {"rate": 0.5}}) as folder:
        (out / "checkpoints").mkdir()
        (out / "checkpoints" / "step").write_text("state")
        folder.update(steps=3)
    return out


# --- refuse, resume, overwrite ---------------------------------------------------------------------------------------


def test_a_new_folder_is_made_with_its_parents_and_a_record(out):
    with RunFolder(out, {"steps": 3, "betas": (0.5, 0.75)}) as folder:
        assert (folder.resumed, folder.done) == (False, False)
    record = read_json(out / "run.json")
    assert record["status"] == "started"
    assert record["config"] == {"steps": 3, "betas": [0.5, 0.75]}
    assert record["versions"]["python"] == sys.version.split()[0]
    assert {"stillroom", "torch", "transformers"} <= set(record["versions"])
    assert record["peak_memory_bytes"] > 2**20
    assert record["machine"]["num_cores"] == os.cpu_count()
    assert "T" in record["started"]
    assert "git_commit" in record


def test_a_folder_that_exists_is_refused_naming_both_ways_on(earlier):
    before = (earlier / "run.json").read_bytes()
    with pytest.raises(StorageError) as caught:
        RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}})
    assert caught.value.what == f"the output folder {earlier} exists"
    assert caught.value.values == {"out": earlier, "holds": "checkpoints, run.json"}
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    assert (earlier / "run.json").read_bytes() == before


def test_resume_goes_on_with_the_record_that_is_there(earlier):
    started = read_json(earlier / "run.json")["started"]
    with RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True) as folder:
        assert folder.resumed
        assert (folder.record["steps"], folder.record["started"]) == (3, started)
        folder.update(status="done")
        assert folder.done
    assert entries(earlier) == ["checkpoints", "run.json"]
    with RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True) as folder:
        assert folder.done


@pytest.mark.parametrize("made", [False, True])
def test_resume_begins_a_run_where_there_is_none(out, made):
    if made:
        out.mkdir(parents=True)
    with RunFolder(out, {"steps": 3}, resume=True) as folder:
        assert not folder.resumed
    assert read_json(out / "run.json")["config"] == {"steps": 3}


def test_resume_with_tuples_is_no_other_config(out):
    config = {"objectives": ({"kind": "a"},), "betas": (0.5, 0.75)}
    RunFolder(out, config).close()
    with RunFolder(out, config, resume=True) as folder:
        assert folder.resumed


def test_resume_with_other_settings_is_refused_and_each_is_named(earlier):
    before = (earlier / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        RunFolder(earlier, {"steps": 4, "optimizer": {"rate": 0.5, "clip": 1.0}}, resume=True)
    assert caught.value.what == f"the run in {earlier} has other settings"
    assert caught.value.values == {"steps": "3 there, 4 now", "optimizer.clip": "None there, 1.0 now"}
    assert (earlier / "run.json").read_bytes() == before
    RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True).close()


def test_free_settings_may_differ_and_the_new_ones_are_written(earlier):
    config = {"steps": 3, "optimizer": {"rate": 0.75}}
    with RunFolder(earlier, config, resume=True, free=["optimizer"]) as folder:
        folder.update()
    assert read_json(earlier / "run.json")["config"] == config


@pytest.mark.parametrize("free", ["optim", "optimizer.rat", "optimizer.rate.x"])
def test_a_free_setting_frees_no_other_of_a_like_name(earlier, free):
    with pytest.raises(ConfigError):
        RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.75}}, resume=True, free=[free])


def test_overwrite_deletes_all_that_the_run_wrote(earlier, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (earlier / "link").symlink_to(outside)
    (earlier / "metrics.jsonl").write_text("{}\n")
    with RunFolder(earlier, {"steps": 9}, overwrite=True) as folder:
        assert not folder.resumed
    assert entries(earlier) == ["run.json"]
    assert read_json(earlier / "run.json")["config"] == {"steps": 9}
    assert (outside / "kept").read_text() == "kept"


def test_overwrite_deletes_the_mark_of_a_run_last(earlier, monkeypatch):
    """Killed on the way, the folder is still a run's, and --overwrite can be said again."""
    for name in ("a.txt", "z.txt"):
        (earlier / name).touch()
    (earlier / "zz").mkdir()
    deleted: list[str] = []
    unlink, rmtree = Path.unlink, shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **flags: (deleted.append(path.name), unlink(path, **flags)))
        patch.setattr(shutil, "rmtree", lambda path, *flags: (deleted.append(path.name), rmtree(path, *flags)))
        RunFolder(earlier, {"steps": 9}, overwrite=True).close()
    assert sorted(deleted) == ["a.txt", "checkpoints", "run.json", "z.txt", "zz"]
    assert deleted[-1] == "run.json"


@pytest.mark.parametrize("made", [False, True])
def test_overwrite_begins_a_run_where_there_is_nothing(out, made):
    if made:
        out.mkdir(parents=True)
    RunFolder(out, {"steps": 3}, overwrite=True).close()
    assert entries(out) == ["run.json"]


def test_overwrite_begins_anew_where_a_run_was_killed_before_its_first_record(out):
    out.mkdir(parents=True)
    (out / ".lock").touch()
    RunFolder(out, {"steps": 3}, overwrite=True).close()
    assert entries(out) == ["run.json"]


def test_overwrite_is_possible_where_run_json_is_broken(earlier):
    (earlier / "run.json").write_text("{")
    RunFolder(earlier, {"steps": 9}, overwrite=True).close()
    assert read_json(earlier / "run.json")["config"] == {"steps": 9}


def test_a_folder_that_is_no_runs_is_never_deleted(out):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError) as caught:
        RunFolder(out, {}, overwrite=True)
    assert caught.value.what == f"{out} is not the folder of a run"
    assert caught.value.values == {"expected": "run.json", "holds": "thesis.tex"}
    assert (out / "thesis.tex").read_text() == "years of work"


def test_resume_does_not_make_a_run_of_a_folder_that_is_none(out):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError):
        RunFolder(out, {}, resume=True)
    assert entries(out) == ["thesis.tex"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("below", [False, True], ids=["file", "below a file"])
def test_a_file_in_the_way_is_refused(tmp_path, flags, below):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(StorageError) as caught:
        RunFolder(file / "run" if below else file, {}, **flags)
    assert str(file) in str(caught.value)
    assert file.read_text() == "kept"


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"status": "sta'])
def test_a_broken_run_json_is_refused_on_resume(earlier, text):
    (earlier / "run.json").write_text(text)
    with pytest.raises(DataError) as caught:
        RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True)
    assert caught.value.what == f"{earlier / 'run.json'} is not JSON"
    assert (earlier / "run.json").read_text() == text


@pytest.mark.parametrize(
    "change", [(": 3", ": 4"), ("started", "done"), ('"steps"', '"step5"'), ("git_commit", "git_c0mmit")]
)
def test_a_run_json_that_was_changed_is_refused_on_resume(out, change):
    RunFolder(out, {"steps": 3}).close()
    path = out / "run.json"
    assert json.loads(path.read_text())["sha256"]
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(DataError, match="was changed after it was written"):
        RunFolder(out, {"steps": 3}, resume=True)


def test_a_run_json_of_the_version_before_is_resumed(out):
    RunFolder(out, {"steps": 3}).close()
    write_json(out / "run.json", read_json(out / "run.json"))  # which had no checksum
    with RunFolder(out, {"steps": 3}, resume=True) as folder:
        folder.update(status="done")
    assert json.loads((out / "run.json").read_text())["sha256"]


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", '{"status": "done"}'])
def test_a_run_json_without_settings_is_refused_on_resume(earlier, text):
    (earlier / "run.json").write_text(text)
    with pytest.raises(DataError):
        RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True)
    assert (earlier / "run.json").read_text() == text


# --- the lock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}], ids=str)
def test_a_folder_in_use_is_refused_and_untouched(earlier, flags):
    config = {"steps": 3, "optimizer": {"rate": 0.5}}
    with RunFolder(earlier, config, resume=True):
        with pytest.raises(StorageError) as caught:
            RunFolder(earlier, config, **flags)
        assert caught.value.what == f"another run is at work in {earlier}"
        assert (earlier / "checkpoints" / "step").read_text() == "state"
    RunFolder(earlier, config, **flags).close()


def test_a_folder_in_use_by_another_process_is_refused_until_that_ends(earlier):
    hold = (
        "import sys; from stillroom.runs import RunFolder\n"
        "folder = RunFolder(sys.argv[1], {'steps': 3, 'optimizer': {'rate': 0.5}}, resume=True)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    config = {"steps": 3, "optimizer": {"rate": 0.5}}
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(earlier)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(StorageError, match="another run is at work"):
                RunFolder(earlier, config, resume=True)
        finally:
            other.kill()
    RunFolder(earlier, config, resume=True).close()


def test_a_refused_folder_is_not_left_locked(earlier):
    with pytest.raises(ConfigError):
        RunFolder(earlier, {"steps": 9}, resume=True)
    RunFolder(earlier, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True).close()


def test_an_error_inside_lets_go_of_the_folder(earlier):
    config = {"steps": 3, "optimizer": {"rate": 0.5}}
    with pytest.raises(RuntimeError, match="boom"), RunFolder(earlier, config, resume=True):
        raise RuntimeError("boom")
    RunFolder(earlier, config, resume=True).close()


# --- run.json --------------------------------------------------------------------------------------------------------


def test_update_adds_and_replaces_values(out):
    with RunFolder(out, {}) as folder:
        folder.update(steps=1, student={"num_parameters": 7})
        folder.update(steps=2)
    record = read_json(out / "run.json")
    assert (record["steps"], record["student"], record["status"]) == (2, {"num_parameters": 7}, "started")


def test_peak_memory_is_the_most_of_all_resumes(out):
    with RunFolder(out, {}) as folder:
        folder.record["peak_memory_bytes"] = 2**60
        folder.update()
    with RunFolder(out, {}, resume=True) as folder:
        folder.update()
    assert read_json(out / "run.json")["peak_memory_bytes"] == 2**60


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://me:secret@host/x", "https://***@host/x"),
        ("git+https://secret@host/x", "git+https://***@host/x"),
        ("postgres://me:sec-ret@host:5432/db", "postgres://***@host:5432/db"),
        ("from https://a:b@h and s3://c:d@e", "from https://***@h and s3://***@e"),
        ("https://me:sec@ret@host/x", "https://***@host/x"),
        ("https://host/a@b", "https://host/a@b"),
        ("me@host.org", "me@host.org"),
        ("GET https://h/x?user=me&pwd=hunter2&a=1", "GET https://h/x?user=me&pwd=***&a=1"),
        (
            "https://h/x?Passphrase=p&db_pass=q&X-Amz-Signature=r&access_token=s",
            "https://h/x?Passphrase=***&db_pass=***&X-Amz-Signature=***&access_token=***",
        ),
        ("'https://h/x?auth=a&authorization=b' failed", "'https://h/x?auth=***&authorization=***' failed"),
        ("https://h/x#access_token=s&a=1;SessionId=2", "https://h/x#access_token=***&a=1;SessionId=***"),
        (
            "Max retries exceeded with url: /v1?api_key=s (Caused by",
            "Max retries exceeded with url: /v1?api_key=*** (Caused by",
        ),
        ("what is x?key=1", "what is x?key=1"),
        ("Qwen/Qwen2-1.5B", "Qwen/Qwen2-1.5B"),
        (3, 3),
        (None, None),
        ({"a": ["https://me:secret@host"]}, {"a": ["https://***@host"]}),
    ],
)
def test_passwords_in_addresses_are_taken_out(text, wanted):
    assert redact(text) == wanted


def test_a_secret_reaches_neither_run_json_nor_an_error(out):
    config = {"data": {"path": "https://me:hunter2@host/x"}, "paths": ("s3://key:hunter2@b",), "steps": 3}
    RunFolder(out, config).close()
    with RunFolder(out, config, resume=True) as folder:
        folder.update()
        assert "hunter2" not in json.dumps(folder.record)
    with pytest.raises(ConfigError) as caught:
        RunFolder(out, config | {"data": {"path": "https://me:hunter2@other/x"}}, resume=True)
    assert "hunter2" not in str(caught.value)
    assert [p.name for p in out.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()] == []


def test_json_round_trip(tmp_path):
    values = {"a": [1, 2.5, None, True], "é": {"b": "ü\n"}}
    write_json(tmp_path / "x.json", values)
    assert read_json(tmp_path / "x.json") == values
    assert (tmp_path / "x.json").read_bytes().endswith(b"}\n")
    assert [p.name for p in tmp_path.glob("*.json*")] == ["x.json"]


def test_json_is_utf_8_whatever_the_locale(tmp_path):
    write = "import sys; from pathlib import Path; from stillroom.runs import write_json\n" + (
        "write_json(Path(sys.argv[1]), {'a': '\\xe9\\u2192'})"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", write, str(tmp_path / "x.json")], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8")) == {"a": "é→"}


@pytest.fixture
def replaced(tmp_path):
    """Makes an old folder ``model`` and a new one that is to replace it; tells which of them is under the name."""
    for name, text in (("model", "old"), (".model.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(text)
    return lambda: (tmp_path / "model" / "text").read_text()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_replaced_is_gone_and_leaves_nothing(exchange, replaced, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(runs, "_exchange", lambda *_: False)
        (tmp_path / ".model.old").mkdir()  # what a killed one left
    runs.replace_folder(tmp_path / ".model.tmp", tmp_path / "model")
    assert replaced() == "new"
    assert entries(tmp_path) == ["model"]
    (tmp_path / ".model.tmp").mkdir()
    runs.replace_folder(tmp_path / ".model.tmp", tmp_path / "first")
    assert entries(tmp_path) == ["first", "model"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two names")
@pytest.mark.parametrize("step", ["rename", "replace", "sync_tree", "exchange", "sync_folder", "rmtree"])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(step, replaced, tmp_path, monkeypatch):
    """At each step that changes names or deletes, before it is done."""

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place, name = {
        "rename": (Path, step), "replace": (Path, step), "exchange": (runs, "_exchange"), "rmtree": (shutil, step),
    }.get(step, (runs, step))  # fmt: skip
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        if step == "sync_folder":
            patch.setattr(runs, "sync_tree", lambda _: None)
        patch.setattr(place, name, kill)
        runs.replace_folder(tmp_path / ".model.tmp", tmp_path / "model")
    assert replaced() == ("old" if step in ("sync_tree", "exchange") else "new")


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str]]:
    """What is done to a disk, in its order: each sync, rename and deletion of a folder, with the name it is done to."""
    steps: list[tuple[str, str]] = []
    fsync, exchange, rename, rmtree = os.fsync, runs._exchange, Path.rename, shutil.rmtree

    def noted(kind: str, path: Path) -> None:
        steps.append((kind, Path(path).name))

    monkeypatch.setattr(os, "fsync", lambda fd: (noted("sync", Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1])
    monkeypatch.setattr(runs, "_exchange", lambda a, b: exchange(a, b) and (noted("name", b) or True))
    monkeypatch.setattr(Path, "rename", lambda a, b: (rename(a, b), noted("name", b))[0])
    monkeypatch.setattr(shutil, "rmtree", lambda path, *a, **k: (noted("delete", path), rmtree(path, *a, **k))[1])
    return steps


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the name of what is synced")
@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_on_the_disk_before_it_has_its_name_and_the_old_one_goes_last(
    exchange, replaced, tmp_path, monkeypatch, done
):
    inner = tmp_path / ".model.tmp" / "inner"
    inner.mkdir()
    (inner / "more").touch()
    if not exchange:
        monkeypatch.setattr(runs, "_exchange", lambda *_: False)
    runs.replace_folder(tmp_path / ".model.tmp", tmp_path / "model")
    assert replaced() == "new"
    named = [("delete", ".model.old"), ("name", ".model.old")] * (not exchange) + [("name", "model")]
    assert done == [
        *(("sync", name) for name in ("text", "more", "inner", ".model.tmp")),
        *named,
        ("sync", tmp_path.name),
        ("delete", ".model.tmp" if exchange else ".model.old"),
    ]


def test_a_folder_that_cannot_take_the_place_of_another_leaves_it(replaced, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name == ".model.tmp":
            raise OSError("it cannot be moved")
        return rename(path, to)

    monkeypatch.setattr(runs, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="cannot be moved"):
        runs.replace_folder(tmp_path / ".model.tmp", tmp_path / "model")
    assert replaced() == "old"
    assert entries(tmp_path) == [".model.tmp", "model"]


def test_a_lock_on_a_file_that_is_no_longer_there_is_none(tmp_path, monkeypatch):
    """Opened before who held it renamed or deleted it, and locked after."""
    path, flock = tmp_path / "x", runs.fcntl.flock
    busy = BlockingIOError("busy")
    for end in (Path.unlink, lambda path: path.rename(tmp_path / "y"), lambda path: (path.unlink(), path.touch())):
        with monkeypatch.context() as patch:
            patch.setattr(runs.fcntl, "flock", lambda file, flags, end=end: (end(path), flock(file, flags)))
            with pytest.raises(BlockingIOError, match="busy"):
                runs.lock(path, busy)
        path.unlink(missing_ok=True)
        with runs.lock(path, busy), pytest.raises(BlockingIOError, match="busy"):
            runs.lock(path, busy)
        runs.lock(path, busy).close()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    monkeypatch.undo()
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}


def test_a_failed_update_keeps_the_run_resumable(earlier, monkeypatch):
    config = {"steps": 3, "optimizer": {"rate": 0.5}}
    with RunFolder(earlier, config, resume=True) as folder:
        monkeypatch.setattr("stillroom.runs.write_whole", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            folder.update(status="done")
        monkeypatch.undo()
    with RunFolder(earlier, config, resume=True) as folder:
        assert (folder.resumed, folder.done) == (True, False)


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def written(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss_nats": step / 8}) + "\n" for step in steps)


def reopened(path: Path, text: str, after: int) -> str:
    path.write_text(text)
    Metrics(path, after).close()
    return path.read_text()


def test_metrics_are_there_as_soon_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, after=0)
    metrics.append({"step": 1, "text": "a\u2028b\n", "none": None})
    assert read_metrics(path) == [{"step": 1, "text": "a\u2028b\n", "none": None}]
    metrics.append({"step": 2})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert path.read_text().count("\n") == 2
    metrics.close()


def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = written(1, 2) + '{"step": 2, "held_out": {"loss_nats": 1.5}}\n' + written(3, 4)
    path.write_text(text)
    metrics = Metrics(path, after=2)
    metrics.append({"step": 3})
    metrics.close()
    assert path.read_text() == written(1, 2) + '{"step": 2, "held_out": {"loss_nats": 1.5}}\n{"step": 3}\n'
    assert [p.name for p in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


@pytest.mark.parametrize("after", [0, 3, 9])
def test_what_is_kept_is_kept_to_the_byte(tmp_path, after):
    assert reopened(tmp_path / "metrics.jsonl", written(1, 2, 3), after) == written(*range(1, min(after, 3) + 1))


@pytest.mark.parametrize("half", ["{", '{"step": 3, "lo', '{"step": 3, "loss_nats": 0.3', "\x00\x00\x00"])
def test_a_last_line_that_a_killed_run_left_half_written_is_dropped(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_text(written(1, 2) + half)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert reopened(path, written(1, 2) + half, after=9) == written(1, 2)


def test_every_cut_of_a_file_leaves_its_whole_lines(tmp_path):
    text = written(1, 2, 3)
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
    for cut in range(len(text) + 1):
        kept = reopened(tmp_path / "metrics.jsonl", text[:cut], after=9)
        assert kept in (written(*range(1, 1 + sum(end <= cut for end in ends))), text[:cut] + "\n")
        assert kept == "" or kept.endswith("}\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 1}\n{"st\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"st\n', 2),
        ('{"step": 1}\n\n{"step": 3}\n', 2),
        ("nonsense\n", 1),
        ('{"step": 1}\n[1, 2]\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"loss_nats": 2.0}\n', 2),
        ("3\n", 1),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, text, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        Metrics(path, after=9)
    assert caught.value.what == f"{path} is damaged"
    assert caught.value.values["line"] == line
    assert path.read_text() == text


def test_bytes_that_are_no_text_are_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 3}\n')
    with pytest.raises(DataError) as caught:
        Metrics(path, after=9)
    assert caught.value.what == f"{path} is damaged"
    assert path.read_bytes() == b'{"step": 1}\n\xff\xfe\n{"step": 3}\n'


def test_a_rewrite_that_fails_loses_no_metrics(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(written(1, 2, 3))

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Metrics(path, after=2)
    assert path.read_text() == written(1, 2, 3)


SEALED = [
    {"step": 1, "loss_nats": 0.5},
    {"step": 2, "loss_nats": 0.25},
    {"step": 2, "held_out": {"loss_nats": 0.75}},
]


@pytest.fixture
def sealed(tmp_path) -> tuple[Path, dict[str, int]]:
    """A metrics.jsonl that was sealed after step 2 of 3, and the seal."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, after=0)
    for line in SEALED:
        metrics.append(line)
    seal = metrics.seal()
    metrics.append({"step": 3, "loss_nats": 0.125})
    metrics.close()
    return path, seal


def test_what_follows_a_seal_is_dropped_and_what_is_sealed_kept_to_the_byte(sealed):
    path, seal = sealed
    text = "".join(json.dumps(line) + "\n" for line in SEALED)
    assert seal == {"size_bytes": len(text), "crc32": zlib.crc32(text.encode())}
    metrics = Metrics(path, 2, seal)
    assert path.read_text() == text
    metrics.append({"step": 3})
    metrics.close()
    assert path.read_text() == text + '{"step": 3}\n'
    again = Metrics(path, 3)  # as of a run of an earlier version, which sealed nothing
    assert again.seal() == {"size_bytes": len(text) + 12, "crc32": zlib.crc32(path.read_bytes())}
    again.close()


CHANGES = {
    "a value": lambda text: text.replace("0.25", "0.26"),
    "a line more": lambda text: text.replace("\n", '\n{"step": 1, "loss_nats": 9}\n', 1),
    "a line less": lambda text: text.split("\n", 1)[1],
    "the last line half": lambda text: text[: text.index('{"step": 3') - 4],
    "nothing left": lambda _: "",
    "lines in another order": lambda text: "".join(reversed(text.splitlines(keepends=True))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metrics_that_were_changed_before_their_seal_are_refused(change, sealed):
    path, seal = sealed
    changed = CHANGES[change](path.read_text())
    path.write_text(changed)
    with pytest.raises(DataError, match="was changed after the checkpoint of step 2") as refusal:
        Metrics(path, 2, seal)
    then, now = refusal.value.values.values()
    assert then == f"{seal['size_bytes']} bytes with the checksum {seal['crc32']:08x}"
    assert str(now).partition(" ")[0] == str(min(len(changed), seal["size_bytes"]))
    assert path.read_text() == changed
    path.unlink()
    with pytest.raises(DataError, match="was changed"):
        Metrics(path, 2, seal)


def test_a_seal_is_of_what_is_on_the_disk(sealed, monkeypatch):
    """Else a power cut would leave a checkpoint whose metrics are not there."""
    synced: list[int] = []
    metrics = Metrics(*sealed[:1], 9)
    monkeypatch.setattr(os, "fsync", synced.append)
    metrics.seal()
    assert synced == [metrics._file.fileno()]
    metrics.close()


def test_the_folder_can_be_moved_between_resumes(earlier, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(earlier, moved)
    with RunFolder(moved, {"steps": 3, "optimizer": {"rate": 0.5}}, resume=True) as folder:
        assert folder.resumed


def test_a_run_that_fails_before_it_makes_anything_leaves_nothing_in_the_way(tmp_path):
    """The mended command may have the same `out`. What was made, or was there before, stays."""
    error = DataError("nothing to read", {"rows": 0}, why="There is nothing.", fix="Give it some.")

    def fail(place: Path, *products: str, **settings: bool) -> None:
        with RunFolder(place, {"a": 1}, **settings) as folder:
            for product in products:
                (folder.path / product).touch()
            raise error

    with pytest.raises(DataError):
        fail(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(DataError):
        fail(tmp_path / "b", "metrics.jsonl")
    assert (tmp_path / "b" / "run.json").exists()
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError):
        fail(tmp_path / "c", overwrite=True)
    assert (tmp_path / "c" / "run.json").exists()

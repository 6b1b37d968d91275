"""Tracking: what was logged is really there, in each package's own files, without a network."""

import importlib.util
import json
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillroom.errors import MissingError
from stillroom.tracking import Tracker, _run_id, track

KINDS = ("tensorboard", "wandb", "trackio", "mlflow")
CONFIG = {"steps": 3, "teacher": {"model": "arcee-ai/Arcee-Spark", "dtype": None}}
LOGGED = {
    "train/loss_nats": [(1, 1.8125), (2, 1.4375)],
    "train/learning_rate": [(1, 0.03125)],
    "held_out/loss_nats": [(2, 1.6875)],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, with every package told to stay on this machine and inside ``tmp_path``."""
    settings = {
        "HOME": tmp_path / "home",
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": tmp_path / "trackio",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def calls_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """No connection leaves this machine; a test fails if one was tried."""
    tried: list[object] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            tried.append(address)
            raise OSError("no network in this test")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield tried
    assert tried == []


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package `{package}` is not installed")


def log_all(tracker: Tracker) -> None:
    tracker.log({"train/loss_nats": 1.8125, "train/learning_rate": 0.03125}, 1)
    tracker.log({"train/loss_nats": 1.4375}, 2)
    tracker.log({"held_out/loss_nats": 1.6875}, 2)


def test_no_tracker_writes_nothing(folder, capfd):
    tracker = track((), folder, CONFIG)
    log_all(tracker)
    tracker.close()
    assert list(folder.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_is_not_there_is_named_with_its_extra(folder, monkeypatch, kind):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == kind else find(name, *rest))
    with pytest.raises(MissingError) as caught:
        track([kind], folder, CONFIG)
    assert caught.value.what == f"the package `{kind}` is not installed"
    assert caught.value.values == {"needed for": f"tracking=[{kind}]"}
    assert f'"stillroom[{kind}]"' in caught.value.fix
    assert list(folder.iterdir()) == []


def test_the_extras_that_errors_name_are_there():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert set(KINDS) <= set(project["project"]["optional-dependencies"])


def test_every_kind_of_the_settings_has_a_tracker():
    import typing

    from stillroom.distill.config import DistillConfig

    [kinds, *_] = typing.get_args(DistillConfig.model_fields["tracking"].annotation)
    assert set(typing.get_args(kinds)) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tracker_says_is_kept_out_of_the_results(folder, capfd, kind):
    """Standard output is for the result of a run."""
    need(kind)
    tracker = track([kind], folder, CONFIG)
    log_all(tracker)
    tracker.close()
    assert capfd.readouterr().out == ""


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_holds_every_value(folder):
    need("tensorboard")
    tracker = track(["tensorboard"], folder, CONFIG)
    log_all(tracker)
    tracker.close()
    assert tensorboard_scalars(folder) == LOGGED


def test_tensorboard_goes_on_after_a_resume(folder):
    need("tensorboard")
    for step in (1, 2):
        tracker = track(["tensorboard"], folder, CONFIG, after=step - 1)
        tracker.log({"train/loss_nats": step / 8}, step)
        tracker.close()
    assert tensorboard_scalars(folder) == {"train/loss_nats": [(1, 0.125), (2, 0.25)]}


# --- Weights & Biases ------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run's file, which is a log in LevelDB's format after seven bytes of header."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


WANDB_RUN = f"""
import sys
from pathlib import Path
from stillroom.tracking import track

offset = int(sys.argv[2])
tracker = track(["wandb"], Path(sys.argv[1]), {CONFIG!r})
tracker.log({{"train/loss_nats": 1.8125, "train/learning_rate": 0.03125}}, 1 + offset)
tracker.log({{"train/loss_nats": 1.4375}}, 2 + offset)
tracker.log({{"held_out/loss_nats": 1.6875}}, 2 + offset)
tracker.close()
"""


def test_wandb_holds_every_value_of_a_run_and_of_its_resume(folder):
    need("wandb")
    for offset in (0, 2):  # each in a process of its own: wandb may lose a run that another of its id came just before
        subprocess.run([sys.executable, "-c", WANDB_RUN, str(folder), str(offset)], check=True, timeout=120)
    from wandb.proto import wandb_internal_pb2

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert files
    found: dict[str, dict[int, float]] = {name: {} for name in LOGGED}
    for bytes_ in (record for file in files for record in wandb_records(file)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(bytes_)
        if record.WhichOneof("record_type") == "run":
            assert (record.run.run_id, record.run.project, record.run.display_name) == (
                _run_id(folder),
                "stillroom",
                "one",
            )
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert config.items() >= CONFIG.items()
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if name in found:
                found[name][record.history.step.num] = json.loads(item.value_json)
    assert found == {name: dict(pairs + [(step + 2, v) for step, v in pairs]) for name, pairs in LOGGED.items()}


# --- Trackio ---------------------------------------------------------------------------------------------------------


def test_trackio_holds_every_value_of_a_run_and_of_its_resume(folder):
    need("trackio")
    for offset in (0, 2):
        tracker = track(["trackio"], folder, CONFIG)
        tracker.log({"train/loss_nats": 1.8125, "train/learning_rate": 0.03125}, 1 + offset)
        tracker.log({"train/loss_nats": 1.4375}, 2 + offset)
        tracker.log({"held_out/loss_nats": 1.6875}, 2 + offset)
        tracker.close()
    utils = sys.modules["trackio.utils"]
    database = sqlite3.connect(Path(utils.TRACKIO_DIR) / "stillroom.db")  # the folder is fixed when trackio is imported
    rows = database.execute(
        "select run_id, step, metrics from metrics where run_name = ? order by id", [_run_id(folder)]
    )
    rows = [(run, step, json.loads(metrics)) for run, step, metrics in rows.fetchall()]
    [(config,)] = database.execute("select config from configs where run_name = ?", [_run_id(folder)]).fetchall()
    database.close()
    assert [(step, metrics) for _, step, metrics in rows][-6:] == [
        (1, {"train/loss_nats": 1.8125, "train/learning_rate": 0.03125}),
        (2, {"train/loss_nats": 1.4375}),
        (2, {"held_out/loss_nats": 1.6875}),
        (3, {"train/loss_nats": 1.8125, "train/learning_rate": 0.03125}),
        (4, {"train/loss_nats": 1.4375}),
        (4, {"held_out/loss_nats": 1.6875}),
    ]
    assert len({run for run, *_ in rows[-6:]}) == 1
    assert json.loads(config).items() >= CONFIG.items()


# --- MLflow ----------------------------------------------------------------------------------------------------------


def mlflow_runs(folder: Path) -> list[dict[str, list[tuple[int, float]]]]:
    """The metrics of each run, from the lines `time value step` of MLflow's own files."""
    runs = []
    for run in sorted(p.parent for p in (folder.parents[1] / "mlruns").glob("*/*/metrics")):
        found = {}
        for file in (p for p in (run / "metrics").rglob("*") if p.is_file()):
            lines = [line.split() for line in file.read_text().splitlines()]
            found[str(file.relative_to(run / "metrics"))] = sorted((int(line[2]), float(line[1])) for line in lines)
        runs.append(found)
    return runs


def test_mlflow_holds_every_value(folder):
    need("mlflow")
    tracker = track(["mlflow"], folder, CONFIG)
    log_all(tracker)
    tracker.close()
    assert mlflow_runs(folder) == [LOGGED]
    [name] = (folder.parents[1] / "mlruns").rglob("mlflow.runName")
    assert name.read_text() == _run_id(folder)
    [config] = (folder.parents[1] / "mlruns").rglob("config.json")
    assert json.loads(config.read_text()) == CONFIG


def test_mlflow_goes_on_with_the_same_run_after_a_resume(folder):
    need("mlflow")
    for step in (1, 2):
        tracker = track(["mlflow"], folder, CONFIG)
        tracker.log({"train/loss_nats": step / 8}, step)
        tracker.close()
    assert mlflow_runs(folder) == [{"train/loss_nats": [(1, 0.125), (2, 0.25)]}]


def test_mlflow_works_as_its_extra_installs_it(folder, monkeypatch):
    """No server and no settings of MLflow's own: the values land somewhere on this machine."""
    need("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    tracker = track(["mlflow"], folder, CONFIG)
    log_all(tracker)
    tracker.close()


# --- several ---------------------------------------------------------------------------------------------------------


def test_several_trackers_all_get_every_value(folder):
    need("tensorboard")
    need("mlflow")
    tracker = track(["tensorboard", "mlflow"], folder, CONFIG)
    log_all(tracker)
    tracker.close()
    assert tensorboard_scalars(folder) == LOGGED
    assert mlflow_runs(folder) == [LOGGED]

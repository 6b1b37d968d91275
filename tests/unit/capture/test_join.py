"""Join: the parts of a capture become the store of one, and what is missing, double or of another capture is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.capture import run as module
from stillroom.capture import signals
from stillroom.capture.config import CaptureConfig
from stillroom.capture.parts import join
from stillroom.capture.run import run
from stillroom.capture.signals import SignalCapture
from stillroom.config import load
from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, StillroomError, StorageError
from stillroom.runs import read_json
from stillroom.store.check import check
from stillroom.store.reader import Store

from .test_workers import contents, part

Capture = Callable[..., Path]


@pytest.fixture(scope="module")
def capture(saved_model, text_files: Path, tmp_path_factory) -> Capture:
    """Captures in windows of four documents into a folder, of which each test takes a copy."""
    cache = tmp_path_factory.mktemp("cache")

    def go(out: Path, *words: str, **flags: Any) -> Path:
        given = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
                 "data.format=text", "data.length=32", f"data.cache={cache}", f"out={out}", *words]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signals, "WINDOW_DOCUMENTS", 4)
            run(load(CaptureConfig, None, given), **flags)
        return out

    return go


@pytest.fixture(scope="module")
def whole(capture: Capture, tmp_path_factory) -> Store:
    return Store(capture(tmp_path_factory.mktemp("whole") / "out") / "store")


@pytest.fixture(scope="module")
def three(capture: Capture, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("three") / "out"
    for index in range(3):
        capture(out, part(index, 3), "shard_positions=100")
    return out


@pytest.fixture
def parts(three: Path, tmp_path: Path) -> Path:
    """The folder of three parts that are done."""
    return Path(shutil.copytree(three, tmp_path / "out"))


def folder(out: Path, index: int, of: int = 3) -> Path:
    return out / f"part-{index:04d}-of-{of:04d}"


def refused(kind: type[StillroomError], what: str, *places: Path, **flags: Any) -> StillroomError:
    """What a join says that is refused, and writes nothing."""
    before = sorted(places[0].rglob("*"))
    with pytest.raises(kind, match=what) as raised:
        join(places, **flags)
    assert sorted(places[0].rglob("*")) == before
    return raised.value


def test_joined_parts_say_what_one_capture_says(parts, whole):
    path, manifest = join([parts])
    assert path == parts / "store"
    assert check(path).problems == []
    joined = Store(path)
    assert contents(joined) == contents(whole)
    free = {"shards", "codec_error_nats"}  # which differ by where shards end, and by how a mean is rounded
    assert manifest.model_dump(exclude=free) == whole.manifest.model_dump(exclude=free)
    assert manifest.codec_error_nats == pytest.approx(whole.manifest.codec_error_nats)
    for index in range(3):
        assert Store(folder(parts, index) / "store").manifest.complete
    with pytest.raises(StorageError, match="exists"):
        join([parts])
    assert join([parts], overwrite=True)[1].shards == manifest.shards


def test_parts_from_several_folders_are_joined_and_deleted_on_demand(parts, whole, tmp_path):
    places = [Path(shutil.move(folder(parts, i), tmp_path / f"machine-{i}")) for i in range(2)]
    refused(ConfigError, "not said where", parts, *places)
    path, _ = join([*places, parts], tmp_path / "joined", keep_parts=False)
    assert contents(Store(path)) == contents(whole)
    left = [sorted(p.name for p in place.iterdir() if p.name != ".lock") for place in (*places, folder(parts, 2))]
    assert left == [["run.json"]] * 3


def test_a_part_that_is_missing_is_named_with_the_command_that_captures_it(parts):
    shutil.rmtree(folder(parts, 1))
    error = refused(MissingError, "part 1 of 3 is missing", parts)
    assert f'`stillroom capture RECIPE "part={{index: 1, of: 3}}" out={parts} --resume`' in error.fix
    shutil.rmtree(folder(parts, 2))
    error = refused(MissingError, "2 of 3 parts are not done", parts)
    assert error.values == {"part 1": "missing", "part 2": "missing"}


def test_a_part_that_is_not_finished_is_named_and_goes_on_alone(capture, parts, whole, monkeypatch):
    say, calls = SignalCapture.capture, []

    def fail(self: SignalCapture, documents: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the power is out")
        return say(self, documents)

    words = (part(2, 3), "shard_positions=50")
    with monkeypatch.context() as patch:
        patch.setattr(SignalCapture, "capture", fail)
        with pytest.raises(OSError, match="the power is out"):
            capture(parts, *words, overwrite=True)
    error = refused(MissingError, "part 2 of 3 is not finished", parts)
    assert error.values == {"part 2": "failed"}
    (folder(parts, 1) / "run.json").unlink()  # killed before it wrote any
    assert "not begun" in str(refused(MissingError, "2 of 3 parts are not done", parts))
    shutil.rmtree(folder(parts, 1))
    capture(parts, part(1, 3), resume=True)
    capture(parts, *words, resume=True)
    assert contents(Store(join([parts])[0])) == contents(whole)


@pytest.mark.parametrize(
    ("words", "key", "values"),
    [
        (["seed=1"], "seed", [0, 1]),
        (["teacher.engine={kind: transformers, dtype: bfloat16}"], "teacher.engine.dtype", ["float32", "bfloat16"]),
        (["data.max_documents=23"], "data.max_documents", [None, 23]),
    ],
    ids=str,
)
def test_a_part_of_another_capture_is_named(capture, parts, words, key, values):
    capture(parts, part(1, 3), *words, overwrite=True)
    error = refused(MismatchError, f"part 0 of 3 and part 1 of 3 were captured with different {key}", parts)
    assert error.values == dict(zip(("part 0", "part 1"), values, strict=True))


def test_another_teacher_is_told_by_its_weights_and_not_by_its_name(capture, parts, saved_model, tmp_path, whole):
    same = Path(shutil.copytree(saved_model("llama", seed=2), tmp_path / "copy"))
    capture(parts, part(1, 3), f"teacher.model={same}", overwrite=True)
    assert contents(Store(join([parts])[0])) == contents(whole)
    shutil.rmtree(parts / "store")
    capture(parts, part(1, 3), f"teacher.model={saved_model('llama', seed=5)}", overwrite=True)
    refused(MismatchError, "the stores differ in their teacher", parts)


def test_parts_that_are_there_twice_or_of_two_divisions(capture, parts, tmp_path):
    copy = Path(shutil.copytree(folder(parts, 1), tmp_path / "copy"))
    error = refused(MismatchError, "part 1 of 3 is there twice", parts, copy, out=tmp_path / "x")
    assert set(error.values.values()) == {copy, folder(parts, 1)}
    capture(parts, part(0, 2))
    error = refused(MismatchError, "parts of different numbers of workers", parts)
    assert error.values == {"part 0 of 2": folder(parts, 0, 2), "part 2 of 3": folder(parts, 2)}


def test_documents_that_are_there_twice_or_missing(capture, parts, monkeypatch):
    """As where one worker ran a version that divides the data another way."""
    taken = module.part_range
    for more, what in ((4, "is in the parts twice"), (-4, "do not hold the documents")):

        def shifted(*of: Any, more: int = more) -> tuple[int, int]:
            first, stop = taken(*of)
            return first - more, stop

        with monkeypatch.context() as patch:
            patch.setattr(module, "part_range", shifted)
            capture(parts, part(1, 3), overwrite=True)
        refused(MismatchError, what, parts)


def test_a_damaged_part_is_found_and_nothing_is_left(parts):
    file = folder(parts, 1) / "store" / "00000.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(DataError, "is damaged", parts)


def test_folders_that_hold_no_parts(capture, parts, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(MissingError, "there are no parts of a capture", tmp_path / "empty")
    refused(ConfigError, "was not divided", capture(tmp_path / "one"))
    values = read_json(folder(parts, 0) / "run.json")
    for other in ({"config": {"steps": 3}, "status": "done"}, [1], {**values, "config": None}):
        (folder(parts, 0) / "run.json").write_text(json.dumps(other))
        refused(DataError, "does not hold a part of a capture", parts)

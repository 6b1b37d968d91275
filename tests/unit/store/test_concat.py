"""Concat: the parts of a capture, and stores of different data, become one store."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, StillroomError, StorageError
from stillroom.store.check import check
from stillroom.store.concat import concat
from stillroom.store.config import side_columns
from stillroom.store.format import MANIFEST, SourceInfo
from stillroom.store.reader import Store
from stillroom.store.writer import new_store

from .stores import EVERY, equal, files, signal_of
from .whole import make_store


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    return lambda name, kind="head_and_sample", **settings: make_store(
        tmp_path / name, tiny_tokenizer, kind, **settings
    )


def source(name: str) -> SourceInfo:
    return SourceInfo(name=name, fingerprint=f"print of {name}")


def says_the_same(merged: Store, stores: list[Store], order: list[tuple[int, int]], numbers: list[int] | None = None):
    """Whether the new store's documents are these (store, row) in this order."""
    assert len(merged) == len(order)
    for i, (number, row) in enumerate(order):
        store = stores[number]
        assert np.array_equal(merged.tokens(i), store.tokens(row))
        assert np.array_equal(merged.loss_mask(i), store.loss_mask(row))
        assert equal(signal_of(merged, i), signal_of(store, row))
        assert merged.document(i) == (store.document(row) if numbers is None else numbers[i])


@pytest.mark.parametrize("kind", EVERY)
def test_parts_in_any_order_become_one_store_whose_shards_are_copied(kind, make, tmp_path):
    paths = [make(f"p{i}", kind, said=i, first=100 * i, part=(i, 3)) for i in range(3)]
    merged = concat([paths[2], paths[0], paths[1]], tmp_path / "out")
    stores = [Store(path) for path in paths]
    assert merged.part == (0, 1)
    assert merged.data == stores[0].manifest.data
    assert merged.merged == ()
    assert merged.complete
    says_the_same(Store(tmp_path / "out"), stores, [(i, row) for i in range(3) for row in range(8)])
    copied = files_of_shards(tmp_path / "out")
    assert copied == [data for path in paths for data in files_of_shards(path)]
    assert check(tmp_path / "out").problems == []


def files_of_shards(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(path.iterdir()) if file.suffix in (".arrow", ".tables")]


@pytest.mark.parametrize("kind", EVERY)
def test_parts_that_alternate_are_put_in_the_order_of_the_data(kind, make, tmp_path):
    paths = [make(f"p{i}", kind, said=i, first=i, part=(i, 2)) for i in range(2)]
    stores = [Store(path) for path in paths]
    merged = concat(paths, tmp_path / "out")
    says_the_same(Store(tmp_path / "out"), stores, [(i, row) for row in range(8) for i in range(2)])
    assert merged.codec_error_nats == pytest.approx(np.mean([s.manifest.codec_error_nats for s in stores]))
    assert check(tmp_path / "out").problems == []


@pytest.mark.parametrize("kind", EVERY)
def test_other_data_is_put_behind_and_numbered_anew(kind, make, tmp_path):
    paths = [make(f"s{i}", kind, said=i, data=source(f"data{i}"), length=64 + i) for i in range(2)]
    stores = [Store(path) for path in paths]
    merged = concat(paths, tmp_path / "out")
    first = [stores[0].document(row) for row in range(8)]
    numbers = first + [max(first) + 1 + stores[1].document(row) for row in range(8)]
    says_the_same(Store(tmp_path / "out"), stores, [(i, row) for i in range(2) for row in range(8)], numbers)
    assert merged.data.name == "data0 + data1"
    assert merged.merged == (source("data0"), source("data1"))
    assert merged.data.fingerprint not in [s.manifest.data.fingerprint for s in stores]
    assert merged.length == 65
    assert merged.entries == sum(s.manifest.entries for s in stores)
    assert check(tmp_path / "out").problems == []


def test_the_fingerprint_of_merged_data_tells_their_order(make, tmp_path):
    paths = [make(f"s{i}", said=i, data=source(f"data{i}")) for i in range(2)]
    one, other = concat(paths, tmp_path / "one"), concat(paths[::-1], tmp_path / "other")
    assert one.data.fingerprint != other.data.fingerprint


def test_an_empty_part(make, tmp_path):
    paths = [make("p0", part=(0, 2)), make("p1", lengths=(), part=(1, 2))]
    assert concat(paths, tmp_path / "out").documents == 8
    assert check(tmp_path / "out").problems == []


DIFFERENT = {
    "teacher": {"teacher": source("another")},
    "engine": {"engine": "vllm"},
    "tokenizer": {"tokenizer": source("another")},
    "template": {"template": "ab"},
    "num_columns": {"num_columns": 305},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_stores_that_do_not_fit_are_refused(name, make, tmp_path):
    paths = [make("a"), make("b", data=source("b"), **DIFFERENT[name])]
    refused(paths, tmp_path, MismatchError, f"the stores differ in their {name}")


@pytest.mark.parametrize(
    ("change", "where", "values"),
    [
        ({"kind": "top_p"}, "signal.kind", ["top_k", "top_p"]),
        ({"label": False}, "signal.label", [True, False]),
        ({"temperatures": (2.0, 4.0)}, "signal.temperatures", [[2.0], [2.0, 4.0]]),
    ],
    ids=str,
)
def test_other_signals_are_refused_by_the_first_setting_that_differs(change, where, values, make, tmp_path):
    a = make("a", "top_k")
    signal = Store(a).signal_config.model_copy(update=change)
    kind = change.get("kind", "top_k")
    settings = {} if "kind" in change else {"signal": signal, "side": tuple(side_columns(signal)), "lengths": ()}
    b = make("b", kind, data=source("b"), **settings)
    with pytest.raises(MismatchError, match=rf"the stores differ in their {where}\n") as raised:
        concat([a, b], tmp_path / "refused")
    assert raised.value.values == dict(zip(map(str, (a, b)), values, strict=True))


@pytest.mark.parametrize("name", ["data", "length", "seed"])
def test_parts_of_different_captures_are_refused(name, make, tmp_path):
    other = {"data": source("other"), "length": 65, "seed": 6}[name]
    paths = [make("a", part=(0, 2)), make("b", part=(1, 2), **{name: other})]
    refused(paths, tmp_path, MismatchError, f"the stores differ in their {name}")


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 3), (1, 3)],
        [(0, 2), (0, 2)],
        [(0, 1), (1, 2)],
        [(0, 2), (1, 3)],
        [(1, 2), (2, 2)],
        [(0, 2**50), (1, 2**50)],
    ],
    ids=str,
)
def test_parts_that_are_not_all_there_once_are_refused(parts, make, tmp_path):
    paths = [make(f"p{i}", part=part) for i, part in enumerate(parts)]
    refused(paths, tmp_path, MismatchError, "not all parts of one capture")


@pytest.mark.parametrize("first", [0, 3, 21, 1])
def test_a_document_that_is_in_two_parts_is_refused(first, make, tmp_path):
    """Documents 10, 13 … 31; the other part begins with 10, 13 or 31; or its stretch overlaps and shares none."""
    paths = [make("a", part=(0, 2)), make("b", first=first, part=(1, 2))]
    if first == 1:
        assert concat(paths, tmp_path / "out").documents == 16
        return
    with pytest.raises(MismatchError, match=f"document {10 + first} is in the parts twice") as raised:
        concat(paths, tmp_path / "out")
    assert raised.value.values == {f"part {i} of 2": str(path) for i, path in enumerate(paths)}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [15, 17])
def test_documents_that_are_missing_are_refused(number, make, tmp_path):
    paths = [make(f"p{i}", first=i, part=(i, 2)) for i in range(2)]
    with pytest.raises(MismatchError, match="do not hold the documents of the capture's data") as raised:
        concat(paths, tmp_path / "out", num_documents=number)
    assert raised.value.values == {"in the data": f"{number}, from 0", "in the parts": "16, and not document 0"}
    assert not (tmp_path / "out").exists()


def test_the_same_data_twice_is_refused(make, tmp_path):
    refused([make("a"), make("b")], tmp_path, MismatchError, "same data and seed")
    path = make("c")
    refused([path, path], tmp_path, ConfigError, "no two different stores")
    refused([path], tmp_path, ConfigError, "no two different stores")
    refused([], tmp_path, ConfigError, "no two different stores")


def test_an_incomplete_store_is_refused(make, tmp_path):
    refused([make("a"), make("b", complete=False)], tmp_path, DataError, "is not complete")


def test_a_store_that_is_not_there_is_refused(make, tmp_path):
    refused([make("a"), tmp_path / "nowhere"], tmp_path, MissingError, "is not a store")


def test_stores_without_a_tokenizer_are_refused(make, tmp_path):
    paths = [make(f"s{i}", data=source(f"{i}")) for i in range(2)]
    shutil.rmtree(paths[0] / "tokenizer")
    concat(paths, tmp_path / "one-is-enough")
    shutil.rmtree(paths[1] / "tokenizer")
    refused(paths, tmp_path, MissingError, "none of the stores has its tokenizer")


@pytest.mark.parametrize("name", ["00001.arrow", "00001.tables"])
@pytest.mark.parametrize("settings", [{"part": (1, 2), "first": 100}, {"data": source("b")}], ids=["parts", "data"])
def test_a_damaged_store_is_found_and_nothing_is_left(name, settings, make, tmp_path):
    first = {"part": (0, 2)} if "part" in settings else {}
    paths = [make("a", **first), make("b", said=1, **settings)]
    data = bytearray((paths[1] / name).read_bytes())
    data[len(data) // 2] ^= 4
    (paths[1] / name).write_bytes(data)
    refused(paths, tmp_path, DataError, "is damaged")


def test_out_that_exists(make, tmp_path):
    paths = [make(f"s{i}", data=source(f"{i}")) for i in range(2)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for overwrite in (False, True):
        with pytest.raises(StorageError):
            concat(paths, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "mine").exists()
    old = make("old")
    before = files(old / "tokenizer")
    with pytest.raises(StorageError, match="exists"):
        concat(paths, old)
    assert files(old / "tokenizer") == before
    assert concat(paths, old, overwrite=True).documents == 16
    assert check(old).problems == []
    for out in (paths[0], paths[0] / "x", tmp_path):
        with pytest.raises(ConfigError, match="`out` lies in"):
            concat(paths, out, overwrite=True)


def test_a_store_that_another_process_makes_is_refused_and_left_to_it(make, tmp_path):
    paths = [make("a", data=source("a")), make("b", data=source("b"))]
    with new_store(tmp_path / "out", overwrite=False) as folder:
        (folder / MANIFEST).write_text("of the first")
        for overwrite in (False, True):
            with pytest.raises(StorageError, match=r"another process makes the store .*out"):
                concat(paths, tmp_path / "out", overwrite=overwrite)
        assert (folder / MANIFEST).read_text() == "of the first"
    with pytest.raises(StorageError, match="exists"):
        concat(paths, tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_text() == "of the first"
    concat(paths, tmp_path / "out", overwrite=True)
    assert check(tmp_path / "out").problems == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_processes_that_make_a_store_at_once_none_spoils_anothers(overwrite, tmp_path):
    """One writes two files, between which the others try and are refused; what is there in the end is its alone."""
    out, (told, tell) = tmp_path / "out", os.pipe()
    for number in range(3):
        if not os.fork():
            code = 1
            signal.alarm(60)  # where several make it, each waits for the others to be refused
            try:
                with new_store(out, overwrite=overwrite) as folder:
                    for name in (MANIFEST, "00000.arrow"):
                        (folder / name).write_text(str(number))
                        assert os.read(told, 1) == b"."
                code = 0
            except StorageError as error:
                code = 2 if "another process" in error.what else 3
                os.write(tell, b".")
            finally:
                os._exit(code)
    assert sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)) == [0, 2, 2]
    assert len({(out / name).read_text() for name in (MANIFEST, "00000.arrow")}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def refused(paths: list[Path], tmp_path: Path, kind: type[StillroomError], what: str) -> None:
    """Fails unless a concatenation is refused and leaves nothing behind."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=what):
        concat(paths, tmp_path / "refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == before

"""StoreWriter: shards that are whole or absent, whatever happens to the writer."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.errors import DataError, MismatchError, StorageError
from stillroom.store.format import SourceInfo, read_manifest
from stillroom.store.reader import Store
from stillroom.store.writer import IDENTITY, StoreWriter

from .stores import (
    CONFIGS,
    EVERY,
    FULL,
    INT8,
    add,
    build_documents,
    build_manifest,
    change_manifest,
    equal,
    files,
    hidden_changes,
    says,
    verify,
    write,
)


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_of_signal_is_written_and_read_over_several_shards(kind, tmp_path):
    config = EVERY[kind]
    documents = build_documents(config)
    store = Store(write(tmp_path / "store", config, documents))
    assert len(store.shards) >= 3
    assert says(store, documents)
    assert store.manifest.complete
    assert store.signal_config == config


def test_the_manifest_counts_what_is_there(tmp_path):
    config = CONFIGS["head_and_sample"]
    documents = build_documents(config)
    writer = StoreWriter(tmp_path, build_manifest(config), shard_positions=10)
    with writer:
        add(writer, documents)
        manifest = writer.finish()
    signals = [d.signal for d in documents]
    assert manifest.documents == len(documents)
    assert manifest.positions == sum(map(len, signals))
    assert manifest.tokens == sum(len(d.tokens) for d in documents)
    assert manifest.entries == sum(len(s.ids) for s in signals)
    assert manifest.draws == sum(len(s.sample_ids) for s in signals)
    assert manifest.codec_error_nats == pytest.approx(sum(d.error_nats for d in documents) / manifest.positions)
    assert [shard.name for shard in manifest.shards] == [f"{i:05d}" for i in range(len(manifest.shards))]
    assert sum(shard.positions for shard in manifest.shards) == manifest.positions
    for shard in manifest.shards:
        assert shard.size_bytes == (tmp_path / f"{shard.name}.arrow").stat().st_size
        assert shard.tables_bytes == (tmp_path / f"{shard.name}.tables").stat().st_size
    assert len(manifest.shards) > 1
    assert read_manifest((tmp_path / "manifest.json").read_bytes(), tmp_path) == manifest


def test_the_same_documents_give_the_same_bytes(tmp_path):
    config = CONFIGS["head_and_sample"]
    documents = build_documents(config)
    a, b = (files(write(tmp_path / name, config, documents)) for name in "ab")
    assert a == b


@pytest.mark.parametrize("kind", ["full", "top_k"])
def test_documents_of_which_nothing_is_learnt_are_kept_too(kind, tmp_path):
    """Even a shard of nothing else."""
    config = EVERY[kind]
    documents = build_documents(config, (1, 1, 1))
    store = Store(write(tmp_path / "store", config, documents))
    assert says(store, documents)
    verify(store, 0)


def test_a_store_of_nothing(tmp_path):
    store = Store(write(tmp_path / "store", FULL, []))
    assert (len(store), len(store.shards), len(store.lengths)) == (0, 0, 0)


class Killed(BaseException):
    """The process ended here."""


class Killer:
    """Ends the writer at its n-th operation on files, before or after it; a file that was not synced yet is cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
        self.at, self.after, self.count = at, after, 0
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, operation):
        def wrapped(*arguments, **settings):
            self.count += 1
            now = self.count == self.at
            if now and not self.after:
                if operation is FSYNC and not os.path.isdir(f"/proc/self/fd/{arguments[0]}"):
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                raise Killed
            result = operation(*arguments, **settings)
            if now:
                raise Killed
            return result

        return wrapped


FSYNC = os.fsync


def capture(path: Path, config, documents, shard_positions: int = 10, **changes: Any) -> int:
    """What a capture does, the first time and when it is resumed; the number of documents that were there."""
    with StoreWriter(path, build_manifest(config, **changes), shard_positions=shard_positions) as writer:
        there = writer.num_documents
        add(writer, documents[there:])
        writer.finish()
    return there


def capture_killed(path: Path, config, documents, at: int, *, after: bool, **changes: Any) -> bool:
    """Whether it came to an end before it was killed."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        Killer(patch, at, after=after)
        try:
            capture(path, config, documents, **changes)
        except Killed:
            return False
        return True


@pytest.mark.parametrize(("kind", "after"), [("full", False), ("full", True), ("head_and_sample", False)])
def test_killed_between_any_two_operations_it_goes_on_from_the_last_whole_shard(kind, after, tmp_path):
    config = EVERY[kind]
    documents = build_documents(config, (9, 14, 20, 5))
    capture(tmp_path / "whole", config, documents)
    wanted = files(tmp_path / "whole")
    resumed = set()
    for at in range(1, 200):
        path = tmp_path / str(at)
        if capture_killed(path, config, documents, at, after=after):
            break
        resumed.add(capture(path, config, documents))
        assert files(path) == wanted, f"killed at operation {at}"
    else:
        pytest.fail("it was never done")
    assert at > 10
    assert len(resumed) >= 3  # with nothing there, with one shard, and with more


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    documents = build_documents(FULL, (9, 14, 20, 5))
    capture(tmp_path / "whole", FULL, documents)
    for at in range(1, 60):
        if capture_killed(tmp_path / "other", FULL, documents, 3 + at, after=bool(at % 2)):
            break
    assert files(tmp_path / "other") == files(tmp_path / "whole")


def test_what_a_killed_writer_left_is_deleted(tmp_path):
    path = write(tmp_path / "store", FULL, build_documents(FULL)[:4])
    wanted = files(path)
    for name in ("00099.arrow", "00099.tables", "00007.arrow.tmp", ".manifest.json.tmp"):
        (path / name).write_bytes(b"half")
    with StoreWriter(path, build_manifest(FULL), shard_positions=10):
        pass
    assert files(path) == wanted


@pytest.mark.parametrize("name", ["train.arrow", "notes.txt", "my.tables", "model.tmp"])
def test_what_no_writer_made_is_left_alone(name, tmp_path):
    """The folder may be a wrong one, with somebody's data in it."""
    (tmp_path / name).write_bytes(b"precious")
    write(tmp_path, FULL, build_documents(FULL)[:2])
    assert (tmp_path / name).read_bytes() == b"precious"


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    with StoreWriter(tmp_path, build_manifest(FULL)), pytest.raises(StorageError, match="another process writes"):
        StoreWriter(tmp_path, build_manifest(FULL))
    with StoreWriter(tmp_path, build_manifest(FULL)):
        pass


OTHER = {
    "teacher": SourceInfo(name="a teacher", fingerprint="12"),
    "engine": "vllm",
    "tokenizer": SourceInfo(name="a tokenizer", fingerprint="23"),
    "template": "abc",
    "data": SourceInfo(name="text.jsonl", fingerprint="34"),
    "part": (1, 2),
    "num_columns": 24,
    "length": 65,
    "signal": CONFIGS["top_p"].model_copy(update={"mass": 0.8}),
    "seed": 6,
}


def test_every_key_of_a_stores_identity_has_a_test():
    assert set(IDENTITY) == {*OTHER, "hidden"}


@pytest.mark.parametrize("name", [*OTHER, "hidden"])
def test_a_store_of_something_else_is_refused_and_left_as_it_is(name, tmp_path):
    config = CONFIGS["top_p"]
    path = write(tmp_path / "store", config, build_documents(config)[:3])
    (path / "00099.arrow").write_bytes(b"half")
    before = files(path)
    with pytest.raises(MismatchError, match=f"has another {name}"):
        StoreWriter(path, build_manifest(config, **hidden_changes(INT8) if name == "hidden" else {name: OTHER[name]}))
    assert files(path) == before
    with StoreWriter(path, build_manifest(config)):
        pass


@pytest.mark.parametrize("data", [b"", b"{", b'{"format": 99}', b"\xff\xfe"])
def test_a_broken_manifest_is_refused_and_the_folder_let_go(data, tmp_path):
    path = write(tmp_path / "store", FULL, build_documents(FULL)[:3])
    good = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(data)
    before = files(path)
    with pytest.raises(DataError) as refusal:
        StoreWriter(path, build_manifest(FULL))
    assert files(path) == before
    (path / "manifest.json").write_bytes(good)
    with StoreWriter(path, build_manifest(FULL)):
        pass
    assert str(path) in str(refusal.value)


def test_a_disk_that_is_full_is_an_error_of_the_users_and_nothing_is_lost(tmp_path, monkeypatch):
    documents = build_documents(FULL)
    with StoreWriter(tmp_path, build_manifest(FULL), shard_positions=10) as writer:
        add(writer, documents[:6])
        there = writer.num_documents
        assert there > 0

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match="could not be written"):
                add(writer, documents[6:])
    assert capture(tmp_path, FULL, documents) >= there
    assert says(Store(tmp_path), documents)


def test_versions_may_differ_when_a_capture_goes_on(tmp_path):
    documents = build_documents(FULL)
    with StoreWriter(tmp_path, build_manifest(FULL), shard_positions=10) as writer:
        add(writer, documents[:6])
    with StoreWriter(tmp_path, build_manifest(FULL, versions={"stillroom": "1"}), shard_positions=10) as writer:
        add(writer, documents[writer.num_documents :])
        writer.finish()
    assert says(Store(tmp_path), documents)


def test_a_document_whose_signal_does_not_fit_is_refused(tmp_path):
    d = build_documents(FULL)[0]
    with StoreWriter(tmp_path, build_manifest(FULL)) as writer, pytest.raises(AssertionError, match="kept positions"):
        writer.add(d.number, d.tokens, np.zeros(len(d.tokens), bool), d.signal)


def test_the_manifest_is_json_that_others_can_read(tmp_path):
    path = write(tmp_path / "store", CONFIGS["top_k"], build_documents(CONFIGS["top_k"]))
    values = json.loads((path / "manifest.json").read_text("utf-8"))
    assert values["format"] == 1
    assert values["signal"]["k"] == 6
    change_manifest(path, lambda _: None)
    assert equal(Store(path).levels([0]), build_documents(CONFIGS["top_k"])[0].signal)

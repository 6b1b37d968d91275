"""Store: any row by itself, the same from everywhere, and a clear error for whatever is damaged or hostile."""

import numpy as np
import pyarrow as pa
import pytest

from stillroom.errors import DataError, MissingError
from stillroom.store.codec import Codec
from stillroom.store.quantize import LogProbCodes
from stillroom.store.reader import Store
from stillroom.store.writer import StoreWriter

from .stores import (
    CONFIGS,
    EVERY,
    build_documents,
    build_manifest,
    equal,
    read_table,
    says,
    verify,
    write,
)

DEFAULT = CONFIGS["head_and_sample"]


@pytest.mark.parametrize("kind", ["top_k", "head_and_sample", "full"])
def test_rows_in_any_order_are_what_they_are_one_by_one(kind, folders):
    documents = build_documents(EVERY[kind])
    store = Store(folders[kind])
    order = [7, 0, 6, 3, 3, 1, 5, 0, 2, 4]
    if kind == "full":
        assert np.array_equal(store.logits(order), np.concatenate([documents[i].signal for i in order]))
        return
    assert equal(store.levels(order), LogProbCodes.concatenate([documents[i].signal for i in order]))
    for few in ([1, 0], [5, 5], [6]):
        assert equal(store.levels(few), LogProbCodes.concatenate([documents[i].signal for i in few]))


def test_lengths_names_and_what_is_learnt(folders):
    documents, store = build_documents(DEFAULT), Store(folders["head_and_sample"])
    assert store.lengths.tolist() == [len(d.tokens) for d in documents]
    assert store.counts["documents"] == len(store) == len(documents)
    assert "document 3" in store.name(3)
    for i, d in enumerate(documents):
        target_mask = store.target_mask(i)
        assert target_mask[1:].tolist() == d.loss_mask[:-1].tolist()
        assert not target_mask[0]


@pytest.mark.parametrize("index", [-1, -9, 8, 1000])
def test_a_row_that_is_not_there_is_refused(index, folders):
    store = Store(folders["head_and_sample"])
    for ask in (
        store.tokens,
        store.loss_mask,
        store.document,
        lambda i: store.levels([i]),
        lambda i: store.levels([0, i]),
    ):
        with pytest.raises(IndexError):
            ask(index)
    with pytest.raises(IndexError):
        Store(folders["full"]).logits([index])


def test_one_row_is_read_without_decoding_others(folders, monkeypatch):
    decoded = []
    decode = Codec.decode

    def counting(self, rows, tokens, offsets):
        decoded.append(len(rows))
        return decode(self, rows, tokens, offsets)

    monkeypatch.setattr(Codec, "decode", counting)
    store = Store(folders["head_and_sample"])
    assert equal(store.levels([4]), build_documents(DEFAULT)[4].signal)
    assert decoded == [1]


def test_a_damaged_row_does_not_hide_the_others(copy):
    path, documents = copy(), build_documents(DEFAULT)
    table = read_table(path)
    signal = table["signal"][0].as_py()
    data = (path / "00000.arrow").read_bytes()
    assert data.count(signal) == 1
    (path / "00000.arrow").write_bytes(data.replace(signal, bytes(b ^ 1 for b in signal)))
    store = Store(path)
    for i in range(1, len(store)):
        assert equal(store.levels([i]), documents[i].signal)
    for ask in (lambda: store.levels([0]), lambda: store.levels([5, 0]), lambda: verify(store, 0)):
        with pytest.raises(DataError, match="is damaged"):
            ask()


@pytest.mark.parametrize("kind", ["head_and_sample", "full"])
def test_an_address_reads_as_the_folder_does(kind, folders):
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        for file in folders[kind].iterdir():
            memory.pipe_file(f"/some/{kind}/{file.name}", file.read_bytes())
        store = Store(f"memory://some/{kind}")
        assert says(store, build_documents(EVERY[kind]))
        assert store.fingerprint == Store(folders[kind]).fingerprint
        for number in range(len(store.shards)):
            verify(store, number)
        memory.rm_file(f"/some/{kind}/00001.arrow")
        with pytest.raises(MissingError, match="lacks a file"):
            Store(f"memory://some/{kind}")
        with pytest.raises(MissingError, match="is not a store"):
            Store("memory://nowhere")
    finally:
        memory.store.clear()


def test_the_fingerprint_tells_two_stores_apart(tmp_path, folders):
    documents = build_documents(DEFAULT)
    same = Store(write(tmp_path / "same", DEFAULT, documents, versions={"stillroom": "9"}))
    assert same.fingerprint == Store(folders["head_and_sample"]).fingerprint
    others = [
        write(tmp_path / "seed", DEFAULT, documents, seed=6),
        write(tmp_path / "other", DEFAULT, build_documents(DEFAULT, seed=1)),
        write(tmp_path / "fewer", DEFAULT, documents[:-1]),
    ]
    assert len({same.fingerprint, *(Store(path).fingerprint for path in others)}) == 4


def test_an_incomplete_store_is_read_only_where_that_is_asked_for(tmp_path):
    documents = build_documents(DEFAULT)
    with StoreWriter(tmp_path, build_manifest(DEFAULT), shard_positions=10) as writer:
        for d in documents[:6]:
            writer.add(d.number, d.tokens, d.loss_mask, d.signal, d.error_nats)
        there = writer.num_documents
    with pytest.raises(DataError, match="is not complete"):
        Store(tmp_path)
    assert says(Store(tmp_path, partial=True), documents[:there])


@pytest.mark.parametrize("columns", [2**16, 2**16 + 1])
def test_token_ids_of_small_and_large_vocabularies(columns, tmp_path):
    config = CONFIGS["top_k"]
    documents = build_documents(config, (4, 6), columns=columns)
    documents[0].tokens[:] = columns - 1
    path = write(tmp_path / "store", config, documents, num_columns=columns)
    assert says(Store(path), documents)
    kind = read_table(path).schema.field("tokens").type.value_type
    assert kind == (pa.uint16() if columns == 2**16 else pa.uint32())


def test_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(MissingError, match="is not a store"):
            Store(path)

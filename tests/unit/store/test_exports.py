"""Export: plain columns that say what the store says."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.errors import DataError, StorageError
from stillroom.store import show as module
from stillroom.store.format import METADATA, synced_file
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store
from stillroom.store.show import export

from .stores import EVERY
from .whole import make_store


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> dict[str, Store]:
    return {kind: Store(make_store(tmp_path_factory.mktemp(kind) / "s", tiny_tokenizer, kind)) for kind in EVERY}


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
@pytest.mark.parametrize("kind", EVERY)
def test_every_row_is_what_the_store_says(kind, at_once, made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", at_once)
    store, out = made[kind], tmp_path / "out.parquet"
    assert export(store, out) == out.stat().st_size
    rows = pq.read_table(out).to_pylist()
    assert [row["document"] for row in rows] == [store.document(i) for i in range(len(store))]
    for i, row in enumerate(rows):
        assert row["tokens"] == store.tokens(i).tolist()
        assert row["keep"] == store.loss_mask(i).tolist()
        ids, log_probs = expected(store, i)
        assert row["ids"] == ids
        assert len(row["ids"]) == sum(row["keep"])
        for found, wanted in zip(row["log_probs"], log_probs, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def expected(store: Store, i: int) -> tuple[list[list[int]], list[np.ndarray]]:
    if store.signal_config.kind == "full":
        logits = store.logits([i]).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-log_probs, kind="stable", axis=-1)
        return order.tolist(), list(np.take_along_axis(log_probs, order, -1))
    levels = store.levels([i])
    sparse = to_sparse(levels, store.signal_config)
    counts, targets = (levels.counts + levels.sample_counts).tolist(), sparse.log_targets()[0].numpy()
    return [sparse.ids[p, :n].tolist() for p, n in enumerate(counts)], [targets[p, :n] for p, n in enumerate(counts)]


def test_truncated_entries_and_their_rest_sum_to_1(made, tmp_path):
    export(made["top_k"], tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    masses = [np.exp(entries).sum() for row in rows for entries in row["log_probs"]]
    rests = [np.exp(rest) for row in rows for rest in row["log_rest"]]
    assert len(masses) == 46
    np.testing.assert_allclose(np.add(masses, rests), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("full", []),
        ("top_p", ["log_rest"]),
        ("top_k", ["log_rest", "log_rest@2.0", "entropy", "label_log_prob"]),
        ("sampled", ["entropy", "label_log_prob"]),
        ("head_and_sample", ["entropy"]),
    ],
)
def test_columns(kind, names, made, tmp_path):
    export(made[kind], tmp_path / "out.parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["document", "tokens", "keep", "ids", "log_probs", *names]
    notes = json.loads(schema.metadata[METADATA])
    assert notes["signal"]["kind"] == made[kind].signal_config.kind
    assert notes["shards"] == []


def test_a_file_that_exists_is_refused_and_overwritten_where_asked(made, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_bytes(b"mine")
    with pytest.raises(StorageError, match="exists"):
        export(made["top_k"], out)
    assert out.read_bytes() == b"mine"
    export(made["top_k"], out, overwrite=True)
    assert pq.read_table(out).num_rows == 8
    with pytest.raises(StorageError, match="exists"):
        export(made["top_k"], tmp_path, overwrite=True)


def test_a_file_that_another_process_writes_is_refused_and_left_to_it(tmp_path, tiny_tokenizer):
    store, out = Store(make_store(tmp_path / "store", tiny_tokenizer)), tmp_path / "out.parquet"
    with synced_file(out) as file:
        file.write(b"of the first")
        with pytest.raises(StorageError, match=r"another process writes .*out\.parquet"):
            export(store, out)
    assert out.read_bytes() == b"of the first"
    with pytest.raises(StorageError, match="exists"):
        export(store, out)
    assert out.read_bytes() == b"of the first"
    out.with_name("out.parquet.tmp").write_bytes(b"of one that was killed")
    export(store, out, overwrite=True)
    assert pq.read_table(out).num_rows == len(store)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "store"]


def test_nothing_is_left_of_an_export_that_fails(tmp_path, tiny_tokenizer):
    path = make_store(tmp_path / "store", tiny_tokenizer)
    data = bytearray((path / "00001.tables").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "00001.tables").write_bytes(data)
    out = tmp_path / "out.parquet"
    out.write_bytes(b"mine")
    with pytest.raises(DataError, match="damaged"):
        export(Store(path), out, overwrite=True)
    assert out.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tmp") == []

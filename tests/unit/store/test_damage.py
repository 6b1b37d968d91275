"""Store: a clear error for whatever is damaged or hostile, and never another signal."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stillroom.data.dataloader import collate
from stillroom.errors import DataError, MissingError
from stillroom.store.check import check
from stillroom.store.config import Full
from stillroom.store.format import MOST_MANIFEST_BYTES, row_crc32, schema
from stillroom.store.quantize import LogProbCodes, to_sparse
from stillroom.store.reader import Store
from stillroom.store.show import show_row

from .stores import (
    COLUMNS,
    CONFIGS,
    EVERY,
    Document,
    arrow_bytes,
    build_documents,
    change_manifest,
    equal,
    read_table,
    replace_file,
    signal_of,
    verify,
    write,
)

DEFAULT = CONFIGS["head_and_sample"]


def read_all(path: Path | str) -> None:
    """Everything that a store is asked for."""
    store = Store(path)
    for i in range(len(store)):
        signal_of(store, i)
        store.hidden([i])
        store.tokens(i), store.loss_mask(i), store.document(i), store.target_mask(i), store.signal_bytes(i)
    assert len(store.lengths) == len(store)
    for number in range(len(store.shards)):
        verify(store, number)


@pytest.mark.parametrize("name", ["00000.arrow", "00001.tables"])
def test_a_missing_file(name, copy):
    path = copy()
    (path / name).unlink()
    with pytest.raises(MissingError, match="lacks a file") as refusal:
        read_all(path)
    assert name in str(refusal.value)


@pytest.mark.parametrize("name", ["00000.arrow", "00001.tables", "manifest.json"])
@pytest.mark.parametrize("size_is_known", [False, True])
def test_an_empty_file_is_told_as_such(name, size_is_known, copy):
    path = copy()
    if size_is_known and name != "manifest.json":
        replace_file(path, name, b"")
    (path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} of the store .* is empty\n") as raised:
        read_all(path)
    assert raised.value.why.startswith("Its writing was interrupted before anything reached the disk")
    assert raised.value.what in [problem.what for problem in check(path).problems]


@pytest.mark.parametrize("kind", ["head_and_sample", "full"])
@pytest.mark.parametrize("name", ["00000.arrow", "00001.tables", "manifest.json"])
@pytest.mark.parametrize("size_is_known", [False, True])
def test_a_truncated_file(kind, name, size_is_known, copy):
    """Also where the manifest was made to fit."""
    path = copy(kind)
    data = (path / name).read_bytes()
    for size in sorted({0, 1, 7, len(data) // 3, len(data) // 2, len(data) - 1, len(data) - 10}):
        if not 0 <= size < len(data):
            continue
        if size_is_known and name != "manifest.json":
            replace_file(path, name, data[:size])
        else:
            (path / name).write_bytes(data[:size])
        if name == "manifest.json" and data[:size].strip() == data.strip():
            continue
        with pytest.raises(DataError):
            read_all(path)


def tiny(path: Path, kind: str) -> Path:
    return write(path, EVERY[kind], build_documents(EVERY[kind], (4, 3), columns=5), num_columns=5)


def contents(path: Path, documents: list[Document]) -> tuple:
    """All that a reader learns, the signals first, which are checked."""
    store = Store(path)
    rows = range(len(store))
    if isinstance(store.signal_config, Full):
        signal: LogProbCodes | np.ndarray = store.logits(rows)
        read = signal.tolist()
        wanted: LogProbCodes | np.ndarray = np.concatenate([d.signal for d in documents])
    else:
        signal = store.levels(rows)
        sparse = to_sparse(signal, store.signal_config)
        read = [sparse.ids.tolist(), sparse.log_probs.tolist()]
        wanted = LogProbCodes.concatenate([d.signal for d in documents])
    assert equal(signal, wanted)
    found = [(store.document(i), store.tokens(i).tolist(), store.loss_mask(i).tolist()) for i in rows]
    assert found == [(d.number, d.tokens.tolist(), d.loss_mask.tolist()) for d in documents]
    return store.manifest, store.lengths.tolist(), read


def check_flips(path: Path, name: str, documents: list[Document], *, every: int = 1) -> int:
    """Reads the store with one bit of a file flipped after another: an error of ours, or the same content.

    How many errors there were.
    """
    wanted, data, errors = contents(path, documents), bytearray((path / name).read_bytes()), 0
    wrong = []
    for bit in range(0, 8 * len(data), every):
        data[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(data)
        try:
            found = contents(path, documents)
            if found != wanted:
                wrong.append((bit // 8, bit % 8, "other content"))
        except (DataError, MissingError):
            errors += 1
        except Exception as error:
            wrong.append((bit // 8, bit % 8, repr(error)[:120]))
        data[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(data)
    assert not wrong, f"{len(wrong)} of {8 * len(data)} flips, such as {wrong[:: max(1, len(wrong) // 8)]}"
    return errors


@pytest.mark.parametrize(("kind", "every"), [("head_and_sample", 5), ("full", 11)])
def test_flipped_bits_of_an_arrow_file(kind, every, tmp_path):
    """Every bit takes too long; with an odd step all places within a byte come in turn."""
    path = tiny(tmp_path / "store", kind)
    documents = build_documents(EVERY[kind], (4, 3), columns=5)
    assert check_flips(path, "00000.arrow", documents, every=every) > 100


READS: dict[str, Callable[[Store], object]] = {
    "tokens": lambda store: store.tokens(0),
    "loss_mask": lambda store: store.loss_mask(0),
    "target_mask": lambda store: store.target_mask(0),
    "document": lambda store: store.document(0),
    "hard labels": lambda store: collate(store, [np.array([0])], 0),
    "show": lambda store: show_row(store, 0, str),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("column", ["document", "tokens", "keep"])
def test_what_is_read_without_the_signal_is_checked(column, read, copy):
    """Training on hard labels asks for no signal, and yet takes what a row says."""
    path = copy()
    values = read_table(path)[column][0]
    old = np.array([values.as_py()], np.int64).tobytes() if column == "document" else None
    if column == "tokens":
        old = np.array(values.as_py(), np.uint16).tobytes()
    data = (path / "00000.arrow").read_bytes()
    if old is None:  # its bits are told from others by another value for the row
        table = read_table(path)
        keep = [[not first, *others] for first, *others in table["keep"].to_pylist()]
        changed = pa.array(keep, table.schema.field("keep").type)
        data = arrow_bytes(table.set_column(2, table.schema.field("keep"), changed))
        replace_file(path, "00000.arrow", data)
    else:
        assert data.count(old) == 1
        (path / "00000.arrow").write_bytes(data.replace(old, bytes([old[0] ^ 1]) + old[1:]))
    with pytest.raises(DataError, match=r"checksum of 00000\.arrow row 0"):
        READS[read](Store(path))


def test_other_lengths_are_told_before_a_row_is_read(copy):
    path = copy()
    change_manifest(path, lambda values: values.update(tokens=values["tokens"] + 1))
    with pytest.raises(DataError, match="tokens: found"):
        _ = Store(path).lengths


def test_flipped_bits_of_the_tables(tmp_path):
    path = tiny(tmp_path / "store", "top_k")
    documents = build_documents(EVERY["top_k"], (4, 3), columns=5)
    errors = check_flips(path, "00000.tables", documents, every=5)
    assert errors == len(range(0, 8 * (path / "00000.tables").stat().st_size, 5))


def test_flipped_bits_of_the_manifest(tmp_path):
    """A step of 0.3 where it was 0.1 would be another teacher."""
    path = tiny(tmp_path / "store", "head_and_sample")
    documents = build_documents(EVERY["head_and_sample"], (4, 3), columns=5)
    assert check_flips(path, "manifest.json", documents, every=3) > 100


@pytest.mark.parametrize("kind", ["head_and_sample", "full"])
@pytest.mark.parametrize("name", ["00000.arrow", "00000.tables"])
def test_flipped_bits_are_all_found_by_verify(kind, name, tmp_path):
    path = tiny(tmp_path / "store", kind)
    verify(Store(path), 0)
    data = (path / name).read_bytes()
    for bit in range(0, 8 * len(data), 101):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(damaged)
        with pytest.raises(DataError):
            verify(Store(path), 0)


HOSTILE: dict[str, Callable[[dict], object]] = {
    "negative documents": lambda m: m.update(documents=-1),
    "more documents than there are": lambda m: m.update(documents=9),
    "fewer documents than there are": lambda m: m.update(documents=7),
    "huge documents": lambda m: (m.update(documents=2**39 + 8), m["shards"][0].update(documents=2**39)),
    "huge number": lambda m: m.update(documents=10**400),
    "documents of another shard": lambda m: (m["shards"][0].update(documents=1), m["shards"][1].update(documents=4)),
    "no documents": lambda m: m["shards"][0].update(documents=0),
    "huge columns": lambda m: m.update(num_columns=2**24),
    "many columns": lambda m: m.update(num_columns=2**24 - 1),
    "other columns": lambda m: m.update(num_columns=COLUMNS + 1),
    "fewer columns": lambda m: m.update(num_columns=2),
    "huge size": lambda m: m["shards"][0].update(size_bytes=2**61),
    "name that leads out": lambda m: m["shards"][0].update(name="../00000"),
    "name that leads elsewhere": lambda m: m["shards"][0].update(name="/etc/passwd"),
    "name with a line break": lambda m: m["shards"][0].update(name="00000\n"),
    "the same shard twice": lambda m: m["shards"].__setitem__(1, m["shards"][0]),
    "number for a text": lambda m: m.update(template=5),
    "text for a number": lambda m: m.update(num_columns="many"),
    "list for an object": lambda m: m.update(teacher=[]),
    "object for a list": lambda m: m.update(shards={}),
    "null": lambda m: m.update(shards=None),
    "unknown key": lambda m: m.update(surprise=1),
    "missing key": lambda m: m.pop("signal"),
    "another kind": lambda m: m["signal"].update(kind="top_q"),
    "step of zero": lambda m: m["signal"].update(step=0),
    "step that is no number": lambda m: m["signal"].update(step=float("nan")),
    "step beyond all numbers": lambda m: m["signal"].update(step=float("inf")),
    "fewer side columns": lambda m: m.update(side=["unit"]),
    "no side columns": lambda m: m.update(side=[]),
    "more side columns": lambda m: m.update(side=["unit", "entropy", "label"]),
    "other side columns": lambda m: m.update(side=["entropy", "unit"]),
    "side columns beyond all bounds": lambda m: m.update(side=["unit"] * 100_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest(what, copy):
    path = copy()
    change_manifest(path, HOSTILE[what])
    with pytest.raises((DataError, MissingError)):
        read_all(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"manifest"',
        b"{}",
        b'{"format": null}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": 1, "teacher": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": ' + b"[" * 700 + b"]" * 700 + b"}",
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": 1}',
        b"PK\x03\x04",
    ],
    ids=lambda data: repr(data[:14]),
)
def test_a_manifest_that_is_none(data, copy):
    path = copy()
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(DataError):
        Store(path)


@pytest.mark.parametrize("version", [0, 3, 99, -1, "1", [1], None, 1.5])
def test_a_manifest_of_another_version(version, copy):
    path = copy()
    change_manifest(path, lambda m: m.update(format=version, of_a_later_version={"a": 1}))
    with pytest.raises(DataError, match="has a format that is not known"):
        Store(path)


def test_a_huge_manifest_is_refused_before_it_is_read(copy):
    path = copy()
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(MOST_MANIFEST_BYTES + 1)
    with pytest.raises(DataError, match="in bytes"):
        Store(path)


def other_type(table: pa.Table) -> pa.Table:
    return table.set_column(0, "document", table["document"].cast(pa.int32()))


def with_nulls(name: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        values = pa.array([None, *table[name].to_pylist()[1:]], field.type)
        return pa.Table.from_arrays(
            [values if n == name else table[n] for n in table.schema.names], schema=table.schema
        )

    return change


WRONG_TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "another table": lambda _: pa.table({"text": ["a", "b", "c"]}),
    "one column more": lambda t: t.append_column("more", pa.array([0] * len(t))),
    "one column less": lambda t: t.drop_columns(["crc32"]),
    "columns in another order": lambda t: t.select(["crc32", "tokens", "keep", "signal", "document"]),
    "another type": other_type,
    "one row more": lambda t: pa.concat_tables([t, t.slice(0, 1)]),
    "one row less": lambda t: t.slice(1),
    "no rows": lambda t: t.slice(0, 0),
    "rows in another order": lambda t: t.set_column(
        3, t.schema.field("signal"), t["signal"].take(list(range(len(t)))[::-1])
    ),
    "null document": with_nulls("document"),
    "null tokens": with_nulls("tokens"),
    "null keep": with_nulls("keep"),
    "null signal": with_nulls("signal"),
    "null crc32": with_nulls("crc32"),
}


@pytest.mark.parametrize("what", WRONG_TABLES)
def test_an_arrow_file_of_something_else(what, copy):
    path = copy()
    table = read_table(path)
    assert len(table) >= 3
    replace_file(path, "00000.arrow", arrow_bytes(WRONG_TABLES[what](table)))
    with pytest.raises(DataError):
        read_all(path)


def test_the_first_column_that_is_another_is_named(copy):
    path = copy()
    replace_file(path, "00000.arrow", arrow_bytes(other_type(read_table(path))))
    with pytest.raises(DataError) as raised:
        read_all(path)
    wanted = {"column 0 of 00000.arrow: found": "<document: int32>",
              "expected": "<document: int64 not null>"}  # fmt: skip
    assert raised.value.values == wanted


@pytest.mark.parametrize(("how", "magic"), [("lz4", "04224d18"), ("zstd", "28b52ffd")])
def test_a_compressed_body_is_refused_before_it_is_inflated(how, magic, copy):
    """What it claims to become stands before it, and would be allocated."""
    path = copy()
    data = arrow_bytes(read_table(path), pa.ipc.IpcWriteOptions(compression=how))
    buffers = data.split(bytes.fromhex(magic))
    assert len(buffers) > 5
    hostile = bytes.fromhex(magic).join([*(b[:-8] + (2**50).to_bytes(8, "little") for b in buffers[:-1]), buffers[-1]])
    for file in (data, hostile):
        replace_file(path, "00000.arrow", file)
        with pytest.raises(DataError, match="a body is compressed"):
            read_all(path)


def test_the_older_way_to_say_that_a_body_is_compressed_is_not_known(copy):
    path = copy()
    old = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    replace_file(path, "00000.arrow", arrow_bytes(read_table(path), old))
    with pytest.raises(DataError, match=r"not a record batch of Arrow's format 1\.0"):
        read_all(path)


def test_a_stream_of_arrow_is_not_a_file_of_it(copy):
    path = copy()
    table, sink = read_table(path), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    replace_file(path, "00000.arrow", sink.getvalue().to_pybytes())
    with pytest.raises(DataError):
        read_all(path)


def test_shards_that_were_exchanged(copy):
    path = copy()
    a, b = ((path / f"0000{i}.arrow").read_bytes() for i in (0, 1))
    replace_file(path, "00000.arrow", b)
    replace_file(path, "00001.arrow", a)
    with pytest.raises(DataError):
        read_all(path)


def changed_row(table: pa.Table, row: int, **values) -> bytes:
    """The table with a row's values changed, and its checksum made right."""
    rows = table.to_pylist()
    rows[row].update(values)
    r = rows[row]
    r["crc32"] = row_crc32(r["document"], np.array(r["tokens"]), np.array(r["keep"], bool), r["signal"])
    return arrow_bytes(pa.Table.from_pylist(rows, schema(COLUMNS)))


@pytest.mark.parametrize(
    "change",
    [
        {"keep": [True] * 9},
        {"keep": [False] * 8},
        {"keep": []},
        {"tokens": []},
        {"tokens": [COLUMNS] * 9},
        {"tokens": [65535] * 9},
        {"keep": [True] * 8 + [False]},
        {"keep": [False] * 9},
        {"signal": b""},
        {"signal": b"\x00" * 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["head_and_sample", "full"])
def test_a_row_that_does_not_fit_itself_though_its_checksum_is_right(kind, change, copy):
    path = copy(kind)
    replace_file(path, "00000.arrow", changed_row(read_table(path), 0, **change))
    with pytest.raises(DataError):
        read_all(path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_signals_of_noise_are_refused_or_are_levels_in_their_bounds(kind, copy):
    """The checksum is right, so only the codec stands between the bytes and the reader."""
    path, generator = copy(kind), np.random.default_rng(0)
    table = read_table(path)
    for _ in range(40):
        size = int(generator.integers(0, 60))
        noise = generator.integers(0, 256, size, np.uint8).tobytes()
        replace_file(path, "00000.arrow", changed_row(table, 0, signal=noise))
        store = Store(path)
        try:
            levels = store.levels([0])
        except DataError:
            continue
        assert len(levels) == int(store.loss_mask(0).sum())
        for values in (levels.ids, levels.sample_ids):
            assert values.size == 0 or 0 <= values.min() <= values.max() < COLUMNS
        assert to_sparse(levels, store.signal_config).log_probs.isnan().sum() == 0


def test_tables_of_noise_are_refused(copy):
    path, generator = copy(), np.random.default_rng(0)
    for size in (0, 1, 10, 100, 5000):
        replace_file(path, "00000.tables", generator.integers(0, 256, size, np.uint8).tobytes())
        with pytest.raises(DataError):
            read_all(path)


def test_errors_name_the_store_and_what_to_do(copy):
    path = copy()
    change_manifest(path, lambda m: m["shards"][0].update(crc32=1))
    with pytest.raises(DataError, match="is damaged") as refusal:
        verify(Store(path), 0)
    assert str(path) in refusal.value.what
    assert "00000.arrow" in str(refusal.value)
    assert refusal.value.fix
    assert json.loads((path / "manifest.json").read_bytes())["format"] == 1


@pytest.mark.parametrize("setting", ["step", "least", "draws"])
def test_another_setting_in_the_manifest_is_seen(setting, copy):
    """It decides what the stored numbers mean."""
    path = copy()
    data = (path / "manifest.json").read_bytes()
    value = json.loads(data)["signal"][setting]
    before, after = (f'"{setting}": {x}'.encode() for x in (value, {"step": 0.3, "least": 0.003, "draws": 7}[setting]))
    assert data.count(before) == 1
    (path / "manifest.json").write_bytes(data.replace(before, after))
    with pytest.raises(DataError):
        read_all(path)

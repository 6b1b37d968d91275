"""Check: all that is wrong with a store is named, and a whole one is said to be whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from stillroom.store.check import NAMED_ROWS, check
from stillroom.store.format import row_crc32

from .stores import EVERY, arrow_bytes, change_manifest, read_table, replace_file
from .whole import make_store

FILES = ("00000.arrow", "00000.tables", "00001.arrow", "00001.tables")
Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    return {kind: make_store(tmp_path_factory.mktemp(kind) / "store", tiny_tokenizer, kind) for kind in EVERY}


@pytest.fixture
def damage(made, tmp_path) -> Copy:
    """A copy that may be damaged."""
    return lambda kind="head_and_sample": Path(shutil.copytree(made[kind], tmp_path / "store"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def texts(path: Path) -> list[str]:
    return [str(problem) for problem in check(path).problems]


@pytest.mark.parametrize("kind", EVERY)
def test_a_whole_store(kind, made):
    checked = check(made[kind])
    assert checked.problems == []
    assert checked.whole
    assert str(checked).startswith(f"store     {made[kind]}: whole, complete\nchecked   8 documents, 46 positions, ")


def test_an_incomplete_store_is_checked_and_said_to_be_incomplete(tmp_path, tiny_tokenizer):
    path = make_store(tmp_path / "store", tiny_tokenizer, complete=False)
    checked = check(path)
    assert checked.whole
    assert "NOT COMPLETE" in str(checked)
    flip(path / "00000.arrow", 3000)
    assert not check(path).whole


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_each_file(name, damage):
    path = damage()
    flip(path / name, 8 * (path / name).stat().st_size // 2)
    assert any(f"checksum of {name}: found" in text for text in texts(path))


def test_a_flipped_bit_of_the_tokenizer_or_the_manifest(damage):
    path = damage()
    file = path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"The"', '"Thf"').replace('"drops"', '"dropz"').replace('"ver"', '"vez"'))
    (found,) = texts(path)
    assert "tokenizer" in found
    data = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(data.replace(b'"documents": 8', b'"documents": 9'))
    (found,) = texts(path)
    assert "checksum of manifest.json" in found


def test_everything_wrong_is_named_and_not_only_the_first(damage):
    path = damage()
    flip(path / "00000.arrow", 4000)
    (path / "00001.tables").write_bytes((path / "00001.tables").read_bytes()[:-3])
    shutil.rmtree(path / "tokenizer")
    change_manifest(path, lambda values: values.update(codec_error_nats=-1.0))
    found = "\n".join(texts(path))
    for part in ("checksum of 00000.arrow", "00001.tables in bytes", "lacks its tokenizer", "codec_error_nats"):
        assert part in found


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_shard(name, damage):
    path = damage()
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    (found,) = texts(path)
    assert f"{name} in bytes: found" in found


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name, damage):
    path = damage()
    (path / name).unlink()
    (found,) = texts(path)
    assert f"missing: {name}" in found


def test_a_shard_whose_file_is_right_and_whose_rows_are_not(damage):
    path = damage()
    table = read_table(path)
    table = table.set_column(4, table.schema.field(4), pa.array([7] * len(table), pa.uint32()))
    replace_file(path, "00000.arrow", arrow_bytes(table))
    found = texts(path)
    for i in range(NAMED_ROWS):
        assert f"checksum of 00000.arrow row {i}: found" in found[i]


def test_many_damaged_rows_are_counted(tmp_path, tiny_tokenizer):
    path = make_store(tmp_path / "store", tiny_tokenizer, lengths=[4] * 20, shard_positions=1000)
    table = read_table(path)
    table = table.set_column(4, table.schema.field(4), pa.array([7] * len(table), pa.uint32()))
    replace_file(path, "00000.arrow", arrow_bytes(table))
    found = texts(path)
    assert len(found) == NAMED_ROWS + 1
    assert "20, of which the first 5 are named" in found[-1]


@pytest.mark.parametrize("kind", ["full", "top_k", "head_and_sample"])
def test_signals_that_cannot_be_decoded(kind, damage):
    path = damage(kind)
    table = read_table(path)
    rows = table.to_pylist()
    for row in rows:
        row["signal"] = row["signal"][: len(row["signal"]) // 2]
        row["crc32"] = row_crc32(row["document"], row["tokens"], row["keep"], row["signal"])
    replace_file(path, "00000.arrow", arrow_bytes(pa.Table.from_pylist(rows, table.schema)))
    assert any("00000.arrow row 0" in text for text in texts(path))


def test_tokens_and_keep_of_different_lengths(damage):
    path = damage()
    table = read_table(path)
    rows = table.to_pylist()
    rows[0]["keep"] = rows[0]["keep"][:-1]
    rows[0]["crc32"] = row_crc32(rows[0]["document"], rows[0]["tokens"], rows[0]["keep"], rows[0]["signal"])
    replace_file(path, "00000.arrow", arrow_bytes(pa.Table.from_pylist(rows, table.schema)))
    assert any("tokens and keep of 00000.arrow row 0" in text for text in texts(path))


def test_a_document_longer_than_the_manifest_says(damage):
    path = damage()
    change_manifest(path, lambda values: values.update(length=12))
    assert any("tokens of" in text and "at most 13" in text for text in texts(path))


@pytest.mark.parametrize("name", ["documents", "positions", "tokens", "entries", "draws"])
def test_a_count_of_the_manifest(name, damage):
    path = damage()
    change_manifest(path, lambda values: values.update({name: values[name] + 1}))
    (found,) = texts(path)
    assert f"{name} in all: found" in found


def test_another_tokenizer(damage, chat_tokenizer):
    path = damage()
    shutil.rmtree(path / "tokenizer")
    chat_tokenizer.save_pretrained(path / "tokenizer")
    (found,) = texts(path)
    assert "another tokenizer than it was made with" in found


def test_a_newer_version(damage):
    path = damage()
    change_manifest(path, lambda values: values.update(format=3))
    checked = check(path)
    assert checked.manifest is None
    assert "format that is not known" in str(checked.problems[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["shards"][0].update(name="../00000"),
        lambda v: v["shards"][0].update(name="/etc/passwd"),
        lambda v: v["shards"][0].update(documents=2**39),
        lambda v: v["shards"][0].update(positions=2**61),
        lambda v: v["shards"][0].update(size_bytes=2**61),
        lambda v: v.update(documents=2**61, positions=2**61, entries=2**61),
        lambda v: v.update(num_columns=2**24 - 1),
        lambda v: v.update(part=[3, 2]),
        lambda v: v.update(side=["unit"]),
        lambda v: v["shards"].append(v["shards"][0]),
    ],
)
def test_a_hostile_manifest_is_told_without_reading_what_it_promises(change, damage):
    path = damage()
    change_manifest(path, change)
    assert texts(path)


def test_what_is_no_store(tmp_path):
    (found,) = texts(tmp_path)
    assert "is not a store" in found
    (tmp_path / "manifest.json").write_text("{")
    (found,) = texts(tmp_path)
    assert "is damaged" in found


def test_files_that_are_not_listed_are_told(damage):
    path = damage()
    (path / "00007.arrow").write_bytes(b"x")
    checked = check(path)
    assert checked.whole
    assert "besides   00007.arrow" in str(checked)


def test_every_error_has_its_four_parts(damage):
    path = damage()
    flip(path / "00000.arrow", 4000)
    for problem in check(path).problems:
        assert problem.what
        assert problem.values
        assert problem.why
        assert problem.fix


def test_the_manifest_is_not_changed(made):
    before = json.loads((made["top_k"] / "manifest.json").read_bytes())
    check(made["top_k"])
    assert json.loads((made["top_k"] / "manifest.json").read_bytes()) == before

"""Sources: every kind of file gives its rows, and every kind of damage is named with its place."""

import bz2
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.data.config import ChatData, PromptCompletionData, TextData
from stillroom.data.sources import open_source
from stillroom.errors import DataError, MissingError

ROWS = [{"text": "one"}, {"text": "zwei – 二"}, {"text": "three\nlines"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def source_of(path: Path | str, **settings):
    return open_source(TextData(format="text", path=str(path), **settings))


def write_parquet(path: Path, rows: list[dict] = ROWS) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(new) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl", JSONL.rstrip(b"\n")),
        ("a.jsonl", JSONL.replace(b"\n{", b"\r\n\r\n{") + b"\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps({"about": "x", "data": ROWS}).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(JSONL)),
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("a.jsonl.zst", zstd(JSONL)),
        ("a.jsonl.zst", zstd(JSONL[:20]) + zstd(JSONL[20:])),
        ("a.arrow", arrow(pa.ipc.new_file)),
        ("a.arrow", arrow(pa.ipc.new_stream)),
        ("a.csv", b'text\none\n"zwei \xe2\x80\x93 \xe4\xba\x8c"\n"three\nlines"\n'),
        (
            "a.tsv.gz",
            gzip.compress(b'\xef\xbb\xbftext\r\none\r\nzwei \xe2\x80\x93 \xe4\xba\x8c\r\n\r\n"three\nlines"', mtime=0),
        ),
    ],
)
def test_json_files_give_their_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    source = source_of(tmp_path / name)
    assert list(source.rows()) == ROWS
    assert list(source.rows()) == ROWS
    assert source.files == [tmp_path / name]


def test_parquet_and_text_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    assert list(source_of(tmp_path / "a.parquet").rows()) == ROWS
    (tmp_path / "b.txt").write_text("all\nof\nit\n", encoding="utf-8")
    assert list(source_of(tmp_path / "b.txt").rows()) == [{"text": "all\nof\nit\n"}]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"small"))
    assert list(source_of(tmp_path / "b.txt.gz").rows()) == [{"text": "small"}]


def test_a_pattern_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for place in ("b/x.jsonl", "a/y.jsonl", "a/z.json", "a/.hidden.jsonl", "a/train-0.parquet"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(json.dumps({"text": place}) + "\n")
    assert [row["text"] for row in source_of(tmp_path / "*" / "*.jsonl").rows()] == ["a/y.jsonl", "b/x.jsonl"]
    assert [row["text"] for row in source_of(tmp_path / "**" / "x*").rows()] == ["b/x.jsonl"]
    with pytest.raises(DataError, match="kind"):
        source_of(tmp_path / "a" / "*")
    with pytest.raises(DataError, match=r"found: none"):
        source_of(tmp_path / "c" / "*")


def test_what_lies_at_an_address_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
    there = fsspec.filesystem("memory")
    try:
        for name in ("b.jsonl", "a.jsonl", "notes.md"):
            there.pipe(f"/corpus/{name}", json.dumps({"text": name}).encode())
        for address in ("memory://corpus", "memory://corpus/*.jsonl"):
            assert [row["text"] for row in source_of(address).rows()] == ["a.jsonl", "b.jsonl"]
        for name in ("one/a.jsonl", "two/a.jsonl"):
            there.pipe(f"/corpus/{name}", json.dumps({"text": name}).encode())
        assert [row["text"] for row in source_of("memory://corpus/*/a.jsonl").rows()] == ["one/a.jsonl", "two/a.jsonl"]
        source = source_of("memory://corpus/a.jsonl")
        assert source.name(0) == "a.jsonl line 1"
        monkeypatch.setattr(type(there), "get_file", None)
        assert source_of("memory://corpus/a.jsonl").fingerprint() == source.fingerprint()
        monkeypatch.undo()
        monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "cache"))
        there.pipe("/corpus/a.jsonl", b'{"text": "new"}')
        assert [row["text"] for row in source_of("memory://corpus/a.jsonl").rows()] == ["new"]
        assert not list((tmp_path / "cache").rglob("*.partial"))
        for address in ("memory://nothing/a.jsonl", "nobody://x/a.jsonl", "memory://corpus/*.parquet"):
            with pytest.raises(MissingError):
                source_of(address)
        with pytest.raises(MissingError) as caught:
            source_of("nobody://user:secret@x/a.jsonl")
        assert "secret" not in str(caught.value)
    finally:
        there.rm("/corpus", recursive=True)


def test_names_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n{"text": "y"}\n')
    write_parquet(tmp_path / "b.parquet")
    assert [source_of(tmp_path / "a.jsonl").name(i) for i in (0, 1)] == ["a.jsonl line 1", "a.jsonl line 3"]
    assert source_of(tmp_path / "b.parquet").name(2) == "b.parquet row 3"


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "second"), ("a.jsonl.gz", "first"), ("c.jsonl", "third")):
        content = json.dumps({"text": text}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "README.md").write_text("about")
    source = source_of(tmp_path)
    assert [row["text"] for row in source.rows()] == ["first", "second", "third"]
    assert source.name(1) == "b.jsonl line 1"
    assert [path.name for path in source.files] == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]


def test_folder_of_two_kinds_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one kind"):
        source_of(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError, match=r"found: \.jsonl, \.txt"):
        source_of(tmp_path)


def test_fingerprint_follows_bytes_and_names(tmp_path: Path) -> None:
    def fingerprint(folder: str, files: dict[str, bytes]) -> str:
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
        return source_of(tmp_path / folder).fingerprint()

    first = fingerprint("1", {"a.jsonl": JSONL, "b.jsonl": b"{}"})
    assert first == fingerprint("2", {"b.jsonl": b"{}", "a.jsonl": JSONL})
    others = [
        fingerprint("3", {"a.jsonl": JSONL + b"\n", "b.jsonl": b"{}"}),
        fingerprint("4", {"a.jsonl": b"{}", "b.jsonl": JSONL}),
        fingerprint("5", {"a.jsonl": JSONL, "c.jsonl": b"{}"}),
        fingerprint("6", {"a.jsonl": JSONL}),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', r"broken JSON in .*a\.jsonl line 2\n  column 10: Expecting value"),
        ("a.jsonl", JSONL[:-9], r"broken JSON in .*a\.jsonl line 3"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', r"a\.jsonl line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"not UTF-8\n  line 2: byte 0xff"),
        ("a.json", b'[{"text": "x"},\n {"text" "y"}]', r"broken JSON in .*a\.json line 2"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json item 2 is not a JSON object"),
        ("a.json", b'{"a": [], "b": []}', r"not a list of rows"),
        ("a.txt", b"x\ny\n\xc3(", r"not UTF-8\n  line 3"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], r"not a whole \.gz file"),
        ("a.jsonl.gz", JSONL, r"not a whole \.gz file"),
        ("a.parquet", b"PAR1 nothing PAR1", r"not whole parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"git-lfs pointer"),
        ("a.jsonl", b"\n\n", r"there are no rows"),
        ("a.json", b"[]", r"there are no rows"),
        ("a.xlsx", b"text\nx\n", r"a kind that is not read"),
        ("a.arrow.gz", b"", r"a kind that is not read"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-20], r"not a whole \.xz file"),
        ("a.jsonl.xz", JSONL, r"not a whole \.xz file"),
        ("a.jsonl.bz2", bz2.compress(JSONL)[:-5], r"not a whole \.bz2 file"),
        ("a.jsonl.zst", zstd(JSONL)[:-5], r"not a whole \.zst file"),
        ("a.jsonl.zst", JSONL, r"not a whole \.zst file"),
        ("a.jsonl.xz", lzma.compress(JSONL + b"{"), r"broken JSON in .*a\.jsonl\.xz line 4"),
        ("a.arrow", b"ARROW1 nothing", r"not whole arrow"),
        ("a.arrow", b"nothing", r"not whole arrow"),
        ("a.csv", b"a,b\n1,2\n3\n", r"broken row in .*a\.csv line 3\n  cells: 1 +columns: 2"),
        ("a.csv", b"a,a\n1,2\n", r"broken header in .*a\.csv line 1"),
        ("a.csv", b'a,b\n1,"2\n', r"broken row in .*a\.csv line 2\n  problem: unexpected end of data"),
        ("a.tsv", b"a\tb\n1\t\xff\n", r"not UTF-8\n  line 2: byte 0xff"),
        ("a.parquet.gz", b"", r"a kind that is not read"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(source_of(tmp_path / name).rows())


def test_rows_before_the_damage_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL + b"{")
    rows = source_of(tmp_path / "a.jsonl").rows()
    assert [next(rows) for _ in ROWS] == ROWS
    with pytest.raises(DataError, match="line 4"):
        next(rows)


def test_truncated_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "x" * 99 + str(i)} for i in range(50)])
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not whole parquet"):
        list(source_of(tmp_path / "a.parquet").rows())


def test_missing_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_bytes(JSONL)
    with pytest.raises(MissingError, match=r"did you mean: .*train\.jsonl"):
        source_of(tmp_path / "trian.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="the hub was not asked"):
        source_of("no-such-file.jsonl")
    pytest.importorskip("datasets")
    with pytest.raises(MissingError, match="cannot be loaded"):
        source_of("stillroom-nobody/no-such-data")


def test_folders_written_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "valid": one.select([1])}).save_to_disk(tmp_path / "two")
    assert list(source_of(tmp_path / "one").rows()) == ROWS
    assert list(source_of(tmp_path / "two").rows()) == ROWS
    valid = source_of(tmp_path / "two", split="valid")
    assert list(valid.rows()) == ROWS[1:2]
    assert valid.name(0).startswith("row 1 of ")
    assert valid.files
    assert valid.fingerprint() != source_of(tmp_path / "two").fingerprint()
    assert valid.fingerprint() == source_of(tmp_path / "two", split="valid").fingerprint()
    with pytest.raises(DataError, match="did you mean: valid"):
        source_of(tmp_path / "two", split="valdi")


def test_real_files(shared_data: Path) -> None:
    first = next(source_of(shared_data / "text" / "gsm8k_train.jsonl").rows())
    assert first.keys() == {"question", "answer"}
    rows = list(source_of(shared_data / "text" / "dpo_en_demo.json").rows())
    assert {"conversations", "chosen", "rejected"} <= rows[0].keys()
    [whole] = source_of(shared_data / "text" / "tinyshakespeare.txt").rows()
    assert len(whole["text"].encode()) == 1115394


# --- files as people have them ---------------------------------------------------------------------------------------
def test_a_json_that_holds_a_line_for_each_row_and_the_other_way_round(tmp_path):
    (tmp_path / "a.json").write_bytes(JSONL)
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS, indent=1))
    for name in ("a.json", "b.jsonl"):
        assert list(source_of(tmp_path / name).rows()) == ROWS
    assert source_of(tmp_path / "a.json").name(1) == "a.json line 2"
    assert source_of(tmp_path / "b.jsonl").name(1) == "b.jsonl item 2"


def test_an_object_that_is_a_row_is_no_list_of_rows(tmp_path):
    row = {"text": "hello", "tags": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert list(source_of(tmp_path / "a.json").rows()) == [row]
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "c.json").write_text(json.dumps(chat))
    assert list(open_source(ChatData(format="chat", path=str(tmp_path / "c.json"))).rows()) == [chat]
    pairs = PromptCompletionData(format="prompt_completion", path=str(tmp_path / "a.json"), prompt="Tags: {tags}")
    assert list(open_source(pairs).rows()) == [row]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "half \\ud83d"}', "half of a character"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "4300 digits"),
    ],
    ids=["surrogate", "depth", "digits"],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(tmp_path, name, line, problem):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"broken JSON in .* line 2") as caught:
        list(source_of(tmp_path / name).rows())
    assert problem in str(caught.value)


def test_keys_that_a_table_fills_with_nulls_are_not_there(tmp_path):
    def call(**arguments):
        return {"messages": [{"role": "assistant", "calls": [{"arguments": arguments}]}], "text": None}

    rows = [call(city="Bern"), call(a=1, b=2)]
    write_parquet(tmp_path / "a.parquet", rows)
    assert list(source_of(tmp_path / "a.parquet").rows()) == rows
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": {"a": None}}))  # which somebody wrote
    assert list(source_of(tmp_path / "a.jsonl").rows()) == [{"text": {"a": None}}]


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train", ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        ("test", ["test.jsonl"]),
        ("validation", ["dev_0.jsonl"]),
        ("dev", ["dev_0.jsonl"]),
    ],
)
def test_the_files_of_a_folder_are_those_of_the_split(tmp_path, split, wanted):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test", "dev_0"):
        (tmp_path / f"{name}.jsonl").write_bytes(JSONL)
    assert [file.name for file in source_of(tmp_path, split=split).files] == wanted


@pytest.mark.parametrize(
    ("names", "path", "split", "what"),
    [
        (["train", "test"], "", "validation", "has no split `validation`"),
        (["train", "test"], "", "full", "has no split `full`"),
        (["one", "two"], "", "test", "does not tell its splits"),
        (["train", "more"], "", "train", "does not tell its splits"),
        (["one"], "one.jsonl", "test", "does not tell its splits"),
        (["train"], "train.jsonl", "test", "has no split `test`"),
    ],
)
def test_a_split_that_is_not_there_is_refused(tmp_path, names, path, split, what):
    for name in names:
        (tmp_path / f"{name}.jsonl").write_bytes(JSONL)
    with pytest.raises(DataError, match=what):
        source_of(tmp_path / path, split=split)


def test_a_file_is_read_whatever_split_its_name_tells(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(JSONL)
    assert list(source_of(tmp_path / "test.jsonl").rows()) == ROWS
    assert list(source_of(tmp_path / "test.jsonl", split="test").rows()) == ROWS


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is no regular file"):
        source_of(tmp_path / "a.jsonl")

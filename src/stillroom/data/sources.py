"""Sources: rows of text as they lie on disk or on the hub, streamed in order, each with a name for messages."""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import lzma
import re
import secrets
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from stillroom.config import is_local
from stillroom.data.chat_templates import Template
from stillroom.data.config import AnyData, ChatData, TextData, TokensData, cache_folder
from stillroom.errors import DataError, MissingError, did_you_mean, first_line, require
from stillroom.recipe import parse_json
from stillroom.terminal import redact
from stillroom.tokenizers import refuse_lfs_pointer

Row = dict[str, Any]


def open_source(config: AnyData) -> "Source":
    """Finds what ``config.path`` means: a file, a folder of files, files by a pattern (data/*.jsonl), any of these at
    an address (s3://…), a folder written by `datasets`, or a hub name.

    Raises MissingError where nothing is there; DataError where it is there, and is not data that can be read."""
    path = fetched(config.path, cache_folder(config)) if "://" in config.path else Path(config.path)
    if not path.exists() and glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        return FileSource(_of_split(_one_kind(found, path), path, config.split), columns_of(config))
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return _open_saved(path, config)
    if path.exists() or is_local(config.path) or _kind(path) is not None:
        return FileSource(_of_split(files_of(path), path, config.split), columns_of(config))
    return _open_hub(config)


def columns_of(config: AnyData) -> frozenset[str]:
    """The columns that the settings may read of a row."""
    if isinstance(config, TextData | TokensData):
        return frozenset([config.column])
    if isinstance(config, ChatData):
        return frozenset(["messages", "conversations"] if config.column == "auto" else [config.column])
    parts = {part: getattr(config, part) for part in ("prompt", "completion", "system")}
    templates = [Template(f"data.{part}", text) for part, text in parts.items() if text is not None]
    return frozenset[str]().union(*(template.columns for template in templates))


def files_of(path: Path) -> list[Path]:
    """A file, or the data files of a folder, in the order of their names. Raises MissingError where nothing is
    there; DataError where the folder holds no data files, or those of several kinds."""
    if not path.exists():
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, around)
        raise MissingError(
            f"the data {path} is not there",
            {name: path.parent / str(value) for name, value in near.items()} or {"looked in": path.parent.absolute()},
            why="The path is one on this machine, so the hub was not asked.",
            fix="Check data.path; a hub name is written as owner/name.",
        )
    if not path.is_dir():
        if not path.is_file():
            raise DataError(
                f"the data {path} is no regular file",
                {"found": "a pipe, a socket or a device", "expected": "a file or a folder"},
                why="The data are read more than once, and what comes through a pipe would be waited for without end.",
                fix="Write it into a file first, and name that.",
            )
        return [path]
    return _one_kind(sorted(file for file in path.iterdir() if file.is_file()), path)


def _one_kind(files: list[Path], path: Path) -> list[Path]:
    """The data files among those of a folder or a pattern. Raises DataError where there are none, or those of several
    kinds."""
    files = [file for file in files if _kind(file) and file.name[0] != "."]
    kinds = sorted({str(_kind(file)) for file in files})
    if len(kinds) != 1:
        raise DataError(
            f"{'the folder ' * path.is_dir()}{path} does not hold data files of one kind",
            {"found": ", ".join(kinds) or "none", "read": ", ".join(_KINDS)},
            why="All data files of a folder or a pattern are read as one data set.",
            fix="Name one file, or a folder that holds files of one kind.",
        )
    return files


def fetched(address: str, cache: Path) -> Path:
    """Copies what lies at an address that fsspec knows (s3://, gs://, hf://, https://, …) into the cache, unless it is
    there: a file, those of a folder, or those of a pattern. A copy is known by what the other side tells of the file.

    Raises MissingError where there is nothing, it cannot be reached, or fsspec needs another package."""
    import fsspec

    try:
        system, place = fsspec.core.url_to_fs(address)
        pattern = glob.has_magic(place)
        whole = not pattern and system.isdir(place)
        names = sorted(system.glob(place) if pattern else system.ls(place, detail=False) if whole else [place])
        names = [name for name in names if _kind(Path(name)) and (not (pattern or whole) or system.isfile(name))]
        told = "".join(f"{name} {system.ukey(name)}\n" for name in names)
        folder = cache / "files" / hashlib.sha256(f"{address}\n{told}".encode()).hexdigest()[:32]
        local = [Path(name).name for name in names]
        if len(set(local)) < len(local):  # as of */train.jsonl: none takes the place of another
            local = [f"{number:05}-{name}" for number, name in enumerate(local)]
        for name, path in zip(names, map(folder.joinpath, local), strict=True):
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
                try:
                    system.get_file(name, str(partial))
                    partial.rename(path)
                finally:
                    partial.unlink(missing_ok=True)
    except Exception as error:
        raise MissingError(
            f"the data at {redact(address)} cannot be had",
            {"reason": redact(first_line(error))},
            why="They are copied to this machine before they are read.",
            fix="Check the address and the access rights; some need a package of their own, such as s3fs or gcsfs.",
        ) from None
    if not names:
        raise MissingError(
            f"there are no data files at {redact(address)}",
            {"read": ", ".join(_KINDS)},
            why="The ending of a file's name says how it is read.",
            fix="Check the address; a folder is read without those below it.",
        )
    return folder if pattern or whole else folder / local[0]


SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")
"""Words in the names of files that tell a split, and the split."""


def split_of(path: Path) -> str | None:
    """The split that a file's name tells, as train-00000-of-00001.parquet does; None where it tells none."""
    return next((SPLITS[word] for word in re.split("[^a-z]+", path.name.lower()) if word in SPLITS), None)


def _of_split(files: list[Path], path: Path, split: str) -> list[Path]:
    """The files that are of a split, where their names tell splits; and else all.

    Raises DataError where there is none of that split, or where one is asked for and no name tells any."""
    if not path.is_dir() and split == "train":
        return files  # the file that was named, whatever it is called
    told = {file: split_of(file) for file in files}
    splits, wanted = sorted({str(name) for name in told.values()}), SPLITS.get(split, split)
    if splits == ["None"] and split == "train":
        return files
    if "None" in splits or wanted not in splits:
        untold = [file.name for file in files if told[file] is None]
        raise DataError(
            f"{path} has no split `{split}`" if "None" not in splits else f"{path} does not tell its splits",
            {"data.split": split, **({"files that tell none": ", ".join(untold[:3])} if untold else {}),
             "splits that names of files tell": ", ".join(name for name in splits if name != "None") or "none"},
            why="Text that is to be measured on would be trained on, and nobody would know.",
            fix="Set data.split to one that is there; or name the file that is meant, or a folder of such files alone.",
        )  # fmt: skip
    return [file for file in files if told[file] == wanted]


# --- files -----------------------------------------------------------------------------------------------------------
class FileSource:
    """Rows from files of one kind, in the order of the files.

    Args:
        columns: those that will be read, by which an object that is a row is told from one that holds the rows.
    """

    def __init__(self, files: list[Path], columns: Collection[str] = ()) -> None:
        self.files, self.columns = files, columns
        for path in files:
            if _kind(path) is None:
                read = ", ".join(sorted(_KINDS)) + f"; the text kinds also as {', '.join(_OPENERS)}"
                raise DataError(
                    f"{path} is of a kind that is not read",
                    {"found": path.suffix or "no ending", "read": read},
                    why="The ending of a file's name says how it is read.",
                    fix="Convert it to one of these, or rename it if it is one.",
                )
            refuse_lfs_pointer(path, "the data")

    def fingerprint(self) -> str:
        """Returns a hex digest that changes when the rows do."""
        return _hash_files({path.name: path for path in self.files})

    def rows(self) -> Iterator[Row]:
        """Returns every row, streamed. Raises DataError where one cannot be read, or where there is none."""
        return _not_empty((row for _, _, row in self.places()), ", ".join(str(path) for path in self.files[:3]))

    def name(self, index: int) -> str:
        """Returns how a message calls a row, such as "train.jsonl line 12"; they are numbered from 0."""
        found = next(islice(self.places(), index, None), None)
        return f"{found[0].name} {found[1]}" if found else f"row {index + 1} of {self.files[0].name}"

    def places(self) -> Iterator[tuple[Path, str, Row]]:
        """Every row with its file and its place in it: "line 3"."""
        for path in self.files:
            try:
                for place, row in _KINDS[_kind(path) or ""](path, self.columns):
                    yield path, place, row
            except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, _Compressed) as error:
                raise _unreadable(path, f"not a whole {path.suffix} file ({first_line(error)})") from None


Places = Iterator[tuple[str, Row]]
"""Rows, each with its place in its file: "line 3"."""


def _read_json(path: Path, columns: Collection[str]) -> Places:
    """The rows of a .jsonl or a .json: an object on each line, or one list of objects, whatever the name says."""
    with _open(path) as file:
        raw = next((line for line in file if line.strip()), b"")
    if raw.removeprefix(BOM).lstrip()[:1] == b"[" or _kind(path) == ".json":
        with _open(path) as file:
            text = _decode(file.read(), path)
        if (rows := _listed(text, path, columns)) is not None:
            yield from ((f"item {number}", _object(row, f"{path} item {number}")) for number, row in enumerate(rows, 1))
            return
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            text = _decode(raw, path, number)
            if text.strip():
                yield f"line {number}", _object(_parse(text, path, number), f"{path} line {number}")


BOM = b"\xef\xbb\xbf"


def _listed(text: str, path: Path, columns: Collection[str]) -> list[Any] | None:
    """The rows of a text that is one JSON value: a list, an object that holds one list, or an object that is a row
    itself, since it has one of ``columns``. None where the text is several JSON values, one after the other."""
    try:
        value = parse_json(text)
    except JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise _broken(path, error.lineno, {f"column {error.colno}": error.msg}) from None
    except ValueError as error:
        raise _broken(path, 1, {"problem": error}) from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = [value] if not value.keys().isdisjoint(columns) else lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(
            f"{path} is not a list of rows",
            {"expected": "a list of objects, or an object with one such list", "found": type(value).__name__},
            why="Each object of the list is a row.",
            fix="Write it as [{…}, {…}], or as .jsonl with one object a line.",
        )
    return value


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth: a table gives every object of a column all the keys that
    any of them has, and nobody wrote these."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_parquet(path: Path, columns: Collection[str]) -> Places:  # noqa: ARG001
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for number, row in enumerate(chain.from_iterable(batches), start=1):
                yield f"row {number}", {name: without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, f"not whole parquet ({first_line(error)})") from None


def _read_arrow(path: Path, columns: Collection[str]) -> Places:  # noqa: ARG001
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            whole = bytes(file.read(6)) == b"ARROW1"  # else it is a stream, as `datasets` writes
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if whole else pyarrow.ipc.open_stream(file)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
            rows = chain.from_iterable(batch.slice(i, 1024).to_pylist() for batch in batches
                                       for i in range(0, len(batch), 1024))  # fmt: skip
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", {name: without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, f"not whole arrow ({first_line(error)})") from None


def _read_csv(path: Path, columns: Collection[str]) -> Places:  # noqa: ARG001
    """Rows of texts, by the names in the first line; commas or tabs by the ending of the name."""
    csv.field_size_limit(sys.maxsize)
    names = None
    with _open(path) as file:
        lines = (_decode(raw, path, number) for number, raw in enumerate(file, start=1))
        rows = csv.reader(lines, delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise _broken(path, number, {"problem": error}, "row") from None
            if cells is None:
                return
            if names is None:
                names = cells
                if len(set(names)) < len(names) or not all(names):
                    raise _broken(path, number, {"names of columns": ", ".join(names)}, "header")
            elif cells:
                if len(cells) != len(names):
                    raise _broken(path, number, {"cells": len(cells), "columns": len(names)}, "row")
                yield f"line {number}", dict(zip(names, cells, strict=True))


def _read_txt(path: Path, columns: Collection[str]) -> Places:  # noqa: ARG001
    # kept: a reader like the others, for the table
    with _open(path) as file:
        yield "document 1", {"text": _decode(file.read(), path)}


_KINDS: dict[str, Callable[[Path, Collection[str]], Places]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_txt,
}
"""The reader of each kind of file."""


class _Compressed(Exception):
    """A compressed file is not whole."""


class _Zstandard(io.RawIOBase):
    """The bytes of a .zst file."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._stream = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # kept: what a raw stream must have
        try:
            return self._stream.readinto(buffer)
        except OSError as error:
            raise _Compressed(error) from None

    def close(self) -> None:  # kept: the stream within is closed too
        self._stream.close()
        super().close()


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_Zstandard(path), 2**17),
}
"""What opens a compressed file of text, by the ending of its name."""


def _kind(path: Path) -> str | None:
    packed = path.suffix in _OPENERS
    suffix = Path(path.stem).suffix if packed else path.suffix
    return suffix if suffix in _KINDS and not (packed and suffix in (".parquet", ".arrow")) else None


def _open(path: Path) -> Any:
    return _OPENERS.get(path.suffix, lambda path: path.open("rb"))(path)


def _decode(raw: bytes, path: Path, number: int | None = None) -> str:
    try:
        return raw.decode("utf-8-sig" if number in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        line = number or raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8",
            {f"line {line}": f"byte 0x{raw[error.start]:02x}"},
            why="Text of an unknown encoding would become wrong tokens.",
            fix="Convert it, for instance with `iconv -f latin1 -t utf-8`.",
        ) from None


def _object(row: object, name: str) -> Row:
    if isinstance(row, dict):
        return row
    raise DataError(
        f"{name} is not a JSON object",
        {"expected": '{"column": …}', "found": type(row).__name__},
        why="A row is read by the names of its columns.",
        fix='Write it as an object, such as {"text": "…"}.',
    )


def _parse(text: str, path: Path, number: int) -> Any:
    try:
        return parse_json(text)
    except JSONDecodeError as error:
        raise _broken(path, number, {f"column {error.colno}": error.msg}) from None
    except ValueError as error:
        raise _broken(path, number, {"problem": error}) from None


def _broken(path: Path, line: int, values: dict[str, object], what: str = "JSON") -> DataError:
    return DataError(
        f"broken {what} in {path} line {line}",
        values,
        why="A row that cannot be read is not skipped, since nobody would know that it is missing.",
        fix="Mend or delete that line; a file that ends in the middle of one was not copied whole.",
    )


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be read",
        {"reason": reason},
        why="The file is damaged, or was not copied whole.",
        fix="Copy or download it again.",
    )


def _hash_files(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _not_empty(rows: Iterator[Row], name: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise DataError(
            f"there are no rows in {name}",
            why="There is nothing to learn from.",
            fix="Check data.path and data.split.",
        )
    yield first
    yield from rows


# --- the `datasets` library ------------------------------------------------------------------------------------------
class DatasetSource:
    """Rows of a `datasets.Dataset`. A saved one is known by its files' bytes, one of the hub by its own fingerprint."""

    def __init__(self, dataset: Any, label: str, folder: Path | None = None) -> None:
        self.dataset, self.label, self.folder = dataset, label, folder
        self.files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []

    def fingerprint(self) -> str:
        if self.folder:
            return _hash_files({str(path.relative_to(self.folder)): path for path in self.files})
        return hashlib.sha256(f"{self.label} {self.dataset._fingerprint}".encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        rows = ({name: without_nulls(value) for name, value in row.items()} for row in self.dataset)
        return _not_empty(rows, self.label)

    def name(self, index: int) -> str:
        return f"row {index + 1} of {self.label}"


Source = FileSource | DatasetSource
"""Rows in a fixed order, numbered from 0."""


def _open_saved(path: Path, config: AnyData) -> DatasetSource:
    require("datasets", "hub", f"reading {path}")
    import datasets

    folder = path
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        folder = path / config.split
        if config.split not in splits:
            raise DataError(
                f"{config.path} has no split `{config.split}`",
                {"splits": ", ".join(splits), **did_you_mean(config.split, splits)},
                why="A data set with several splits is read one split at a time.",
                fix="Set data.split to one of them.",
            )
    try:
        return DatasetSource(datasets.load_from_disk(str(folder)), str(folder), folder)
    except Exception as error:
        raise _unreadable(folder, first_line(error)) from None


def _open_hub(config: AnyData) -> DatasetSource:
    require("datasets", "hub", f"reading {config.path} from the hub")
    import datasets

    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=config.split, revision=config.revision)
    except Exception as error:
        raise MissingError(
            f"the data set {config.path} cannot be loaded",
            {"file or folder": "does not exist", "hub": first_line(error)},
            why="The name is not a place on this machine, and the hub does not give it as asked for.",
            fix="Check data.path, data.subset, data.split and the connection; a private one needs `hf auth login`.",
        ) from None
    label = " ".join(filter(None, (config.path, config.subset, config.split, config.revision)))
    return DatasetSource(dataset, label)

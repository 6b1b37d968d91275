"""Sources: rows of text as they lie on disk or on the hub, streamed in order, each with a name for messages."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from stillroom.config import is_local
from stillroom.data.chat_templates import Template
from stillroom.data.config import AnyData, ChatData, TextData
from stillroom.errors import DataError, MissingError, did_you_mean, first_line, require
from stillroom.recipe import parse_json
from stillroom.tokenizers import refuse_lfs_pointer

Row = dict[str, Any]


def open_source(config: AnyData) -> "Source":
    """Finds what ``config.path`` means: a file, a folder of files, a folder written by `datasets`, or a hub name.
    Raises MissingError where nothing is there; DataError where it is there, and is not data that can be read."""
    path = Path(config.path)
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return _open_saved(path, config)
    if path.exists() or is_local(config.path) or _kind(path) is not None:
        return FileSource(_of_split(files_of(path), path, config.split), columns_of(config))
    return _open_hub(config)


def columns_of(config: AnyData) -> frozenset[str]:
    """The columns that the settings may read of a row."""
    if isinstance(config, TextData):
        return frozenset([config.column])
    if isinstance(config, ChatData):
        return frozenset(["messages", "conversations"] if config.column == "auto" else [config.column])
    templates = [Template(f"data.{part}", getattr(config, part)) for part in ("prompt", "completion")]
    return frozenset(column for template in templates for _, column in template.pieces if column is not None)


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
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) and file.name[0] != ".")
    kinds = sorted({str(_kind(file)) for file in files})
    if len(kinds) != 1:
        raise DataError(
            f"the folder {path} does not hold data files of one kind",
            {"found": ", ".join(kinds) or "none", "read": ", ".join(_KINDS)},
            why="All data files of a folder are read as one data set.",
            fix="Name one file, or a folder that holds files of one kind.",
        )
    return files


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
                read = ", ".join(sorted(_KINDS)) + ", and .gz of the text kinds"
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
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise _unreadable(path, f"not a whole gzip file ({error})") from None


Places = Iterator[tuple[str, Row]]
"""Rows, each with its place in its file: "line 3"."""


def _read_json(path: Path, columns: Collection[str]) -> Places:
    """The rows of a .jsonl or a .json: an object on each line, or one list of objects, whatever the name says."""
    with _open(path) as file:
        raw = next((line for line in file if line.strip()), b"")
    if raw.removeprefix(BOM).lstrip()[:1] == b"[" or path.name.removesuffix(".gz").endswith(".json"):
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


def _read_txt(path: Path, columns: Collection[str]) -> Places:  # noqa: ARG001
    # kept: a reader like the others, for the table
    with _open(path) as file:
        yield "document 1", {"text": _decode(file.read(), path)}


_KINDS: dict[str, Callable[[Path, Collection[str]], Places]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
"""The reader of each kind of file."""


def _kind(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in _KINDS and (suffix, path.suffix) != (".parquet", ".gz") else None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


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


def _broken(path: Path, line: int, values: dict[str, object]) -> DataError:
    return DataError(
        f"broken JSON in {path} line {line}",
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

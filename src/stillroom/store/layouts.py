"""Layouts of Parquet files that hold top-k log-probabilities: plain columns, and DistillKit's bytes of them.

A row is a text: its tokens, and of each position some ids and their log-probabilities; or DistillKit's two strings of
bytes of them. ``bytepacked_indices`` holds k ids of ``ceil(log2 d)`` bits, highest bit first, filled up with zero bits
to whole bytes. ``compressed_logprobs`` holds, in this order and little-endian: ``exact_k`` values; the coefficients of
the other values as a function of their place (powers, sqrt, exp); and for each bin of residuals a scale and the
residuals as whole numbers of a few bits, highest bit first. With ``delta_encoding`` all that gives the differences from
each value to the next. DistillKit's older layout has the ids from the lowest bit up in words of 64 bits, none across
two words, and fits without residuals.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillroom.errors import DataError, MismatchError, MissingError
from stillroom.recipe import from_yaml

NAMES = {
    "tokens": ("tokens", "input_ids"),
    "ids": ("ids", "token_ids"),
    "log_probs": ("log_probs", "logprobs", "top_values"),
}
"""Columns of the plain layout, by the names that they may have."""
ROWS_AT_ONCE = 8
MOST = 65536
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Columns = Mapping[str, np.ndarray]  # the bytes (or words, or numbers) of p positions, [p, width] each, by name


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bin(_Settings):
    """Residuals that share a scale."""

    scale_dtype: Dtype
    element_bits: Annotated[int, Field(gt=0, le=32)]
    num_elements: Annotated[int, Field(gt=0, le=MOST)]


class _Compression(_Settings):
    k: Annotated[int, Field(gt=0, le=MOST)]
    exact_k: Annotated[int, Field(ge=0)]
    term_dtype: Dtype = "float32"

    @model_validator(mode="after")
    def _has_exact_values(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is more than k {self.k}")
        return self


class Compression(_Compression):
    """The settings by which ``compressed_logprobs`` and ``bytepacked_indices`` were written."""

    key: ClassVar[str] = "logprob_compressor"
    """The key under which a recipe of DistillKit has such settings."""
    columns: ClassVar[Sequence[str]] = ("compressed_logprobs", "bytepacked_indices")
    d: Annotated[int, Field(ge=2, le=2**20)]
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[Annotated[int, Field(ge=0, le=32)] | Literal["sqrt", "exp"]] | None = None
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _has_all_values(self) -> Self:
        fitted = self.k - self.exact_k
        if sum(bin_.num_elements for bin_ in self.residual_bins) > fitted:
            raise ValueError(f"residual_bins have more than the {fitted} elements of k - exact_k")
        if fitted and not (self.polynomial_terms or self.residual_bins):
            raise ValueError("values beyond exact_k have neither polynomial_terms nor residual_bins")
        return self

    def decode(self, columns: Columns, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int64 [p, k], and log-probabilities, float64 [p, k], in the order in which they were packed.

        Args:
            where: the row, as a message calls it.

        Raises:
            MismatchError: the bytes of a position are not as many as the settings make.
            DataError: bits that must be zero are not.
        """
        values, packed = (columns[name] for name in self.columns)
        bits, num_fitted, terms = id_bits(self.d), self.k - self.exact_k, self.polynomial_terms or []
        used, width = bits * self.k, packed.shape[1]
        fits = next((b for b in range(1, 33) if (b * self.k + 7) // 8 == width), None)
        meant = f", so {fits} bits an id: {2 ** (fits - 1) + 1:,} to {2**fits:,} columns" if fits else ""
        _check_width("bytepacked_indices", width, (used + 7) // 8, where, meant)
        _check_padding(not used % 8 or not (packed[:, -1] & (1 << 8 - used % 8) - 1).any(), where)
        sizes = [self.exact_k * _size(self.exact_dtype), len(terms) * _size(self.term_dtype)]
        for bin_ in self.residual_bins:
            sizes += [_size(bin_.scale_dtype), (bin_.num_elements * bin_.element_bits + 7) // 8]
        _check_width("compressed_logprobs", values.shape[1], sum(sizes), where)
        parts = iter(np.split(values, np.cumsum(sizes)[:-1], axis=1))
        exact, coefficients = _numbers(next(parts), self.exact_dtype), _numbers(next(parts), self.term_dtype)
        fitted = np.zeros((len(values), num_fitted))
        if terms:  # functions of a value's place, rounded as the coefficients are
            points = np.linspace(0, 1, num_fitted) if self.normalize_t else np.arange(num_fitted, dtype=np.float64)
            with np.errstate(over="ignore"):
                known = [
                    {"sqrt": np.sqrt, "exp": np.exp}[i](points) if isinstance(i, str) else points**i for i in terms
                ]
            rounded = torch.from_numpy(np.stack(known, 1)).to(getattr(torch, self.term_dtype)).double().numpy()
            fitted = coefficients @ rounded.T
        at = 0
        for bin_ in self.residual_bins:
            scale = _numbers(next(parts), bin_.scale_dtype)
            steps = unpack(next(parts), bin_.element_bits, bin_.num_elements)
            steps = 2 * steps - 1 if bin_.element_bits == 1 else steps - (1 << bin_.element_bits - 1)
            fitted[:, at : at + bin_.num_elements] += steps * scale
            at += bin_.num_elements
        log_probs = np.concatenate([exact, fitted], 1)
        return unpack(packed, bits, self.k), np.cumsum(log_probs, 1) if self.delta_encoding else log_probs


class LegacyCompression(_Compression):
    """The settings by which ``packed_indices``, ``exact_values`` and ``coeffs`` were written."""

    key: ClassVar[str] = "legacy_logit_compression"
    columns: ClassVar[Sequence[str]] = ("packed_indices", "exact_values", "coeffs")
    vocab_size: Annotated[int, Field(ge=2, le=2**20)]
    polynomial_degree: Annotated[int, Field(ge=0, le=32)]
    invert_polynomial: bool = True
    with_sqrt_term: bool = False

    @property
    def d(self) -> int:
        return self.vocab_size

    def decode(self, columns: Columns, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities; see ``Compression.decode``."""
        packed, exact, coefficients = (columns[name] for name in self.columns)
        bits, num_fitted = id_bits(self.vocab_size), self.k - self.exact_k
        each = 64 // bits
        _check_width("packed_indices", packed.shape[1], -(-self.k // each), where)
        words, mask = packed.astype(np.uint64), np.uint64((1 << bits) - 1)
        ids = words[:, :, None] >> np.arange(each, dtype=np.uint64) * np.uint64(bits) & mask
        ids = ids.reshape(len(words), -1).astype(np.int64)
        beyond = words >> np.uint64(bits * each) if bits * each < 64 else np.zeros(1, np.uint64)
        _check_padding(not (beyond.any() or ids[:, self.k :].any()), where)
        places, sign = np.arange(1, num_fitted + 1, dtype=np.float64), -1.0 if self.invert_polynomial else 1.0
        terms = [places ** (sign * i) for i in range(self.polynomial_degree + 1)]
        terms += [np.sqrt(places)] * self.with_sqrt_term
        _check_width("exact_values", exact.shape[1], self.exact_k, where)
        _check_width("coeffs", coefficients.shape[1], len(terms) if num_fitted else 0, where)
        fitted = coefficients.astype(np.float64) @ np.stack(terms) if num_fitted else np.zeros((len(exact), 0))
        return ids[:, : self.k], np.concatenate([exact.astype(np.float64), fitted], 1)


AnyCompression = Compression | LegacyCompression


def id_bits(d: int) -> int:
    """The bits of a packed id of a vocabulary of size d."""
    return (d - 1).bit_length()


def read_compression(path: Path, kind: type[AnyCompression], vocab_size: int) -> AnyCompression:
    """The compression settings of a YAML file: they alone, or as they stand in a recipe of DistillKit.

    Raises:
        MissingError: the file is not there.
        DataError: it does not hold such settings.
        MismatchError: ids of such a vocabulary cannot have been packed by them.
    """
    if not path.is_file():
        raise MissingError(
            f"the compression settings {path} are not there",
            {"needed for": "DistillKit's compressed columns"},
            why="The bytes do not say how they were written, and read by other settings they give other numbers.",
            fix="DistillKit writes compression_config.yaml beside its files; name it, or another, by compression=FILE.",
        )
    try:
        values: Any = from_yaml(path.read_text(encoding="utf-8"))
        for name in ("teacher", kind.key):
            values = values.get(name, values)
        settings = kind.model_validate(values)
    except Exception as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            reason = ": ".join([*map(str, error.errors()[0]["loc"]), error.errors()[0]["msg"]])
        raise DataError(
            f"{path} does not hold DistillKit's compression settings",
            {"problem": reason, "wanted": ", ".join(kind.model_fields)},
            why="A setting that is not known, or not there, would change every number that is read.",
            fix="Take the file that DistillKit wrote beside the data, or the settings that the capture was made with.",
        ) from None
    bits = id_bits(settings.d)
    if settings.d < vocab_size - 1 or 1 << bits < vocab_size:
        raise MismatchError(
            "the vocabulary of the compression settings is smaller than the tokenizer's",
            {"compression": f"{settings.d:,} columns, {bits} bits an id", "wanted": f"{vocab_size:,}"},
            why="Ids were cut to so many bits when they were packed, or they are of another tokenizer.",
            fix="Use the tokenizer and the compression settings of the capture.",
        )
    return settings


def unpack(packed: np.ndarray, bits: int, number: int) -> np.ndarray:
    """Whole numbers of up to 32 bits, int64 [p, number], from bytes [p, ceil(number · bits / 8)], highest bit first."""
    starts = np.arange(number) * bits
    padded = np.pad(packed, ((0, 0), (0, 5)))
    window = np.zeros((len(packed), number), np.int64)
    for i in range(5):
        window = window << 8 | padded[:, starts // 8 + i]
    return (window >> (40 - bits - starts % 8)) & ((1 << bits) - 1)


def _check_padding(zero: bool, where: str) -> None:
    if not zero:
        raise DataError(
            f"{where} has ids where there should be nothing",
            {"bits after the last id": "not all 0", "expected": "0"},
            why="The ids were packed by another width, or are damaged; every one would be another token.",
            fix="Use the compression settings that the file was written with; mind `d` and `k`.",
        )


def _check_width(name: str, found: int, expected: int, where: str, meant: str = "") -> None:
    if found != expected:
        raise MismatchError(
            f"{where} has `{name}` of another width than the compression settings make",
            {"found": f"{found} a position{meant}", "settings": f"{expected} a position"},
            why="Cut at the wrong places, the bytes give ids and numbers that the teacher never said.",
            fix="Use the compression settings that the file was written with; mind `d` and `k`.",
        )


def _size(dtype: Dtype) -> int:
    return getattr(torch, dtype).itemsize


def _numbers(data: np.ndarray, dtype: Dtype) -> np.ndarray:
    """float64 [p, n] from bytes [p, n · size], little-endian."""
    numbers = np.frombuffer(data.tobytes(), "<u2" if dtype == "bfloat16" else f"<f{_size(dtype)}")
    if dtype == "bfloat16":
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    return numbers.astype(np.float64).reshape(len(data), data.shape[1] // _size(dtype))


FURTHER = ("log_rest", "entropy", "label_log_prob")
KINDS = {
    **dict.fromkeys(("tokens", "input_ids", "labels", "attention_mask", "keep"), (1, "whole numbers")),
    **dict.fromkeys(("ids", "token_ids", "packed_indices", *Compression.columns), (2, "whole numbers")),
    **dict.fromkeys(("log_probs", "logprobs", "top_values", "exact_values", "coeffs"), (2, "numbers")),
    **dict.fromkeys(FURTHER, (1, "numbers")),
    "document": (0, "whole numbers"),
}
"""The depth of the lists of each column that is read, and their contents; log_rest@2.0 is like log_rest."""


@dataclass(frozen=True)
class ForeignRow:
    """A text with the teacher's signal of its positions, as a file has it."""

    where: str
    document: int | None
    tokens: np.ndarray
    """int64 [n]"""
    loss_mask: np.ndarray | None
    """bool [n]; None where the file does not say."""
    counts: np.ndarray
    """int64 [p] entries of each position; their ``ids`` (int64) and ``log_probs`` (float64) are one after the other."""
    ids: np.ndarray
    log_probs: np.ndarray
    num_ordered: int | None
    """The first so many entries of a position are known never to rise; None is all of them."""
    further: dict[str, np.ndarray]
    """Columns of one number a position: log_rest, log_rest@2.0, entropy, label_log_prob."""


def name_of(column: str, names: Collection[str]) -> str | None:
    """The name that a column of the plain layout has here."""
    return next((name for name in NAMES[column] if name in names), None)


def read_rows(files: Sequence[Path], columns: Collection[str], settings: AnyCompression | None) -> Iterator[ForeignRow]:
    """The rows of files of plain columns, or of those that DistillKit compressed by some settings."""
    known = [name for name in sorted(columns) if kind_of(name)]
    further = [] if settings else [name for name in known if name.startswith(FURTHER)]
    tokens, ids_name, log_probs_name = (str(name_of(column, columns)) for column in NAMES)
    for path in files:
        with opened(path) as parquet:
            batches = read_batches(parquet, path, known)
            row_values = ({name: batch[name][row] for name in known} for batch in batches for row in range(len(batch)))
            for number, values in enumerate(row_values):
                where = f"{path} row {number}"
                lists = {name: value.values for name, value in values.items() if name != "document"}
                numbers = {name: _array(lists[name]).astype(np.float64) for name in further}
                if settings is not None:
                    packed = {name: _matrix(lists[name], path, name, where) for name in settings.columns}
                    if len({len(each) for each in packed.values()}) > 1:
                        raise bad(path, "a row has more positions of one column than of another", where)
                    ids, log_probs = settings.decode(packed, where)
                    counts, ids, log_probs = np.full(len(ids), settings.k, np.int64), ids.ravel(), log_probs.ravel()
                else:
                    each, others = lists[ids_name], lists[log_probs_name]
                    counts = _array(each.value_lengths()).astype(np.int64)
                    if not np.array_equal(counts, _array(others.value_lengths())):
                        raise bad(path, "a row has other numbers of ids than of log-probabilities", where)
                    ids, log_probs = _array(each.flatten()), _array(others.flatten())
                for name, column in numbers.items():
                    if len(column) != len(counts):
                        problem = f"`{name}` has {len(column)} numbers for {len(counts)} positions"
                        raise bad(path, problem, where)
                if "attention_mask" in lists and not _array(lists["attention_mask"]).all():
                    raise bad(path, "attention_mask leaves out some tokens, so the row is not one text", where)
                loss_mask = None
                if "keep" in lists:
                    loss_mask = _array(lists["keep"]).astype(bool)
                elif "labels" in lists:
                    labels = _array(lists["labels"]).astype(np.int64)
                    loss_mask = np.append(labels[1:] >= 0, np.zeros(min(1, len(labels)), bool))
                yield ForeignRow(
                    where,
                    int(values["document"].as_py()) if "document" in values and settings is None else None,
                    _array(lists[tokens]).astype(np.int64),
                    loss_mask,
                    counts,
                    ids.astype(np.int64),
                    log_probs.astype(np.float64),
                    None if settings is None else settings.exact_k,
                    numbers,
                )


def _array(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


def _matrix(lists: pa.Array, path: Path, name: str, where: str) -> np.ndarray:
    """Lists that are all of one length, [p, width]; those of bytes as uint8."""
    values, lengths = _array(lists.flatten()), _array(lists.value_lengths())
    if len(lengths) and lengths.min() != lengths.max():
        raise bad(path, f"`{name}` has {lengths.min()} to {lengths.max()} values a position", where)
    if name in Compression.columns:
        if values.size and (values.min() < 0 or values.max() > 255):
            raise bad(path, f"`{name}` is not of bytes", where)
        values = values.astype(np.uint8)
    return values.reshape(len(lengths), int(lengths[0]) if len(lengths) else 0)


def opened(path: Path) -> pq.ParquetFile:
    """A Parquet file; DataError where it is none, or a column that is known by its name holds something else."""
    try:
        parquet = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise bad(path, "it is not a Parquet file", str(error).splitlines()[0][:100]) from None
    for column in parquet.schema_arrow:
        if (known := kind_of(column.name)) is None:
            continue
        depth, inner = 0, column.type
        while pa.types.is_list(inner) or pa.types.is_large_list(inner):
            depth, inner = depth + 1, inner.value_type
        whole = pa.types.is_integer(inner) or (column.name == "keep" and pa.types.is_boolean(inner))
        if (depth, whole or pa.types.is_floating(inner)) != (known[0], True) or whole != (known[1] == "whole numbers"):
            raise bad(path, f"`{column.name}` is not of {'lists of ' * known[0]}{known[1]}", column.type)
    return parquet


def read_batches(parquet: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A few rows at a time of some columns; DataError where a value is not there, or the file ends too early."""
    try:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
            for name in columns:
                level = batch[name]
                while not level.null_count and isinstance(level, pa.ListArray | pa.LargeListArray):
                    level = level.values
                if level.null_count:
                    raise bad(path, f"`{name}` lacks values", "null")
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise bad(path, "it cannot be read to its end", str(error).splitlines()[0][:100]) from None


def kind_of(name: str) -> tuple[int, str] | None:
    """The kind of a column that is read, by its name: an entry of ``KINDS``."""
    return KINDS["log_rest"] if name.startswith("log_rest") else KINDS.get(name)


def bad(path: Path, what: str, found: object) -> DataError:
    """The error of a file that cannot be imported."""
    return DataError(
        f"{path} cannot be imported",
        {"problem": what, "found": found},
        why="What is read by guessing may be something else than the teacher said.",
        fix="See `stillroom store --help` for the layouts that are known; name the right one by layout=.",
    )

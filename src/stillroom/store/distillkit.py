"""A reader of DistillKit's compressed Parquet: bit-packed ids, and log-probabilities as exact values, fits, residuals.

A row is a text: ``input_ids``, and of each position two strings of bytes. ``bytepacked_indices`` holds k ids of
``ceil(log2 d)`` bits, highest bit first, filled up with zero bits to whole bytes. ``compressed_logprobs`` holds, in
this order and little-endian: ``exact_k`` values; the coefficients of the other values as a function of their place
(powers, sqrt, exp); and for each bin of residuals a scale and the residuals as whole numbers of a few bits, highest bit
first. With ``delta_encoding`` all that gives the differences from each value to the next. The older layout has the ids
from the lowest bit up in words of 64 bits, none across two words, and fits without residuals.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.errors import DataError, MismatchError, MissingError
from stillroom.recipe import from_yaml

CONFIG_FILE = "compression_config.yaml"
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
MOST = 65536


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bin(_Settings):
    """Residuals that share a scale."""

    scale_dtype: Dtype
    element_bits: Annotated[int, Field(gt=0, le=32)]
    num_elements: Annotated[int, Field(gt=0, le=MOST)]


class Compression(_Settings):
    """The settings by which ``compressed_logprobs`` and ``bytepacked_indices`` were written."""

    d: Annotated[int, Field(ge=2, le=2**20)]
    k: Annotated[int, Field(gt=0, le=MOST)]
    exact_k: Annotated[int, Field(ge=0)]
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[Annotated[int, Field(ge=0, le=32)] | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False


class LegacyCompression(_Settings):
    """The settings by which ``packed_indices``, ``exact_values`` and ``coeffs`` were written."""

    vocab_size: Annotated[int, Field(ge=2, le=2**20)]
    k: Annotated[int, Field(gt=0, le=MOST)]
    exact_k: Annotated[int, Field(ge=0)]
    polynomial_degree: Annotated[int, Field(ge=0, le=32)]
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Dtype = "float32"

    @property
    def d(self) -> int:
        return self.vocab_size


AnyCompression = Compression | LegacyCompression


def id_bits(d: int) -> int:
    """The bits of a packed id of a vocabulary of size d."""
    return (d - 1).bit_length()


def read_compression(path: Path, legacy: bool) -> AnyCompression:
    """The compression settings of a YAML file: they alone, or as they stand in a recipe of DistillKit.

    Raises:
        MissingError: the file is not there.
        DataError: it does not hold such settings.
    """
    if not path.is_file():
        raise MissingError(
            f"the compression settings {path} are not there",
            {"needed for": "DistillKit's compressed columns"},
            why="The bytes do not say how they were written, and read by other settings they give other numbers.",
            fix=f"DistillKit writes {CONFIG_FILE} beside its files; name it, or your own, by compression=FILE.",
        )
    kind, key = (LegacyCompression, "legacy_logit_compression") if legacy else (Compression, "logprob_compressor")
    try:
        values: Any = from_yaml(path.read_text(encoding="utf-8"))
        for name in ("teacher", key):
            values = values.get(name, values)
        settings = kind.model_validate(values)
        fitted = settings.k - settings.exact_k
        if fitted < 0:
            raise ValueError(f"exact_k {settings.exact_k} is more than k {settings.k}")
        if isinstance(settings, Compression):
            if sum(bin_.num_elements for bin_ in settings.residual_bins) > fitted:
                raise ValueError(f"residual_bins have more than the {fitted} elements of k - exact_k")
            if fitted and not (settings.polynomial_terms or settings.residual_bins):
                raise ValueError("values beyond exact_k have neither polynomial_terms nor residual_bins")
    except Exception as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error).splitlines()[0]
        raise DataError(
            f"{path} does not hold DistillKit's compression settings",
            {"problem": reason, "wanted": ", ".join(kind.model_fields)},
            why="A setting that is not known, or not there, would change every number that is read.",
            fix="Take the file that DistillKit wrote beside the data, or the settings that the capture was made with.",
        ) from None
    return settings


def check_vocabulary(settings: AnyCompression, vocab_size: int) -> None:
    """Raises MismatchError where ids of such a vocabulary cannot have been packed by these settings."""
    if settings.d < vocab_size - 1 or 1 << id_bits(settings.d) < vocab_size:
        raise MismatchError(
            "the vocabulary of the compression settings is smaller than the tokenizer's",
            {"compression": f"{settings.d:,} columns, {id_bits(settings.d)} bits an id", "wanted": f"{vocab_size:,}"},
            why="Ids were cut to so many bits when they were packed, or they are of another tokenizer.",
            fix="Use the tokenizer and the compression settings of the capture.",
        )


def decode(settings: AnyCompression, columns: dict[str, np.ndarray], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int64 [p, k], and log-probabilities, float64 [p, k], in the order in which they were packed.

    Args:
        columns: the bytes (or words, or numbers) of p positions, [p, width] each, by the name of the column.
        where: the row, as a message calls it.

    Raises:
        MismatchError: the bytes of a position are not as many as the settings make.
        DataError: bits that must be zero are not.
    """
    if isinstance(settings, LegacyCompression):
        return _decode_legacy(settings, columns, where)
    packed, bits = columns["bytepacked_indices"], id_bits(settings.d)
    used, width = bits * settings.k, packed.shape[1]
    if width != (used + 7) // 8:
        fits = next((b for b in range(1, 33) if (b * settings.k + 7) // 8 == width), None)
        meant = f", so {fits} bits an id: {2 ** (fits - 1) + 1:,} to {2**fits:,} columns" if fits else ""
        raise MismatchError(
            f"{where} has ids of another width than the compression settings make",
            {
                "found": f"{width} bytes a position{meant}",
                "settings": f"{(used + 7) // 8} bytes: k {settings.k}, d {settings.d:,}, {bits} bits an id",
            },
            why="Cut at the wrong bits, every id but the first would be another token.",
            fix="Use the compression settings that the file was written with; mind `d` and `k`.",
        )
    _check_padding(not used % 8 or not (packed[:, -1] & (1 << 8 - used % 8) - 1).any(), where)
    return unpack(packed, bits, settings.k), _decode_values(settings, columns["compressed_logprobs"], where)


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


def _decode_values(settings: Compression, data: np.ndarray, where: str) -> np.ndarray:
    """Log-probabilities, float64 [p, k], from their bytes."""
    terms, num_fitted = settings.polynomial_terms or [], settings.k - settings.exact_k
    sizes = [settings.exact_k * _size(settings.exact_dtype), len(terms) * _size(settings.term_dtype)]
    for bin_ in settings.residual_bins:
        sizes += [_size(bin_.scale_dtype), (bin_.num_elements * bin_.element_bits + 7) // 8]
    _check_width(data, sum(sizes), "compressed_logprobs", where)
    parts = iter(np.split(data, np.cumsum(sizes)[:-1], axis=1))
    exact = _numbers(next(parts), settings.exact_dtype)
    fitted = np.zeros((len(data), num_fitted))
    coefficients = _numbers(next(parts), settings.term_dtype)
    if terms:  # functions of a value's place, rounded as the coefficients are
        points = np.linspace(0, 1, num_fitted) if settings.normalize_t else np.arange(num_fitted, dtype=np.float64)
        with np.errstate(over="ignore"):
            columns = [{"sqrt": np.sqrt, "exp": np.exp}[i](points) if isinstance(i, str) else points**i for i in terms]
        functions = torch.from_numpy(np.stack(columns, 1)).to(getattr(torch, settings.term_dtype)).double().numpy()
        fitted = coefficients @ functions.T
    at = 0
    for bin_ in settings.residual_bins:
        scale = _numbers(next(parts), bin_.scale_dtype)
        steps = unpack(next(parts), bin_.element_bits, bin_.num_elements)
        steps = 2 * steps - 1 if bin_.element_bits == 1 else steps - (1 << bin_.element_bits - 1)
        fitted[:, at : at + bin_.num_elements] += steps * scale
        at += bin_.num_elements
    values = np.concatenate([exact, fitted], 1)
    return np.cumsum(values, 1) if settings.delta_encoding else values


def _decode_legacy(
    settings: LegacyCompression, columns: dict[str, np.ndarray], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids from words of 64 bits, lowest bits first, and values that are exact or fitted by a polynomial."""
    bits, k = id_bits(settings.vocab_size), settings.k
    each = 64 // bits
    _check_width(columns["packed_indices"], -(-k // each), "packed_indices", where)
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(bits)
    words = columns["packed_indices"].astype(np.uint64)
    ids = (words[:, :, None] >> shifts & np.uint64((1 << bits) - 1)).reshape(len(words), -1).astype(np.int64)
    beyond = words >> np.uint64(bits * each) if bits * each < 64 else np.zeros(1, np.uint64)
    _check_padding(not (beyond.any() or ids[:, k:].any()), where)
    exact, coefficients, num_fitted = columns["exact_values"], columns["coeffs"], k - settings.exact_k
    places = np.arange(1, num_fitted + 1, dtype=np.float64)
    sign = -1.0 if settings.invert_polynomial else 1.0
    terms = [places ** (sign * i) for i in range(settings.polynomial_degree + 1)]
    terms += [np.sqrt(places)] * settings.with_sqrt_term
    _check_width(exact, settings.exact_k, "exact_values", where)
    _check_width(coefficients, len(terms) if num_fitted else 0, "coeffs", where)
    fitted = coefficients.astype(np.float64) @ np.stack(terms) if num_fitted else np.zeros((len(exact), 0))
    return ids[:, :k], np.concatenate([exact.astype(np.float64), fitted], 1)


def _check_width(data: np.ndarray, expected: int, name: str, where: str) -> None:
    if data.shape[1] != expected:
        raise MismatchError(
            f"{where} has `{name}` of another width than the compression settings make",
            {"found": f"{data.shape[1]} a position", "settings": f"{expected} a position"},
            why="Cut at the wrong places, the bytes give numbers that the teacher never said.",
            fix="Use the compression settings that the file was written with.",
        )


def _size(dtype: Dtype) -> int:
    return getattr(torch, dtype).itemsize


def _numbers(data: np.ndarray, dtype: Dtype) -> np.ndarray:
    """float64 [p, n] from bytes [p, n · size], little-endian."""
    size = _size(dtype)
    if not data.size:
        return np.zeros((len(data), data.shape[1] // size))
    if dtype == "bfloat16":
        return (np.ascontiguousarray(data).view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.ascontiguousarray(data).view(f"<f{size}").astype(np.float64)

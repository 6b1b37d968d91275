"""What a stored signal takes: bytes a position of each kind, with where the figure comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

MEASURED = "measured, benchmarks/store.json"

EXTRAPOLATED = "extrapolated from benchmarks/store.json: bytes an entry"


@dataclass(frozen=True)
class Kind:
    """One way of keeping what a teacher said of a position."""

    name: str
    bytes_per_position: float
    source: str


@dataclass(frozen=True)
class _Measured:
    """The store as it was measured, on one teacher."""

    columns: int
    top_k: float
    """Bytes of an entry of a top-k signal, with all that the signal has besides."""
    drawn: float
    """The same of a signal with drawn entries."""
    entries: float
    """Entries of a position by default."""


SMALL = _Measured(4_096, 62.41 / 50, 17.54 / 13.50, 13.50)

LARGE = _Measured(128_256, 79.39 / 50, 36.19 / 19.93, 19.93)

SMALL_VOCABULARY = 32_768
"""Up to here the store is taken to be as with 4,096 columns, and beyond as with 128,256."""

TABLES = {"top_k": 2.43, "drawn": 0.55}
"""Bytes a position of the codec's tables, in a shard of 212,732 positions."""

KEEP_AND_ARROW = 0.31

DRAWN_IDS = 12 / 50
"""Different ids among draws with replacement (docs/guide/capture.md)."""


def id_bytes(columns: int) -> int:
    """Of a token's id in a plain column."""
    return 2 if columns <= 2**16 else 4


def full(columns: int, itemsize: int = 2) -> Kind:
    """Every logit, in bfloat16 or with another size of a number."""
    name = {2: "every logit, bfloat16", 4: "every logit, float32"}[itemsize]
    return Kind(name, columns * itemsize, f"{columns:,} · {itemsize} bytes")


def plain_top_k(columns: int, k: int) -> Kind:
    """Ids and log-probabilities in bfloat16, as plain columns."""
    k, each = min(k, columns), id_bytes(columns)
    return Kind(f"top {k}, plain columns", k * (each + 2), f"{k} · (id of {each} bytes + bfloat16)")


def stored(columns: int, kind: str = "head_and_sample", entries: int | None = None) -> Kind:
    """This project's store: signal, tables, tokens and keep.

    Args:
        kind: as in a capture's `signal.kind`; not `full`.
        entries: `k` of top_k, `most` of top_p (which then is an upper bound), `draws` of sampled, `head` + `draws` of
            head_and_sample. None is that kind's default.
    """
    store = SMALL if columns <= SMALL_VOCABULARY else LARGE
    at = f"{store.columns:,} columns"
    rest = id_bytes(columns) + KEEP_AND_ARROW
    if kind in ("top_k", "top_p"):
        default = {"top_k": 50, "top_p": 100}[kind]
        entries = min(columns, default if entries is None else entries)
        source = f"{MEASURED if (kind, entries) == ('top_k', 50) else EXTRAPOLATED}, {at}"
        most = "at most " if kind == "top_p" else ""
        return Kind(f"store, {most}top {entries}", entries * store.top_k + TABLES["top_k"] + rest, source)
    if kind == "sampled":
        draws = 50 if entries is None else entries
        each = draws * DRAWN_IDS * store.drawn + TABLES["drawn"] + rest
        return Kind(f"store, {draws} draws", each, f"{EXTRAPOLATED}, {at}, {draws * DRAWN_IDS:.0f} ids")
    share = 1.0 if entries is None else entries / 20
    each = share * store.entries * store.drawn + TABLES["drawn"] + rest
    name = "store, default (head and draws)" if share == 1 else f"store, head and draws, at most {entries}"
    return Kind(name, each, f"{MEASURED if share == 1 else EXTRAPOLATED}, {at}")


def hidden_states(width: int, num_layers: int, form: str = "int8") -> Kind:
    """Inner states of so many layers: exact."""
    each = width + 4 if form == "int8" else 2 * width
    source = f"{num_layers} · ({width:,} + 4)" if form == "int8" else f"{num_layers} · 2 · {width:,}"
    return Kind(f"hidden states, {form}", num_layers * each, f"{source} bytes")


def signal_kinds(columns: int) -> Sequence[Kind]:
    """The ways of keeping a signal that are set beside each other."""
    return [
        full(columns),
        *(plain_top_k(columns, k) for k in (50, 128)),
        *(stored(columns, "top_k", k) for k in (50, 128)),
        stored(columns),
    ]

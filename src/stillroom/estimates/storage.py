"""What stored signals take: bytes of a position for each kind, and the source of the figure; `stillroom plan storage`
tells it with no model at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from stillroom.config import Config
from stillroom.estimates.report import CostReport, bytes_text

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

    vocab_size: int
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


def id_bytes(vocab_size: int) -> int:
    """Bytes of a token's id in a plain column."""
    return 2 if vocab_size <= 2**16 else 4


def full(vocab_size: int, itemsize: int = 2) -> Kind:
    """Every logit, in bfloat16 or with another size of a number."""
    name = {2: "every logit, bfloat16", 4: "every logit, float32"}[itemsize]
    return Kind(name, vocab_size * itemsize, f"{vocab_size:,} · {itemsize} bytes")


def plain_top_k(vocab_size: int, k: int) -> Kind:
    """Ids and log-probabilities in bfloat16, as plain columns."""
    k, each = min(k, vocab_size), id_bytes(vocab_size)
    return Kind(f"top {k}, plain columns", k * (each + 2), f"{k} · (id of {each} bytes + bfloat16)")


def stored(vocab_size: int, kind: str = "head_and_sample", entries: int | None = None) -> Kind:
    """This project's store: signal, tables, tokens and keep.

    Args:
        kind: as in a capture's `signal.kind`; not `full`.
        entries: `k` of top_k, `most` of top_p (which then is an upper bound), `draws` of sampled, `head` + `draws` of
            head_and_sample. None is that kind's default.
    """
    store = SMALL if vocab_size <= SMALL_VOCABULARY else LARGE
    at = f"{store.vocab_size:,} columns"
    rest = id_bytes(vocab_size) + KEEP_AND_ARROW
    if kind in ("top_k", "top_p"):
        default = {"top_k": 50, "top_p": 100}[kind]
        entries = min(vocab_size, default if entries is None else entries)
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


def signal_kinds(vocab_size: int) -> Sequence[Kind]:
    """The ways of keeping a signal that are set beside each other."""
    return [
        full(vocab_size),
        *(plain_top_k(vocab_size, k) for k in (50, 128)),
        *(stored(vocab_size, "top_k", k) for k in (50, 128)),
        stored(vocab_size),
    ]


# --- stillroom plan storage ------------------------------------------------------------------------------------------
class Storage(Config):
    """What is to be stored: prompts times length positions, each of a distribution over the vocabulary."""

    prompts: Annotated[int, Field(gt=0, le=10**15)]
    """Texts."""
    vocab: Annotated[int, Field(gt=0, le=10**8)]
    """Columns of the teacher's head."""
    length: Annotated[int, Field(gt=0, le=10**9)]
    """Tokens of each text."""
    width: Annotated[int, Field(gt=0, le=10**7)] | None = None
    """Hidden channels of the teacher, for inner states."""
    layers: Annotated[int, Field(gt=0, le=10**4)] | None = None
    """How many of its layers are kept."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Storage":
        if (self.width is None) != (self.layers is None):
            raise ValueError("hidden states need both `width` and `layers`")
        return self


def storage_report(config: Storage) -> CostReport:
    """Positions, logits, and the bytes of each way of keeping them."""
    report = CostReport("storage")
    positions = config.prompts * config.length
    logits = positions * config.vocab
    powers = bytes_text(logits).removesuffix("bytes").removesuffix("B").strip()  # of 1,024
    report.add("of these texts", "positions", positions, "count", f"{config.prompts:,} x {config.length:,}")
    report.add("of these texts", "logits", f"{logits:.3g} ({powers})", "text", f"x {config.vocab:,}")
    add_kinds(report, "stored", config.vocab, positions)
    if config.width is not None and config.layers is not None:
        for form in ("int8", "bfloat16"):
            kind = hidden_states(config.width, config.layers, form)
            report.add(
                "hidden states", kind.name, kind.bytes_per_position * positions, "bytes", f"{kind.source} a position"
            )
    report.assumptions += [
        "every position is stored: where prompts are not learned, only answers are",
        "the store was measured with a teacher of 4,096 columns, and at 128,256 with made-up ones of 4.5 nats; "
        "up to 32,768 columns the first is taken and beyond the second; a sure teacher takes less",
    ]
    return report


def add_kinds(report: CostReport, section: str, vocab_size: int, positions: float | None) -> None:
    """The ways of keeping a signal beside each other: of all positions, or of one where their number is not known."""
    for kind in signal_kinds(vocab_size):
        if positions is None:
            report.add(section, kind.name, kind.bytes_per_position, "each", kind.source)
        else:
            each = f"{kind.bytes_per_position:,.1f} bytes a position: {kind.source}"
            report.add(section, kind.name, kind.bytes_per_position * positions, "bytes", each)

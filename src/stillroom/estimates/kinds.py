"""`stillroom plan storage`: what every way of keeping a signal takes, with no model at all."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config import Config
from stillroom.estimates.report import CostReport
from stillroom.estimates.storage import hidden_states, signal_kinds


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
    report.add("of these texts", "positions", positions, "count", f"{config.prompts:,} x {config.length:,}")
    report.add("of these texts", "logits", f"{logits:.3g} ({_binary(logits)})", "text", f"x {config.vocab:,}")
    add_kinds(report, "stored", config.vocab, positions)
    if config.width is not None and config.layers is not None:
        for form in ("int8", "bfloat16"):
            _add(report, "hidden states", config.width, config.layers, form, positions)
    report.assumptions += [
        "every position is stored: where prompts are not learnt, only answers are",
        "the store was measured with a teacher of 4,096 columns, and at 128,256 with made-up ones of 4.5 nats; "
        "up to 32,768 columns the first is taken and beyond the second; a sure teacher takes less",
    ]
    return report


def add_kinds(report: CostReport, section: str, columns: int, positions: float | None) -> None:
    """The ways of keeping a signal beside each other: of all positions, or of one where their number is not known."""
    for kind in signal_kinds(columns):
        if positions is None:
            report.add(section, kind.name, kind.bytes_per_position, "each", kind.source)
        else:
            each = f"{kind.bytes_per_position:,.1f} bytes a position: {kind.source}"
            report.add(section, kind.name, kind.bytes_per_position * positions, "bytes", each)


def _add(
    report: CostReport, section: str, width: int, layers: int, form: Literal["int8", "bfloat16"] | str, positions: int
) -> None:
    kind = hidden_states(width, layers, form)
    report.add(section, kind.name, kind.bytes_per_position * positions, "bytes", f"{kind.source} a position")


def _binary(number: float) -> str:
    for unit in ("", "Ki", "Mi", "Gi", "Ti"):
        if number < 1024:
            return f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} Pi"

"""Words: the titles of metrics, and numbers, sizes and names as a reader sees them."""

import math
import unicodedata
from typing import Literal, NamedTuple

from stillroom.evaluate.results import Number


class Metric(NamedTuple):
    """The facts that a reader has to know of a metric."""

    title: str
    unit: str = ""
    """The unit; none is a plain number, % is a share of 1, shown times a hundred."""
    better: Literal["lower", "higher", "nearer 1", "as the teacher"] = "lower"


METRICS = {
    "cross_entropy_nats": Metric("cross-entropy", "nats a token"),
    "perplexity": Metric("perplexity"),
    "bits_per_byte": Metric("bits per byte", "bits"),
    "forward_kl_nats": Metric("KL to the teacher", "nats a token"),
    "forward_kl_p95_nats": Metric("KL to the teacher, 95th percentile", "nats"),
    "reverse_kl_nats": Metric("reverse KL", "nats a token"),
    "reverse_kl_p95_nats": Metric("reverse KL, 95th percentile", "nats"),
    "top1_agreement": Metric("same top token as the teacher", "%", "higher"),
    "top10_overlap": Metric("overlap of the top 10 tokens", "%", "higher"),
    "accepted_mass": Metric("accepted mass Σ min(t, s)", "%", "higher"),
    "speculative_tokens": Metric("speculative decoding, γ = 4", "tokens a step", "higher"),
    "entropy_nats": Metric("entropy", "nats a token", "as the teacher"),
    "entropy_ratio": Metric("entropy ÷ the teacher's", "", "nearer 1"),
    "calibration_error": Metric("calibration error (ECE, 15 bins)", "%"),
    "recovered_gap": Metric("recovered gap", "%", "higher"),
}
SHARE = "%"


def metric(name: str) -> Metric:
    """A metric by its name in the results; one that is not known here is called by that name."""
    return METRICS.get(name, Metric(name.replace("_", " ")))


def what(name: str) -> str:
    """The title of a metric; a task and its metric as they are called."""
    return METRICS[name].title if name in METRICS else name


def value(number: Number, unit: str = "") -> str:
    """The value with its unit of measure where that is %, and as many digits as its error bears."""
    return f"{_plain(number.value, _digits(number, unit), unit)}{' %' if unit == SHARE else ''}"


def error(number: Number, unit: str = "") -> str:
    """± the standard error; empty where it is not known."""
    return "" if number.error is None else f"± {_plain(number.error, _digits(number, unit), unit)}"


def interval(number: Number, unit: str = "") -> str:
    """The 95 % interval; empty where it is not known."""
    if number.low is None or number.high is None:
        return ""
    digits = _digits(number, unit)
    return f"{_plain(number.low, digits, unit)} to {_plain(number.high, digits, unit)}"


def _digits(number: Number, unit: str) -> int:
    """Decimals: two digits of the error, but at least one decimal and at most four (two of a percentage)."""
    most = 2 if unit == SHARE else 4
    scale = 100 if unit == SHARE else 1
    if number.error is None or not 0 < number.error < math.inf:
        return 1 if unit == SHARE else max(1, min(4, 3 - _magnitude(number.value)))
    return max(1, min(most, 1 - _magnitude(number.error * scale)))


def _magnitude(x: float) -> int:
    return math.floor(math.log10(abs(x))) if x and math.isfinite(x) else 0


def _plain(x: float, digits: int, unit: str) -> str:
    if math.isnan(x):
        return "not a number"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    text = f"{x * (100 if unit == SHARE else 1):,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def size(size_bytes: int | None) -> str:
    """Bytes in the unit that suits them."""
    if size_bytes is None:
        return "–"
    amount, units = float(size_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:,.0f} {units[0]}" if units[0] == "bytes" else f"{amount:,.1f} {units[0]}"


HARMLESS = "\n\t\u200c\u200d"
"""Newline and tab, and the joiners that scripts and emoji are spelled with."""


def visible(text: str) -> str:
    """The text with each sign that a screen would obey or hide, such as an escape or a change of direction, as a code;
    newlines and tabs stay."""

    def harmless(sign: str) -> bool:
        return sign.isprintable() or sign in HARMLESS or unicodedata.category(sign) == "Zs"

    return "".join(sign if harmless(sign) else f"⟨U+{ord(sign):04X}⟩" for sign in text)


def shortened(text: str, length: int) -> str:
    """The text on one line and ``visible``, with its middle left out where it is longer than ``length``."""
    text = visible(" ".join(text.split()))
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"

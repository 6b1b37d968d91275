"""``stillroom capture``."""

from typing import Any

from stillroom.capture.config import CaptureConfig, Part
from stillroom.cli.arguments import Arguments, run_verb


def main(arguments: Arguments) -> int:
    return run_verb("capture", CaptureConfig, summary, arguments)


def summary(record: dict[str, Any]) -> str:
    """The result of a capture in a few lines; that of a part in one, since several workers may share a terminal."""
    store, out = record["store"], record["config"]["out"]
    if record["config"]["part"] is not None:
        part = Part(**record["config"]["part"])
        return (
            f"{part}: {store['documents']:,} documents, {store['positions']:,} positions, "
            f"{store['size_bytes'] / 2**20:.1f} MiB in {out}/{part.folder}/store"
        )
    hidden = store.get("hidden_bytes_per_position")
    of_hidden = "" if hidden is None else f", {hidden:,} of them hidden states"
    lines = [
        f"store     {out}/store",
        f"holds     {store['documents']:,} documents, {store['positions']:,} positions",
        f"size      {store['size_bytes'] / 2**20:.1f} MiB, {store['bytes_per_position']:.1f} bytes a position"
        + of_hidden,
        f"kept      {store['entries_per_position']:.1f} entries a position; storing them cost "
        f"{store['codec_error_nats']:.1e} nats",
    ]
    if usage := record.get("usage"):
        lines.append(
            f"asked     {usage['requests']:,} requests, {usage['retries']:,} tried again; "
            f"{usage['prompt_tokens']:,} tokens read, {usage['completion_tokens']:,} written; cost {usage['cost']:.2f}"
        )
    return "\n".join(lines)

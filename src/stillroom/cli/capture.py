"""``stillroom capture``."""

from typing import Any

from stillroom.capture.config import CaptureConfig
from stillroom.cli.arguments import Arguments
from stillroom.config import explain, load


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        print(f"usage: stillroom capture [RECIPE.yaml] [key=value …]\n\n{explain(CaptureConfig)}")
        return 0
    config = load(CaptureConfig, arguments.recipe, arguments.overrides)

    from stillroom.models import quiet

    quiet()
    if "dry-run" in arguments.flags:
        from stillroom.capture.plan import make_plan

        print(make_plan(config), end="")
        return 0

    from stillroom.capture.run import run
    from stillroom.cli.progress import Progress

    with Progress(quiet="quiet" in arguments.flags) as progress:
        record = run(
            config, resume="resume" in arguments.flags, overwrite="overwrite" in arguments.flags, report=progress
        )
    print(summary(record))
    return 0


def summary(record: dict[str, Any]) -> str:
    """The result of a capture in a few lines."""
    store = record["store"]
    lines = [
        f"store     {record['config']['out']}/store",
        f"holds     {store['documents']:,} documents, {store['positions']:,} positions",
        f"size      {store['size_bytes'] / 2**20:.1f} MiB, {store['bytes_per_position']:.1f} bytes a position",
        f"kept      {store['entries_per_position']:.1f} entries a position; storing them cost "
        f"{store['codec_error_nats']:.1e} nats",
    ]
    if usage := record.get("usage"):
        lines.append(
            f"asked     {usage['requests']:,} requests, {usage['retries']:,} tried again; "
            f"{usage['prompt_tokens']:,} tokens read, {usage['completion_tokens']:,} written; cost {usage['cost']:.2f}"
        )
    return "\n".join(lines)

"""``stillroom prune``."""

from typing import Any

from stillroom.cli.arguments import Arguments, run_verb
from stillroom.prune.config import PruneConfig


def main(arguments: Arguments) -> int:
    return run_verb("prune", PruneConfig, summary, arguments)


def summary(record: dict[str, Any]) -> str:
    """The result of a cut: what was kept and why, and what it cost."""
    lines = [f"{'model':16}{record['config']['out']}/model", record["report"]]
    if held_out := record.get("held_out"):
        before, after = held_out["model_cross_entropy_nats"], held_out["cut_cross_entropy_nats"]
        lines.append(
            f"{'held out':16}cross-entropy {before:.4f} nats before, {after:.4f} after, with no training "
            f"({held_out['num_tokens']:,} tokens)"
        )
    return "\n".join(lines)

"""``stillroom distill``."""

from typing import Any

from stillroom.cli.arguments import Arguments, run_verb
from stillroom.distill.config import DistillConfig


def main(arguments: Arguments) -> int:
    return run_verb("distill", DistillConfig, summary, arguments)


def summary(record: dict[str, Any]) -> str:
    """The result of a run in a few lines."""
    lines = [f"model     {record['config']['out']}/model ({record['student']['num_parameters']:,} parameters)"]
    lines.append(f"trained   {record['steps']} steps, {record['num_kept']:,} tokens, {record['time_s']:.0f} s")
    if held_out := record.get("held_out"):
        values = [f"{name.removesuffix('_nats').replace('_', ' ')} {value:.4f}" for name, value in held_out.items()]
        lines.append(f"held out  {', '.join(values[:-1])} ({held_out['num_tokens']:,} tokens; nats)")
    return "\n".join(lines)

"""``stillroom distill``."""

from typing import Any

from stillroom.cli.arguments import Arguments
from stillroom.config import explain, load
from stillroom.distill.config import DistillConfig


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        print(f"usage: stillroom distill [RECIPE.yaml] [key=value …]\n\n{explain(DistillConfig)}")
        return 0
    config = load(DistillConfig, arguments.recipe, arguments.overrides)

    from stillroom.models import quiet

    quiet()
    if "dry-run" in arguments.flags:
        from stillroom.distill.plan import make_plan

        print(make_plan(config), end="")
        return 0

    from stillroom.cli.progress import Progress
    from stillroom.distill.run import run

    with Progress(quiet="quiet" in arguments.flags) as progress:
        record = run(
            config, resume="resume" in arguments.flags, overwrite="overwrite" in arguments.flags, report=progress
        )
    print(summary(record))
    return 0


def summary(record: dict[str, Any]) -> str:
    """The result of a run in a few lines."""
    lines = [f"model     {record['config']['out']}/model ({record['student']['num_parameters']:,} parameters)"]
    lines.append(f"trained   {record['steps']} steps, {record['num_kept']:,} tokens, {record['time_s']:.0f} s")
    if held_out := record.get("held_out"):
        values = [f"{name.removesuffix('_nats').replace('_', ' ')} {value:.4f}" for name, value in held_out.items()]
        lines.append(f"held out  {', '.join(values[:-1])} ({held_out['num_tokens']:,} tokens; nats)")
    return "\n".join(lines)

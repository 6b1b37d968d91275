"""``stillroom report``: the reports of evaluations, made anew from their files."""

from pathlib import Path

from stillroom.cli.arguments import Arguments
from stillroom.errors import ConfigError

USAGE = """\
usage: stillroom report RUN…

Makes report.html and report.md anew in the folder of each evaluation (the `out` of `stillroom evaluate`), from its
results.json, its items/ and the metrics.jsonl of the runs that made its models. report.html needs matplotlib:
pip install "stillroom[report]"."""


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        print(USAGE)
        return 0
    flags = arguments.flags - {"quiet", "debug"}
    if not arguments.words or arguments.overrides or flags:
        given = [*arguments.words, *arguments.overrides, *(f"--{flag}" for flag in sorted(flags))]
        raise ConfigError(
            "`report` takes the folders of evaluations, and no settings",
            {"given": " ".join(given) or "nothing", "wanted": "RUN…"},
            why="What is in a report is decided by what was evaluated.",
            fix="Write `stillroom report RUN…`; a path with a sign of equality in it is written as ./a=b.",
        )

    from stillroom.evaluate.report import rebuild

    for word in arguments.words:
        for path in rebuild(Path(word)):
            print(f"report    {path}")
    return 0

"""Write: results.json and the files beside it -> report.html and report.md."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from stillroom.errors import DataError, MissingError
from stillroom.evaluate.report.content import make_report
from stillroom.evaluate.report.markdown import to_markdown
from stillroom.evaluate.report.page import to_page
from stillroom.evaluate.results import Results
from stillroom.runs import writing


def write_report(results: Results, out: Path, runs: Mapping[str, Path]) -> list[Path]:
    """Writes ``out/report.md`` and ``out/report.html``; returns their paths.

    Args:
        results: what was found; the items that they name lie in ``out``.
        runs: by model, the folder of the run that made it. What is not there is named in the report.

    Raises:
        MissingError: the plotting library is not installed; report.md is written all the same.
    """
    report = make_report(results, out, runs)
    written = [out / "report.md"]
    _write(written[0], to_markdown(report))
    try:
        page = to_page(report)
    except MissingError as error:
        raise MissingError(
            error.what, error.values, why=f"{written[0]} is written; the page has charts.", fix=f"{error.fix} Then run "
            f"`stillroom report {out}`.",
        ) from None  # fmt: skip
    written.append(out / "report.html")
    _write(written[1], page)
    return written


def rebuild(folder: Path) -> list[Path]:
    """Writes the reports of an evaluation anew from its files.

    Raises:
        MissingError: the folder holds no results.json, or the plotting library is not installed.
        DataError: results.json is not what an evaluation wrote.
    """
    results = read_results(folder)
    return write_report(results, folder, {name: Path(run) for name, run in results.runs.items()})


def read_results(folder: Path) -> Results:
    """The results in the folder of an evaluation.

    Raises:
        MissingError: they are not there.
        DataError: they are not what an evaluation wrote.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise MissingError(
            f"{folder} holds no evaluation",
            {"expected": path, "found": "nothing of that name"},
            why="A report is made of the results of `stillroom evaluate`.",
            fix="Name the folder that was its `out`.",
        )
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{path} is not the results of an evaluation",
            {"at": ".".join(map(str, first["loc"])) or "the top", "problem": first["msg"]},
            why="A report must not show what nobody measured.",
            fix="Restore the file, or evaluate again.",
        ) from None


def _write(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

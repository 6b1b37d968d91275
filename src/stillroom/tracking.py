"""Tracking: the metrics of a run sent to the dashboards that were asked for."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.errors import require


class Tracker(NamedTuple):
    log: Callable[[Mapping[str, float], int], Any]
    """Takes numbers by name, and the step."""
    close: Callable[[], Any]


def check(kinds: Collection[str]) -> None:
    """Raises MissingError where a package that was asked for is not installed."""
    for kind in kinds:
        require(kind, kind, f"tracking=[{kind}]")


def track(kinds: Collection[str], folder: Path, config: Mapping[str, Any], *, after: int = 0) -> Tracker:
    """One tracker for all of ``kinds``; projects are named `stillroom`, and the run after its folder.

    What the packages print goes to stderr, since stdout is for results.

    Args:
        after: the last step that was logged before, where a run is resumed.

    Raises:
        MissingError: a package that was asked for is not installed.
    """
    check(kinds)
    with contextlib.ExitStack() as started:
        trackers: list[Tracker] = []
        for kind in dict.fromkeys(kinds):
            with contextlib.redirect_stdout(sys.stderr):
                trackers.append(_TRACKERS[kind](folder, config, after))
            started.callback(trackers[-1].close)
        closing = started.pop_all()

    def log(values: Mapping[str, float], step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step)

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            closing.close()

    return Tracker(log, close)


def _tensorboard(folder: Path, config: Mapping[str, Any], after: int) -> Tracker:  # noqa: ARG001
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(folder: Path, config: Mapping[str, Any], after: int) -> Tracker:  # noqa: ARG001
    import wandb

    run = wandb.init(
        project="stillroom", name=folder.name, id=_run_id(folder), resume="allow", config=dict(config), dir=str(folder)
    )
    return Tracker(lambda values, step: run.log(dict(values), step=step), run.finish)


def _trackio(  # kept: an entry of the table
    folder: Path,
    config: Mapping[str, Any],
    after: int,  # noqa: ARG001
) -> Tracker:
    import trackio

    run = trackio.init(project="stillroom", name=_run_id(folder), resume="allow", config=dict(config), embed=False)
    return Tracker(lambda values, step: run.log(dict(values), step=step), run.finish)


def _mlflow(folder: Path, config: Mapping[str, Any], after: int) -> Tracker:  # noqa: ARG001
    """To the server of MLFLOW_TRACKING_URI, or else into files in the run's folder."""
    import mlflow

    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(server or (folder / "mlflow").absolute().as_uri())
    mlflow.set_experiment("stillroom")
    known = folder / "mlflow-run"
    if known.is_file():
        mlflow.start_run(run_id=known.read_text().strip())
    else:
        known.write_text(mlflow.start_run(run_name=_run_id(folder)).info.run_id)
        mlflow.log_dict(dict(config), "config.json")
    return Tracker(lambda values, step: mlflow.log_metrics(dict(values), step=step), mlflow.end_run)


def _run_id(folder: Path) -> str:
    """A name for the run that is the same when it is resumed, and another for another folder of the same name."""
    digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
    return f"{folder.name.replace(' ', '-')}-{digest}"


_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}

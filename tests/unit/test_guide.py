"""docs/guide/losses.md says what the code does: names, settings, defaults, signals, where each loss takes a student."""

import importlib.util
import inspect
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stillroom.errors import MismatchError
from stillroom.losses.block import check_sparse
from stillroom.losses.config import LOSSES, ByEntropy, ObjectiveConfig, Schedule

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
TEXT = (GUIDE / "losses.md").read_text(encoding="utf-8")
CONFIGS = {
    c.model_fields["kind"].annotation.__args__[0]: c for c in typing.get_args(typing.get_args(ObjectiveConfig)[0])
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = re.split(r"^#+ ", TEXT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def settings(text: str) -> dict[str, float | str]:
    """All of the form `name` = value."""
    pairs = re.findall(r"`(\w+)` = ([\w.]+\w)", text)
    return {name: float(value) if value[0].isdigit() else value for name, value in pairs}


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_losses", GUIDE / "plot_losses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "heading",
    ["What they are", "What they take", "What they are good for, and what is known", "Which signal they learn from"],
)
def test_every_table_has_every_loss_once(heading):
    assert sorted(name for row in rows(heading) for name in dict.fromkeys(names(row[0]))) == sorted(
        [*LOSSES, *(["alpha_beta"] if heading.startswith("Which signal") else [])]  # α + β = 1, and otherwise
    )


@pytest.mark.parametrize("row", rows("What they take"), ids=lambda row: row[0])
def test_the_settings_and_defaults_are_those_of_the_loss_and_of_the_recipe(row):
    (name,) = names(row[0])
    parameters = inspect.signature(LOSSES[name].load()).parameters.values()
    told = settings(row[1])
    assert told == {p.name: p.default for p in parameters if p.name != "block"}
    assert told == {field: CONFIGS[name].model_fields[field].default for field in told}


def test_the_other_defaults_are_those_of_the_code():
    told = settings(TEXT.partition("## What they take")[2].partition("\n|")[0])
    assert told == {"weight": CONFIGS["forward_kl"].model_fields["weight"].default}
    told = settings(TEXT.partition("## Weights, schedules and tokens")[2])
    fields = {**Schedule.model_fields, **ByEntropy.model_fields}
    assert set(told) == {"over", "certain", "uncertain"}
    assert told == {name: fields[name].default for name in told}


def test_every_policy_for_what_is_missing_is_told():
    field = CONFIGS["forward_kl"].model_fields["missing"]
    assert [row[0].strip("`") for row in rows("What a truncated store left out")] == list(
        typing.get_args(field.annotation)
    )


@pytest.mark.parametrize("row", rows("Which signal they learn from"), ids=lambda row: row[0])
@pytest.mark.parametrize(("column", "sampled"), [(2, False), (3, True)])
def test_what_is_refused_is_what_the_code_refuses(row, column, sampled):
    for name in names(row[0]):
        if row[column] == "refused":
            with pytest.raises(MismatchError):
                check_sparse(name, sampled=sampled, temperatures=(1.0,))
        else:
            check_sparse(name, sampled=sampled, temperatures=(1.0,))


@pytest.mark.parametrize("row", rows("Where they take a student"), ids=lambda row: f"{row[0]} {row[1]}")
def test_where_a_student_with_one_mode_lands(row, plots):
    (name,) = names(row[0])
    arguments = {k: int(v) if k == "k" else v for k, v in settings(row[1]).items()}
    found = plots.fit(name, **arguments)
    assert [plots.lands(found), f"{found.width:.1f}", f"{found.second:.2f}"] == row[2:]


def test_what_is_drawn_is_in_the_table(plots):
    told = {(names(row[0])[0], row[1]) for row in rows("Where they take a student")}
    drawn = {(n, ", ".join(f"`{k}` = {v}" for k, v in a.items())) for n, a in plots.OTHERWISE.items()}
    assert told == drawn | {(name, "default") for name in LOSSES}
    assert {"losses.png", "losses-gradients.png"} <= {path.name for path in GUIDE.glob("*.png")}


def test_every_divergence_covers_modes_that_overlap(plots, monkeypatch):
    monkeypatch.setattr(plots, "MODES", ((0.6, 26.0), (0.4, 34.0)))
    ranked = {"hinge_ranking", "logistic_ranking"}
    assert all(plots.fit(name).second == pytest.approx(0.4, abs=0.03) for name in LOSSES if name not in ranked)


def test_who_pulls_a_mode_that_the_student_does_not_know(plots):
    pulls = {name: plots.pull(name, plots.bell(22.0, 5.0)) for name in LOSSES}
    shares = {name: (pull[44] / pull.abs().max()).item() for name, pull in pulls.items()}
    assert shares["forward_kl"] > 0.7
    for name in ("reverse_kl", "skew_kl", "skew_reverse_kl", "jensen_shannon", "total_variation"):
        assert 0 <= shares[name] < 0.01, name
    strength = pulls["jensen_shannon"].abs().max() / pulls["forward_kl"].abs().max()
    torch.testing.assert_close(strength, torch.tensor(1 / 6, dtype=strength.dtype), rtol=0.05, atol=0)

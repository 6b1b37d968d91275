"""The tables LOSSES and DISTANCES agree with the functions, the settings, the kernels and the guide."""

import inspect
import re
import subprocess
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from stillroom.kernels import Term, numba_fused
from stillroom.losses import divergences
from stillroom.losses.config import DISTANCES, LOSSES, HiddenObjective, LossEntry, ObjectiveConfig
from stillroom.losses.fused_linear import kernel_terms
from stillroom.losses.objective import Objective
from stillroom.signals import Logits

GUIDE = Path(__file__).parents[3] / "docs" / "guide"
EVERY = {**LOSSES, **DISTANCES}
WEIGHTS = ("kind", "weight", "token_weight")


@pytest.mark.parametrize("name", EVERY)
def test_the_settings_are_the_functions_keyword_arguments(name):
    entry = EVERY[name]
    function = entry.load()
    keywords = {
        n: p.default
        for n, p in inspect.signature(function).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and n != "chunk_bytes"  # which changes no result
    }
    settings = {n: f.get_default() for n, f in entry.settings.model_fields.items() if n not in WEIGHTS}
    assert function.__name__ == name
    assert typing.get_args(entry.settings.model_fields["kind"].annotation) == (name,)
    assert set(settings) == set(keywords)
    assert all(value == keywords[n] or (n, value) == ("heads", "auto") for n, value in settings.items())


@pytest.mark.parametrize("name", LOSSES)
def test_a_recipe_takes_every_loss(name):
    objective = TypeAdapter(ObjectiveConfig).validate_python({"kind": name})
    assert type(objective) is LOSSES[name].settings
    assert objective.needs_teacher == (LOSSES[name].signal != "none")


@pytest.mark.parametrize("name", DISTANCES)
def test_a_recipe_takes_every_distance_by_name_and_with_its_settings(name):
    for value in (name, {"kind": name}):
        assert type(HiddenObjective(kind="hidden", distance=value).distance) is DISTANCES[name].settings  # pyright: ignore


def test_kernels_know_the_losses_whose_numbers_the_table_has():
    known = {name for name, entry in LOSSES.items() if entry.kernel_numbers is not None}
    assert set(numba_fused.KINDS) == known
    if find_spec("triton"):
        from stillroom.kernels import triton_fused

        assert known - {"adaptive_kl"} == set(triton_fused.KINDS)


@pytest.mark.parametrize(("page", "table"), [("losses.md", LOSSES), ("hidden.md", DISTANCES)])
def test_the_guide_has_every_formula(page, table):
    lines = (GUIDE / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    formulas = {name: row[1] for row in reversed(rows) for name in re.findall(r"\w+", row[0]) if name in table}
    assert formulas == {name: entry.formula for name, entry in table.items()}


def test_the_table_and_the_settings_of_distill_import_no_torch():
    code = "import sys; import stillroom.losses.config, stillroom.distill.config; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_what_kernels_know_of_an_objective_is_worked_out_once(monkeypatch):
    calls, checked = [], LossEntry.checked

    def counted(entry, arguments):
        calls.append(arguments)
        return checked(entry, arguments)

    monkeypatch.setattr(LossEntry, "checked", counted)
    objectives = [Objective("a", divergences.forward_kl, 1.0, {"temperature": 2.0})]
    signal = Logits(torch.zeros(2, 5))
    terms = [kernel_terms(objectives, [], signal, dtype=torch.float32, device=torch.device("cpu")) for _ in range(3)]
    assert terms == [(Term("forward_kl", 2.0),)] * 3
    assert calls == [{"temperature": 2.0}]

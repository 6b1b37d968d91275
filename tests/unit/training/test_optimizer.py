"""The optimizer's groups and the schedules."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from conftest import FAMILIES, build_model
from stillroom.training.config import AdamWConfig
from stillroom.training.state import build_optimizer, build_schedule


def decay_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Each trained parameter's weight decay, by its name; every parameter is in exactly one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    members = [(names[id(p)], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert set(Counter(name for name, _ in members).values()) == {1}
    return dict(members)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_group_and_norms_and_biases_do_not_decay(family):
    model = build_model(family)
    decay = decay_of(model, build_optimizer(model, AdamWConfig(learning_rate=1e-3, weight_decay=0.1)))
    assert decay.keys() == dict(model.named_parameters()).keys()
    for name, value in decay.items():
        small = "norm" in name or "ln_" in name or name.endswith("bias")
        assert value == (0.0 if small else 0.1), name
    assert set(decay.values()) == {0.0, 0.1}


def test_what_is_frozen_is_left_out():
    model = build_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    decay = decay_of(model, build_optimizer(model, AdamWConfig(learning_rate=1e-3)))
    assert dict(model.named_parameters()).keys() - decay.keys() == {"model.embed_tokens.weight", "model.norm.weight"}


def test_matrices_alone_make_one_group():
    model = nn.Linear(3, 3, bias=False)
    assert len(build_optimizer(model, AdamWConfig(learning_rate=1e-3)).param_groups) == 1


def test_the_settings_reach_adam():
    """One step by the formula of arXiv 1711.05101."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
    config = AdamWConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, epsilon=0.3)
    optimizer = build_optimizer(model, config)
    weight, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), 1):
        model.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        root = math.sqrt(second / (1 - 0.9**step)) + 0.3
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * (first / (1 - 0.8**step)) / root
        assert model.weight.item() == pytest.approx(weight, rel=1e-12)


def rates(num_steps: int, **settings) -> list[float]:
    """The learning rate of each step, and that after the last."""
    optimizer = build_optimizer(nn.Linear(2, 2), AdamWConfig(learning_rate=0.5, **settings))
    schedule = build_schedule(optimizer, AdamWConfig(learning_rate=0.5, **settings), num_steps)
    found = [schedule.get_last_lr()[0]]
    for _ in range(num_steps):
        optimizer.step()
        schedule.step()
        found.append(schedule.get_last_lr()[0])
        assert {group["lr"] for group in optimizer.param_groups} == {found[-1]}
    return found


WARM = [0.0, 0.125, 0.25, 0.375]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", lambda share: 0.25 * (1 + math.cos(math.pi * share))),
        ("linear", lambda share: 0.5 * (1 - share)),
        ("constant", lambda _: 0.5),
    ],
)
def test_schedules(schedule, after):
    wanted = WARM + [after(i / 16) for i in range(17)]
    assert rates(20, warmup=0.2, schedule=schedule) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_a_warm_up_the_first_step_is_the_fastest(schedule):
    found = rates(5, schedule=schedule)
    assert found[0] == 0.5 == max(found)
    assert found[-1] == (0.5 if schedule == "constant" else 0.0)

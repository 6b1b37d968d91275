"""From the objectives of a recipe to losses with their names, weights and arguments."""

import pytest
import torch

from stillroom.losses.block import LogitBlock
from stillroom.losses.config import LOSSES, ByEntropy, CrossEntropy, ForwardKL, ReverseKL, Schedule
from stillroom.losses.objective import build_objectives, needs_teacher, scheduled, value_at


@pytest.mark.parametrize("config", [ForwardKL, ReverseKL, CrossEntropy])
def test_each_kind_is_its_loss(config):
    (kind,) = config.model_fields["kind"].annotation.__args__
    (objective,) = build_objectives([config(kind=kind, weight=0.25, temperature=3.0)])
    assert objective.name == kind
    assert objective.loss is LOSSES[kind].load()
    assert objective.weight == 0.25
    assert objective.arguments["temperature"] == 3.0
    assert set(objective.arguments) == set(config.model_fields) - {"kind", "weight", "token_weight"}


def test_two_of_one_kind_are_told_apart():
    objectives = build_objectives(
        [
            ForwardKL(kind="forward_kl", temperature=1.0),
            CrossEntropy(kind="cross_entropy"),
            ForwardKL(kind="forward_kl", temperature=4.0),
        ]
    )
    assert [o.name for o in objectives] == ["forward_kl_0", "cross_entropy", "forward_kl_1"]
    assert [o.arguments["temperature"] for o in objectives] == [1.0, 1.0, 4.0]


def test_hard_labels_alone_need_no_teacher():
    hard, soft = CrossEntropy(kind="cross_entropy"), ReverseKL(kind="reverse_kl")
    assert not needs_teacher([hard, hard])
    assert needs_teacher([hard, soft])


def test_a_schedule_goes_from_start_to_stop_and_stays():
    linear = Schedule(kind="linear", start=1.0, stop=0.0, over=0.5)
    assert [value_at(linear, p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 0.5, 0.0, 0.0, 0.0]
    cosine = Schedule(kind="cosine", start=1.0, stop=3.0)
    assert [value_at(cosine, p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 2 - 2**0.5 / 2, 2.0, 3.0])
    assert value_at(0.3, 0.7) == 0.3


def test_what_follows_a_schedule_is_built_for_a_point_of_the_run():
    config = ForwardKL(
        kind="forward_kl",
        weight=Schedule(kind="linear", start=1.0, stop=0.0),
        temperature=Schedule(kind="linear", start=4.0, stop=1.0),
    )
    hard = CrossEntropy(kind="cross_entropy")
    assert scheduled([hard, config])
    assert not scheduled([hard])
    begun, ended = build_objectives([config], 0.0)[0], build_objectives([config])[0]
    assert (begun.weight, begun.arguments["temperature"]) == (1.0, 4.0)
    assert (ended.weight, ended.arguments["temperature"]) == (0.0, 1.0)


def test_token_weights_are_those_of_the_recipe():
    student = CrossEntropy(kind="cross_entropy", token_weight=ByEntropy(kind="student_entropy", certain=2.0))
    teacher = CrossEntropy(kind="cross_entropy", token_weight=ByEntropy(kind="teacher_entropy"))
    assert not needs_teacher([student])
    assert needs_teacher([teacher])
    block = LogitBlock(torch.zeros(1, 3), torch.tensor([[50.0, 0.0, 0.0]]), torch.zeros(1, dtype=torch.long))
    counts = [o.token_weight(block).item() for o in build_objectives([student, teacher]) if o.token_weight]
    assert counts == pytest.approx([1.0, 0.0], abs=1e-6)
    (plain,) = build_objectives([CrossEntropy(kind="cross_entropy")])
    assert plain.token_weight is None

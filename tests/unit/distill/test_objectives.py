"""From the objectives of a recipe to losses with their names, weights and arguments."""

import pytest

from stillroom.distill.objective_config import CrossEntropy, ForwardKL, ReverseKL
from stillroom.distill.objectives import build_objectives, needs_teacher
from stillroom.losses import LOSSES


@pytest.mark.parametrize("config", [ForwardKL, ReverseKL, CrossEntropy])
def test_each_kind_is_its_loss(config):
    (kind,) = config.model_fields["kind"].annotation.__args__
    (objective,) = build_objectives([config(kind=kind, weight=0.25, temperature=3.0)])
    assert objective.name == kind
    assert objective.loss is LOSSES[kind]
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

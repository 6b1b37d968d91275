"""The sizes of a part of a model, from its config alone."""

import pytest

from published import PUBLISHED
from stillroom.errors import ConfigError, MismatchError
from stillroom.estimates.pruned_sizes import pruned_values
from stillroom.pruning.config import BestLayers, PruningConfig


def test_a_cut_student_has_the_sizes_of_its_part():
    half = pruned_values(PruningConfig(layers=14, width=1792), PUBLISHED["Qwen2 7B"][0], "model")
    assert {name: half[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")} == {
        "num_hidden_layers": 14, "hidden_size": 1792, "num_attention_heads": 14, "head_dim": 128,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cut", "error", "message"),
    [
        (PruningConfig(layers=29), MismatchError, "28 layers"),
        (PruningConfig(layers=BestLayers(kind="best", count=29)), MismatchError, "layers.count"),
        (PruningConfig(width=3585), ConfigError, "whole share"),
        (PruningConfig(width=7168), MismatchError, "hidden_size is more than the model has"),
    ],
)
def test_what_the_model_does_not_have_is_no_plan(cut, error, message):
    with pytest.raises(error, match=message):
        pruned_values(cut, PUBLISHED["Qwen2 7B"][0], "model")

"""The sizes of a part of a model, from its config alone."""

from published import PUBLISHED
from stillroom.cut.config import CutConfig
from stillroom.cut.sizes import cut_values


def test_a_cut_student_has_the_sizes_of_its_part():
    half = cut_values(CutConfig(layers=14, width=1792), PUBLISHED["Qwen2 7B"][0], "the model")
    assert {name: half[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")} == {
        "num_hidden_layers": 14, "hidden_size": 1792, "num_attention_heads": 14, "head_dim": 128,
    }  # fmt: skip

"""The plan of a cut, from configs alone: which layers, which widths, and everything that cannot be."""

import pytest

from conftest import build_config
from stillroom.errors import ConfigError, MismatchError
from stillroom.pruning.config import BestLayers, EveryLayer, PruningConfig, Width
from stillroom.pruning.plan import evenly, plan_pruning

SHAPE = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 32}
TEACHER = build_config("llama", num_hidden_layers=6, **SHAPE)


@pytest.mark.parametrize(
    ("count", "num_layers", "wanted"),
    [
        (1, 6, (0,)),
        (2, 6, (0, 5)),
        (3, 6, (0, 2, 5)),  # 2.5 goes to the even number
        (4, 6, (0, 2, 3, 5)),
        (6, 6, (0, 1, 2, 3, 4, 5)),
        (5, 32, (0, 8, 16, 23, 31)),
    ],
)
def test_evenly_spaced_with_the_first_and_the_last(count, num_layers, wanted):
    assert evenly(count, num_layers) == wanted


def test_even_layers_are_all_different():
    assert all(len(set(evenly(n, total))) == n for total in range(1, 40) for n in range(1, total + 1))


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (None, (0, 1, 2, 3, 4, 5)),
        ((1, 4), (1, 4)),
        (EveryLayer(kind="every", step=2), (1, 3, 5)),
        (EveryLayer(kind="every", step=4), (3,)),
        (EveryLayer(kind="every", step=6), (5,)),
        (BestLayers(kind="best", count=6), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_layers_that_are_known_without_measuring(rule, wanted):
    plan = plan_pruning(PruningConfig(layers=rule), TEACHER)
    assert (plan.layers, plan.measured, plan.config.num_hidden_layers) == (wanted, False, len(wanted))


def test_the_best_layers_have_to_be_measured_but_their_number_is_known():
    plan = plan_pruning(PruningConfig(layers=BestLayers(kind="best", count=4, contiguous=True)), TEACHER)
    assert (plan.layers, plan.measured, plan.config.num_hidden_layers) == (None, True, 4)
    told = "4 of 6: those that matter most by block influence after one stretch is dropped"
    assert (plan.facts()["layers"], plan.facts()["measured"]) == (told, "on 64 documents")


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (12, (12, 3, 1, 16)),
        (24, (24, 6, 2, 32)),
        (Width(hidden_size=18), (18, 6, 2, 32)),
        (Width(num_attention_heads=3), (24, 3, 1, 32)),
        (Width(hidden_size=9, num_attention_heads=3, intermediate_size=5), (9, 3, 1, 5)),
        (Width(), (24, 6, 2, 32)),
    ],
)
def test_widths(width, wanted):
    plan = plan_pruning(PruningConfig(width=width), TEACHER)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert tuple(getattr(plan.config, name) for name in names) == wanted
    assert plan.config.head_dim == 4
    assert plan.measured == (wanted != (24, 6, 2, 32))
    assert TEACHER.hidden_size == 24


def test_a_head_keeps_its_channels_where_the_config_does_not_name_them():
    teacher = build_config("qwen2", num_hidden_layers=2, **SHAPE)
    assert getattr(teacher, "head_dim", None) is None
    assert plan_pruning(PruningConfig(width=Width(hidden_size=10)), teacher).config.head_dim == 4
    assert getattr(plan_pruning(PruningConfig(layers=1), teacher).config, "head_dim", None) is None


@pytest.mark.parametrize(
    ("settings", "error", "what", "said"),
    [
        ({"layers": 7}, MismatchError, "layers asks for layers that are not there", "7 layers"),
        ({"layers": (2, 6)}, MismatchError, "layers asks for layers that are not there", "6 layers, 0 to 5"),
        ({"layers": EveryLayer(kind="every", step=7)}, MismatchError, "layers.step asks for", "every 7th"),
        ({"layers": BestLayers(kind="best", count=7)}, MismatchError, "layers.count asks for", "7 layers"),
        ({"width": 25}, MismatchError, "width is more than the model has", "24"),
        ({"width": Width(intermediate_size=33)}, MismatchError, "width.intermediate_size is more than", "32"),
        ({"width": 16}, ConfigError, "width=16 is not a whole share", "such as 12"),
        ({"width": Width(num_attention_heads=4)}, ConfigError, "not a whole number of head groups", "multiple of 3"),
        (
            {"width": Width(num_attention_heads=4, num_key_value_heads=1)},
            ConfigError,
            "cannot be shared out among the key and value heads",
            "up to 3",
        ),
        ({"width": Width(hidden_size=16)}, ConfigError, "the hidden size does not divide by the heads", "16"),
    ],
)
def test_what_cannot_be(settings, error, what, said):
    with pytest.raises(error, match=what) as caught:
        plan_pruning(PruningConfig(**settings), TEACHER, "model")
    assert said in str(caught.value)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma"])
def test_where_the_family_does_not_ask_for_it_the_hidden_size_need_not_divide(family):
    teacher = build_config(family, num_hidden_layers=2, **SHAPE)
    assert plan_pruning(PruningConfig(width=Width(hidden_size=17)), teacher).config.hidden_size == 17


def test_a_width_that_the_familys_own_code_refuses_is_an_error_of_the_users(monkeypatch):
    monkeypatch.setattr(type(TEACHER), "validate", lambda self: 1 / (self.hidden_size - 18))
    with pytest.raises(MismatchError, match="the family llama cannot have these widths") as caught:
        plan_pruning(PruningConfig(width=Width(hidden_size=18)), TEACHER)
    assert "division by zero" in str(caught.value)

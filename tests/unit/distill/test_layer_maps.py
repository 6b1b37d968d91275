"""Layer maps: every kind by hand, and what does not fit is told from the configs alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import SaveModel
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.hidden_plan import pair_layers
from stillroom.distill.plan import DistillPlan, make_plan
from stillroom.errors import ConfigError, MismatchError
from stillroom.losses.config import Every, Kept, Last, Pairs, Uniform
from stillroom.recipe import from_yaml

MakePlan = Callable[..., DistillPlan]


@pytest.fixture
def plan(recipe: Path, tmp_path: Path, saved_model: SaveModel) -> MakePlan:
    """Plans the tiny recipe with one hidden objective: a student of 3 layers of 16, a teacher of 6 layers of 24."""

    def make(objective: str, *settings: str) -> DistillPlan:
        student = saved_model("llama", num_hidden_layers=3)
        teacher = saved_model("llama", num_hidden_layers=6, hidden_size=24)
        words = [f"student.model={student}", f"teacher.model={teacher}", f"out={tmp_path}/run", "device=cpu"]
        objectives = f"objectives=[{{kind: cross_entropy}}, {{kind: hidden{objective}}}]"
        return make_plan(load(DistillConfig, recipe, [*words, objectives, *settings]))

    return make


@pytest.mark.parametrize(
    ("layers", "sizes", "pairs"),
    [
        (Uniform(kind="uniform"), (3, 6), ((0, 0), (1, 2), (2, 5))),
        (Uniform(kind="uniform"), (6, 6), tuple((i, i) for i in range(6))),
        (Uniform(kind="uniform"), (4, 2), ((0, 0), (1, 0), (2, 1), (3, 1))),
        (Uniform(kind="uniform", one_in=2), (6, 12), ((1, 2), (3, 7), (5, 11))),
        (Uniform(kind="uniform"), (1, 6), ((0, 5),)),
        (Last(kind="last", count=2), (3, 6), ((1, 4), (2, 5))),
        (Every(kind="every", step=2), (3, 6), ((0, 1), (1, 3), (2, 5))),
        (Every(kind="every", step=4), (3, 6), ((0, 3),)),
        (Kept(kind="kept"), (3, 6), ((0, 0), (1, 4), (2, 5))),
        (Pairs(kind="pairs", pairs=((0, 5), ("embeddings", 0))), (3, 6), ((0, 5), ("embeddings", 0))),
    ],
)
def test_each_map_by_hand(layers, sizes, pairs):
    assert pair_layers(layers, *sizes, (0, 4, 5), "layers") == pairs


@pytest.mark.parametrize("layers", [Last(kind="last", count=4), Every(kind="every", step=7)])
def test_a_map_that_pairs_nothing_is_an_error(layers):
    with pytest.raises(ConfigError, match="there are not so many layers"):
        pair_layers(layers, 3, 6, None, "layers")


@pytest.mark.parametrize("short", ["uniform", "{kind: uniform}", "auto"])
def test_a_map_may_be_named_alone(plan, short):
    made = plan(f", layers: {short}")
    assert from_yaml(str(made))["layers"] == {"hidden": "0 → 0, 1 → 2, 2 → 5; a projector each from 16 to 24"}
    assert made.config.objectives[1].layers == Uniform(kind="uniform")  # and is written down


def test_the_short_forms_with_a_number(plan):
    assert plan(", layers: {last: 2}").config.objectives[1].layers == Last(kind="last", count=2)
    assert plan(", layers: {every: 2}").config.objectives[1].layers == Every(kind="every", step=2)
    texts = plan(", layers: [[embeddings, embeddings], [2, 5]], projector: {kind: linear, shared: true}").hidden.texts()
    assert texts == {"hidden": "embeddings → embeddings, 2 → 5; one projector from 16 to 24"}


def test_a_projector_is_there_where_the_widths_differ_and_the_distance_minds(plan, saved_model):
    assert plan("").config.objectives[1].projector.kind == "linear"
    assert plan(", distance: linear_cka").config.objectives[1].projector is None
    same = f"teacher.model={saved_model('llama', num_hidden_layers=6)}"
    assert plan("", same).config.objectives[1].projector is None
    assert plan(", projector: linear", same).config.objectives[1].projector.kind == "linear"


def test_relation_heads_divide_all_widths(plan):
    """Student: 2 heads of 8, 1 group; teacher: 2 heads of 12, 1 group. All widths: 16, 8, 24, 12."""
    made = plan(", distance: attention_relation")
    assert made.config.objectives[1].distance.heads == 2
    assert made.hidden.texts() == {"hidden": "0 → 0, 1 → 2, 2 → 5; queries, keys and values"}


@pytest.mark.parametrize(
    ("objective", "error", "what", "told"),
    [
        (", layers: [[0, 6]]", MismatchError, "objectives.1.layers names a layer that is not there", "0 to 5"),
        (", layers: [[3, 0]]", MismatchError, "names a layer that is not there", "the student has: 3 layers, 0 to 2"),
        (", layers: [[0, 1], [0, 1]]", ConfigError, "names a pair twice", "different: 1"),
        (", layers: {last: 4}", ConfigError, "there are not so many layers", "last: 4"),
        (", layers: kept", MismatchError, "the student was not cut from this teacher", "from_teacher"),
        (", projector: null", MismatchError, "different widths, and has no projector", "16 channels"),
        (", weights_by_layer: [1, 2]", ConfigError, "weights_by_layer does not fit the layer map", "3: 0 → 0"),
        (", distance: {kind: attention_relation, heads: 3}", MismatchError, "heads does not divide", "heads: 3"),
        (
            ", distance: attention_relation, layers: [[final_norm, final_norm]]",
            ConfigError,
            "names an end of the model, which has no attention",
            "final_norm → final_norm",
        ),
        (", distance: linear_cka, projector: linear", ConfigError, "not valid", "takes no projector"),
        (", distance: attention_relation, normalise: rms", ConfigError, "not valid", "no `normalise`"),
        (", layers: [[0]]", ConfigError, "objectives.1.layers.pairs.0.1", "is required"),
        (", layers: [[0, middle]]", ConfigError, "objectives.1.layers.pairs.0.1", "'embeddings' or 'final_norm'"),
        (", projector: linar", ConfigError, "objectives.1.projector", "did you mean linear"),
        (", layers: uniformly", ConfigError, "objectives.1.layers", "did you mean uniform"),
        (", distance: cosin", ConfigError, "objectives.1.distance", "did you mean cosine"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_a_model_is_loaded(plan, objective, error, what, told):
    with pytest.raises(error) as raised:
        plan(objective)
    assert what in str(raised.value)
    assert told in str(raised.value)


def test_the_identity_needs_room(plan, saved_model):
    wide = f"student.model={saved_model('llama', num_hidden_layers=3, hidden_size=32)}"
    with pytest.raises(MismatchError, match="cannot start from the identity"):
        plan(", projector: {kind: linear, start: identity}", wide)


def test_hidden_states_need_a_teacher(plan):
    with pytest.raises(ConfigError, match="do not go together") as error:
        plan("", "teacher=null")
    assert "objectives.1 (hidden) needs a `teacher`" in str(error.value)

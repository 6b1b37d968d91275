"""The settings of a cut: every form of `layers` and `width`, and what is said of a bad one."""

import pytest

from stillroom.config import load, replace
from stillroom.errors import ConfigError
from stillroom.pruning.config import BestLayers, EveryLayer, PruningConfig, Width


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("layers=3", 3),
        ("layers=[0, 2, 5]", (0, 2, 5)),
        ("layers={kind: every, step: 2}", EveryLayer(kind="every", step=2)),
        ("layers={kind: best, count: 3}", BestLayers(kind="best", count=3)),
        ("layers=null", None),
        ("width=96", 96),
        ("width={hidden_size: 96}", Width(hidden_size=96)),
    ],
)
def test_each_form_is_read_and_stays_what_it_is(word, wanted):
    config = load(PruningConfig, overrides=[word])
    name = word.partition("=")[0]
    assert getattr(config, name) == wanted
    assert getattr(replace(config, {"documents": 7}), name) == wanted


@pytest.mark.parametrize(
    ("word", "key", "said"),
    [
        ("layers=0", "layers", "greater than 0, not 0"),
        (
            "layers=true",
            "layers",
            "should be a number of layers, a list of them, or settings with a kind (every, best)",
        ),
        ("layers=2.5", "layers", "should be a number of layers"),
        ("layers=few", "layers", "should be a number of layers"),
        ("layers=[]", "layers", "needs at least 1"),
        ("layers=[0, 2, 2]", "layers", "rising order, each once, not [0, 2, 2]"),
        ("layers=[0, -1]", "layers.1", "greater than or equal to 0, not -1"),
        ("layers=[0, x]", "layers.1", "integer, not 'x'"),
        ("layers={step: 2}", "layers", "needs kind"),
        ("layers={kind: evry, step: 2}", "layers", "there is no kind `evry`; did you mean every?"),
        ("layers={kind: every, step: 1}", "layers.step", "greater than or equal to 2, not 1"),
        ("layers={kind: best}", "layers.count", "is required"),
        ("layers={kind: best, count: 2, by: size}", "layers.by", "'block_influence' or 'loss_increase', not 'size'"),
        ("width=0", "width", "greater than 0, not 0"),
        ("width=[96]", "width", "should be a hidden size, or settings"),
        ("width={intermediate_size: x}", "width.intermediate_size", "integer, not 'x'"),
        ("documents=0", "documents", "greater than 0, not 0"),
    ],
)
def test_what_is_wrong_is_said_of_the_form_that_was_given_alone(word, key, said):
    with pytest.raises(ConfigError, match=f"the setting `{key}` is not valid") as caught:
        load(PruningConfig, overrides=[word])
    assert said in str(caught.value)
    assert " or should be" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "key", "near"),
    [
        ("layers={kind: best, count: 2, cout: 3}", "layers.cout", "count"),
        ("width={hidden: 3}", "width.hidden", "hidden_size"),
    ],
)
def test_an_unknown_setting_has_a_proposal(word, key, near):
    with pytest.raises(ConfigError, match=f"unknown setting `{key}`") as caught:
        load(PruningConfig, overrides=[word])
    assert f"did you mean: {near}" in str(caught.value)

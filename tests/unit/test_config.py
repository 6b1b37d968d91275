"""The Config base: reading, overriding, refusing, explaining."""

import json
import pkgutil
import typing
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from ruamel.yaml import YAML

import stillroom
from stillroom.capture.config import CaptureConfig
from stillroom.chat.config import ChatConfig
from stillroom.cli.report import BetweenConfig
from stillroom.cli.store import ConcatConfig, JoinConfig
from stillroom.config import Config, PathText, explain, load, replace
from stillroom.distill.config import DistillConfig
from stillroom.doctor.run import DoctorConfig
from stillroom.errors import ConfigError, MissingError
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.storage import Storage
from stillroom.evaluate.config import EvaluateConfig, ExactMatch, LastWord, MinimalPairs, MultipleChoice
from stillroom.prune.config import PruneConfig
from stillroom.pruning.config import Layers
from stillroom.recipe import differences, parse_json, read_recipe, to_yaml
from stillroom.store.config import ImportConfig


class Circle(Config):
    """Round."""

    kind: Literal["circle"]
    radius_m: Annotated[float, Field(gt=0)]
    """From the middle to the rim, in metres."""
    name: str = "round"
    """What it is called."""


class Square(Config):
    """Four sides."""

    kind: Literal["square", "box"]
    side_m: float = 1.0
    """Of one side, in metres."""
    name: str = "round"
    """What it is called."""


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Inner(Config):
    """A nested node."""

    count: int = 3
    """How many."""
    rate: float = 0.5
    """How fast."""
    shape: Shape | None = None
    """A shape in the middle."""


class Outer(Config):
    """The root."""

    name: str
    """What it is called."""
    inner: Inner = Inner()
    """A nested node."""
    shapes: Annotated[tuple[Shape, ...], Field(strict=False)] = ()
    """Some shapes."""
    by_name: dict[str, Inner] = Field(default_factory=dict)
    """Nodes by any name."""
    size: int | Literal["auto"] = "auto"
    """A number, or auto."""
    flag: bool = False
    """On or off."""
    path: PathText = "."
    """Where."""


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe and gives its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def refused(recipe):
    """Loads a recipe that must be refused, and gives the error."""

    def load_it(text: str | bytes, *overrides: str) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            load(Outer, recipe(text), overrides)
        return caught.value

    return load_it


# --- reading and overriding ------------------------------------------------------------------------------------------


def test_a_recipe_is_read_and_defaults_fill_the_rest(recipe):
    config = load(Outer, recipe("name: a\nshapes: [{kind: circle, radius_m: 2.5}, {kind: box}]\ninner: {count: 7}\n"))
    assert config == Outer(
        name="a",
        shapes=(Circle(kind="circle", radius_m=2.5), Square(kind="box")),
        inner=Inner(count=7),
    )
    assert (config.inner.rate, config.size, config.flag) == (0.5, "auto", False)


def test_settings_need_no_recipe():
    config = load(Outer, overrides=["name=a", "inner.count=2", "shapes=[{kind: box, side_m: 4}]"])
    assert (config.name, config.inner.count, config.shapes) == ("a", 2, (Square(kind="box", side_m=4.0),))


@pytest.mark.parametrize(
    ("override", "get", "wanted"),
    [
        ("name=b", lambda c: c.name, "b"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ('name=""', lambda c: c.name, ""),
        ("inner.rate=0.25", lambda c: c.inner.rate, 0.25),
        ("inner.rate=1e-5", lambda c: c.inner.rate, 1e-5),
        ("shapes.0.radius_m=9.0", lambda c: c.shapes[0].radius_m, 9.0),
        ("shapes.1={kind: square}", lambda c: c.shapes[1], Square(kind="square")),
        ("shapes.0={kind: square}", lambda c: c.shapes, (Square(kind="square"),)),
        ("shapes=[]", lambda c: c.shapes, ()),
        ("size=auto", lambda c: c.size, "auto"),
        ("inner={count: 1}", lambda c: (c.inner.count, c.inner.rate), (1, 0.5)),
        ("inner.shape.kind=box", lambda c: c.inner.shape, Square(kind="box")),
        ("by_name.x.count=5", lambda c: c.by_name["x"], Inner(count=5)),
        ("flag=true", lambda c: c.flag, True),
    ],
)
def test_an_override_takes_the_place_of_what_the_recipe_says(recipe, override, get, wanted):
    text = "name: a\nsize: 4\ninner: {count: 7, rate: 0.5}\nshapes: [{kind: circle, radius_m: 2.5}]\n"
    config = load(Outer, recipe(text), [override])
    assert get(config) == wanted


def test_the_last_override_wins_and_the_rest_of_the_recipe_stays(recipe):
    config = load(Outer, recipe("name: a\ninner: {count: 7, rate: 0.25}\n"), ["inner.count=1", "inner.count=2"])
    assert config.inner == Inner(count=2, rate=0.25)


def test_an_override_gives_settings_to_what_the_recipe_turned_off(recipe):
    assert load(Outer, recipe("name: a\ninner: {shape: null}\n"), ["inner.shape.kind=box"]).inner.shape == Square(
        kind="box"
    )


def test_an_empty_override_is_null(recipe):
    text = "name: a\ninner: {shape: {kind: box}}\n"
    assert load(Outer, recipe(text), ["inner.shape="]).inner.shape is None


def test_an_override_never_hides_a_value_that_is_no_mapping(refused):
    error = refused("name: a\ninner: 5\n", "inner.rate=0.25")
    assert "inner" in str(error)


@pytest.mark.parametrize("override", ["name", "=3", ""])
def test_an_override_is_key_and_value(refused, override):
    error = refused("name: a\n", override)
    assert error.what == f"`{override}` is not a setting"
    assert "key=value" in error.fix


@pytest.mark.parametrize(
    ("step", "there"), [("2", "items 0 to 0"), ("-1", "items 0 to 0"), ("x", "items 0 to 0"), ("²", "items 0 to 0")]
)
def test_an_override_of_an_item_that_is_not_there_says_which_are(refused, step, there):
    error = refused("name: a\nshapes: [{kind: box}]\n", f"shapes.{step}.side_m=2")
    assert error.what == f"`shapes.{step}` does not exist"
    assert error.values == {"asked for": step, "there are": there}


def test_an_override_into_an_empty_list_says_that_it_is_empty(refused):
    assert refused("name: a\nshapes: []\n", "shapes.0.side_m=2").values["there are"] == "no items"


@pytest.mark.parametrize("text", ["[1", "a: b: c", '"a', "{", "*a", "!!python/object:os.system x"])
def test_an_override_that_is_not_yaml_names_the_key_and_the_text(refused, text):
    error = refused("name: a\n", f"name={text}")
    assert error.what == "the value of `name` is not valid YAML"
    assert error.values == {"value": text}


@pytest.mark.parametrize("key", ["inner..count", "inner.", ".inner"])
def test_an_override_with_an_empty_part_of_a_key_is_refused(refused, key):
    assert f"`{key}`" in refused("name: a\n", f"{key}=1").what


# --- YAML 1.2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1e-5", 1e-5),
        ("1e5", 1e5),
        ("1E+3", 1000.0),
        ("-2e-05", -2e-5),
        (".5", 0.5),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("NO", "NO"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("017", 17),
        ("08", 8),
        ("0o17", 15),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("2001-01-01", "2001-01-01"),
    ],
)
def test_values_mean_what_yaml_1_2_says_in_a_recipe_and_in_an_override(recipe, text, wanted):
    class Anything(Config):
        value: Any

    for found in (load(Anything, recipe(f"value: {text}\n")).value, load(Anything, None, [f"value={text}"]).value):
        assert found == wanted
        assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("name: a\nflag: true\nname: b\n", 3, "name"),
        ("name: a\ninner:\n  count: 1\n  rate: 1\n  count: 2\n", 5, "count"),
    ],
)
def test_a_key_given_twice_is_an_error_with_its_line(refused, text, line, key):
    error = refused(text)
    assert error.what.endswith("recipe.yaml is not valid YAML")
    [(place, problem)] = error.values.items()
    assert place.endswith(f"recipe.yaml line {line}")
    assert f'duplicate key "{key}"' in str(problem)
    assert "a key may be given only once" in error.fix


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [a\nflag: b\n", 2),
        ("name: a\n\tflag: true\n", 2),
        ("name: *nobody\n", 1),
        ("name: !!python/object/apply:os.system [ls]\n", 1),
        ("name: a\n---\nname: b\n", 2),
        ('name: "a\n', 2),
    ],
)
def test_broken_yaml_names_its_line(refused, text, line):
    error = refused(text)
    assert error.what.endswith("is not valid YAML")
    assert next(iter(error.values)).endswith(f" line {line}")


@pytest.mark.parametrize("text", [b"name: \xff\xfe\n", "name: a\n".encode("utf-16"), b"name: a\x00b\n"])
def test_bytes_that_are_not_text_are_refused(refused, text):
    error = refused(text)
    assert error.what.endswith("is not valid YAML")
    assert len(error.values) == 1


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(recipe):
    assert load(Outer, recipe(b"\xef\xbb\xbfname: \xc3\xa9\r\nflag: true\r\n")) == Outer(name="é", flag=True)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_recipe_sets_nothing(recipe, text):
    assert load(Outer, recipe(text), ["name=a"]) == Outer(name="a")


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b\n", "list"), ("hello\n", "str"), ("3\n", "int"), ("no\n", "str")]
)
def test_a_recipe_that_is_no_mapping_is_refused(refused, text, kind):
    error = refused(text)
    assert error.what.endswith("does not hold settings")
    assert error.values == {"expected": "keys with values", "found": kind}


def test_a_recipe_that_is_not_there_names_one_that_is_like_it(recipe, tmp_path):
    recipe("name: a\n")
    with pytest.raises(MissingError) as caught:
        load(Outer, tmp_path / "recipes.yml")
    assert caught.value.what == f"the recipe {tmp_path / 'recipes.yml'} is not there"
    assert caught.value.values == {"did you mean": str(tmp_path / "recipe.yaml")}


def test_a_recipe_unlike_any_other_has_no_proposal(recipe, tmp_path):
    recipe("name: a\n")
    for path in (tmp_path / "qqq.yaml", tmp_path / "nowhere" / "recipe.yaml", tmp_path):
        with pytest.raises(MissingError) as caught:
            load(Outer, path)
        assert caught.value.values == {}


# --- unknown and missing settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "line", "proposal"),
    [
        ("name: a\nflagg: true\n", "flagg", 2, "flag"),
        ("name: a\ninner:\n  count: 1\n  rte: 2.0\n", "inner.rte", 4, "rate"),
        ("name: a\nshapes:\n  - {kind: box}\n  - {kind: circle, radius_m: 1, nam: x}\n", "shapes.1.nam", 4, "name"),
        ("name: a\nshapes: [{kind: box, sidem: 1}]\n", "shapes.0.sidem", 2, "side_m"),
        ("name: a\ninner:\n  shape:\n    kind: circle\n    radius: 3.0\n", "inner.shape.radius", 5, "radius_m"),
        ("name: a\nby_name:\n  x: {cuont: 3}\n", "by_name.x.cuont", 3, "count"),
    ],
)
def test_an_unknown_setting_at_any_depth_is_refused_with_its_line_and_the_nearest(refused, text, key, line, proposal):
    error = refused(text)
    last = key.rpartition(".")[2]
    assert error.what == f"unknown setting `{key}`"
    [(place, word), (_, near)] = error.values.items()
    assert place.endswith(f"recipe.yaml line {line}")
    assert (word, near) == (last, proposal)


def test_a_setting_of_another_member_of_a_union_is_not_known_here(refused):
    error = refused("name: a\nshapes: [{kind: box, radius_m: 1.0}]\n")
    assert error.what == "unknown setting `shapes.0.radius_m`"
    assert error.values["known here"] == "kind, side_m, name"


def test_an_unknown_setting_named_like_a_tag_is_found(refused):
    assert refused("name: a\nshapes: [{kind: box, box: 1}]\n").what == "unknown setting `shapes.0.box`"


def test_an_unknown_setting_unlike_any_lists_what_is_known(refused):
    error = refused("name: a\nqqqqqq: 1\n")
    assert error.values["known here"] == "name, inner, shapes, by_name, size, flag, path"


def test_more_unknown_settings_are_named(refused):
    error = refused("name: a\nflagg: true\ninner: {cuont: 3}\nqqqqqq: 1\n")
    named = error.what + error.why
    assert [key in named for key in ("flagg", "inner.cuont", "qqqqqq")] == [True, True, True]


def test_an_unknown_setting_of_the_command_line_alone():
    with pytest.raises(ConfigError) as caught:
        load(Outer, None, ["name=a", "flagg=true"])
    assert caught.value.values == {"on the command line": "flagg", "did you mean": "flag"}


def test_an_unknown_setting_of_an_override_is_not_looked_for_in_the_recipe(refused):
    error = refused("name: a\ninner: {count: 1}\n", "inner.cuont=2")
    assert error.what == "unknown setting `inner.cuont`"
    assert "command line" in next(iter(error.values))


def test_a_bad_value_of_an_override_is_not_laid_to_the_recipe(refused):
    error = refused("name: a\n", "name=5")
    assert "command line" in error.why
    assert "line 1" not in error.why


def test_every_missing_setting_is_named(refused):
    class Two(Config):
        first: int
        second: str

    with pytest.raises(ConfigError) as caught:
        load(Two)
    assert caught.value.what == "2 settings are not valid"
    assert caught.value.values == {"first": "is required", "second": "is required"}
    assert refused("flag: true\n").values == {"name": "is required"}
    assert list(refused("name: a\nshapes: [{kind: circle}]\n").values) == ["shapes.0.radius_m"]


def test_where_settings_were_read_is_an_english_sentence():
    with pytest.raises(ConfigError) as caught:
        load(Outer)
    assert "from on" not in str(caught.value)


def test_the_line_of_a_bad_value_is_told(refused):
    error = refused("name: a\nshapes:\n- {kind: box}\n- kind: circle\n  radius_m: -1\n")
    assert error.what == "the setting `shapes.1.radius_m` is not valid"
    assert error.values == {"shapes.1.radius_m": "input should be greater than 0, not -1"}
    assert error.why.endswith("recipe.yaml line 5.")


def test_several_bad_values_are_all_named(refused):
    error = refused("name: 1\nflag: 2\ninner: {rate: x}\n")
    assert error.what == "3 settings are not valid"
    assert list(error.values) == ["name", "inner.rate", "flag"]


@pytest.mark.parametrize("shape", ["{kind: cirle, radius_m: 1}", "{radius_m: 1}", "circle", "[]"])
def test_a_choice_that_is_none_of_the_kinds_names_the_place(refused, shape):
    error = refused(f"name: a\nshapes: [{shape}]\n")
    assert error.what == "the setting `shapes.0` is not valid"


@pytest.mark.parametrize("kind", ["cirle", "3"])
def test_an_unknown_kind_lists_the_kinds(refused, kind):
    assert "circle, square, box" in refused(f"name: a\nshapes: [{{kind: {kind}}}]\n").values["shapes.0"]


# --- strict, closed, frozen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inner.count", "true"),
        ("inner.count", '"100"'),
        ("inner.count", "1.0"),
        ("inner.count", "1e3"),
        ("inner.count", "null"),
        ("inner.count", "[1]"),
        ("inner.rate", "true"),
        ("inner.rate", '"0.5"'),
        ("flag", "1"),
        ("flag", "yes"),
        ("flag", '"true"'),
        ("name", "1"),
        ("name", "true"),
        ("name", "null"),
        ("size", "automatic"),
        ("size", "false"),
        ("shapes", "{kind: box}"),
        ("shapes", "box"),
        ("inner", "[]"),
    ],
)
def test_a_value_of_another_type_is_refused_and_named(refused, key, value):
    error = refused("name: a\n", f"{key}={value}")
    assert error.what == f"the setting `{key}` is not valid"
    assert list(error.values) == [key]


def test_a_whole_number_is_a_number():
    rate = load(Outer, None, ["name=a", "inner.rate=1"]).inner.rate
    assert rate == 1.0
    assert isinstance(rate, float)


@pytest.mark.parametrize("rate", [".inf", "-.inf", ".nan"])
def test_a_number_is_finite(refused, rate):
    assert refused("name: a\n", f"inner.rate={rate}").what == "the setting `inner.rate` is not valid"


def test_a_config_cannot_be_changed():
    config = Outer(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "b"
    with pytest.raises(ValidationError, match="frozen"):
        config.inner.count = 4
    with pytest.raises(ValidationError, match="Extra inputs"):
        Outer(name="a", nmae="b")  # pyright: ignore[reportCallIssue]


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("$PLACE/x", "/some/where/x"),
        ("${PLACE}/x", "/some/where/x"),
        ("a/$PLACE$PLACE", "a//some/where/some/where"),
        ("~/x", "/my/home/x"),
        ("Qwen/Qwen2-1.5B", "Qwen/Qwen2-1.5B"),
        ("costs-5$", "costs-5$"),
        ("a/~/b", "a/~/b"),
    ],
)
def test_paths_are_expanded(monkeypatch, text, wanted):
    monkeypatch.setenv("PLACE", "/some/where")
    monkeypatch.setenv("HOME", "/my/home")
    assert load(Outer, None, ["name=a", f"path={text}"]).path == wanted


@pytest.mark.parametrize("text", ["$UNSET_PLACE/x", "${UNSET_PLACE}/x", "a/$UNSET_PLACE"])
def test_an_unset_variable_is_refused(monkeypatch, refused, text):
    monkeypatch.delenv("UNSET_PLACE", raising=False)
    error = refused(f"name: a\npath: {text}\n")
    assert error.what == "the setting `path` is not valid"
    assert error.values == {"path": f"the environment variable $UNSET_PLACE in '{text}' is not set"}
    assert error.why.endswith("line 2.")


def test_other_text_is_not_expanded(monkeypatch):
    monkeypatch.setenv("PLACE", "/some/where")
    assert load(Outer, None, ["name=$PLACE"]).name == "$PLACE"


# --- replace, differences, to_yaml -----------------------------------------------------------------------------------


def test_replace_changes_the_named_settings_and_nothing_else():
    config = Outer(name="a", shapes=(Square(kind="box"), Circle(kind="circle", radius_m=1.0)))
    changed = replace(config, {"inner.rate": 0.75, "shapes.1.radius_m": 2.0, "size": 8})
    assert changed == Outer(
        name="a", inner=Inner(rate=0.75), shapes=(Square(kind="box"), Circle(kind="circle", radius_m=2.0)), size=8
    )
    assert config == Outer(name="a", shapes=(Square(kind="box"), Circle(kind="circle", radius_m=1.0)))


def test_replace_checks_the_new_values():
    with pytest.raises(ValueError, match="count"):
        replace(Outer(name="a"), {"inner.count": "many"})
    with pytest.raises(ValueError, match="Extra inputs"):
        replace(Outer(name="a"), {"inner.cuont": 3})


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": 2}, {"a": (1, 2)}),
        ({"a": {"b": {"c": 1}, "d": 2}}, {"a": {"b": {"c": 3}, "d": 2}}, {"a.b.c": (1, 3)}),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, {"a.1.b": (2, 3)}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": ([1], [1, 2])}),
        ({"a": (1, 2)}, {"a": [1, 3]}, {"a.1": (2, 3)}),
        ({"a": 1}, {"a": 1, "b": 2}, {"b": (None, 2)}),
        ({"a": 1, "b": 2}, {"b": 2}, {"a": (1, None)}),
        ({"a": 1}, {"a": True}, {"a": (1, True)}),
        ({"a": "1"}, {"a": 1}, {"a": ("1", 1)}),
        ({"a": None}, {"a": {"b": 1}}, {"a": (None, {"b": 1})}),
        ({}, {}, {}),
    ],
)
def test_differences_are_named_by_dotted_key(old, new, wanted):
    assert differences(old, new) == wanted


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("ab01eno .:-#'\"\n[{~_é", max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text("abno1", min_size=1), values, max_size=3),
    max_leaves=8,
)


@given(values=st.dictionaries(st.text("abno1e", min_size=1), VALUES, max_size=3))
def test_yaml_text_reads_as_what_was_written(values):
    found = YAML(typ="safe", pure=True).load(to_yaml(values))
    assert found == values
    assert differences(found, values) == {}


def test_yaml_text_keeps_the_order_of_settings_and_reads_as_the_same_config(recipe):
    config = Outer(name="no", shapes=(Circle(kind="circle", radius_m=1e-5),), size=3)
    text = to_yaml(config.model_dump())
    assert list(YAML(typ="safe", pure=True).load(text)) == list(Outer.model_fields)
    assert load(Outer, recipe(text)) == config


# --- explaining ------------------------------------------------------------------------------------------------------


def test_explain_of_a_small_tree():
    class Small(Config):
        """The root."""

        name: str
        """What it is called."""
        size: int | Literal["auto"] = "auto"
        """A number,
        or auto."""
        flag: bool = False
        """On or off."""
        shape: Shape | None = None
        """A shape."""
        inner: list[int] = Field(default_factory=lambda: [1])
        """Numbers."""

    assert explain(Small).splitlines() == [
        "name: text (required)",
        "      What it is called.",
        "size: integer | auto = auto",
        "      A number,",
        "      or auto.",
        "flag: true | false = false",
        "      On or off.",
        "shape: circle | box = null",
        "      A shape.",
        "  kind: circle",
        "        Round.",
        "    radius_m: number (required)",
        "          From the middle to the rim, in metres.",
        "  kind: box | square",
        "        Four sides.",
        "    side_m: number = 1.0",
        "          Of one side, in metres.",
        "  name: text = round",
        "        What it is called.",
        "inner: list of integer = [1]",
        "      Numbers.",
    ]


def test_explain_tells_each_members_own_default():
    class One(Config):
        """One."""

        kind: Literal["one"]
        share: float = 0.1
        """A share."""

    class Other(Config):
        """Other."""

        kind: Literal["other"]
        share: float = 0.9
        """A share."""

    class Root(Config):
        choice: Annotated[One | Other, Field(discriminator="kind")]
        """One or other."""

    text = explain(Root)
    assert "share: number = 0.1" in text
    assert "share: number = 0.9" in text


def test_explain_tells_each_form_that_a_value_may_have():
    class Root(Config):
        layers: Layers | None = None
        """Some layers."""

    lines = explain(Root).splitlines()
    assert lines[0] == "layers: integer | list of integer | every | best = null"
    assert "  kind: every" in lines
    assert "    step: integer (required)" in lines


def config_classes() -> list[type[Config]]:
    """Every Config class that a config.py of the package defines."""
    for module in pkgutil.walk_packages(stillroom.__path__, "stillroom."):
        if module.name.endswith("config"):
            import_module(module.name)

    def below(base: type[Config]) -> list[type[Config]]:
        return [c for sub in base.__subclasses__() for c in (sub, *below(sub))]

    return sorted((c for c in below(Config) if c.__module__.startswith("stillroom.")), key=lambda c: c.__qualname__)


def is_tag(name: str, annotation: Any) -> bool:
    return name in ("kind", "format") and typing.get_origin(annotation) is Literal


@pytest.mark.parametrize("config_class", config_classes(), ids=lambda c: c.__name__)
def test_every_setting_says_what_it_means(config_class):
    bare = [
        name
        for name, field in config_class.model_fields.items()
        if not is_tag(name, field.annotation) and not (field.description or "").strip()
    ]
    assert bare == []
    assert config_class.__name__.startswith("_") or (config_class.__doc__ or "").strip()


def test_the_config_classes_are_found():
    assert {"DistillConfig", "ForwardKL", "TextData", "CheckpointConfig"} <= {c.__name__ for c in config_classes()}


def reachable(config_class: type[Config]) -> set[type[Config]]:
    def inside(annotation: Any) -> set[type[Config]]:
        if isinstance(annotation, type) and issubclass(annotation, Config):
            return reachable(annotation)
        return {c for part in typing.get_args(annotation) for c in inside(part)}

    bases = {base for base in config_class.__mro__[1:] if issubclass(base, Config) and base is not Config}
    return {config_class} | bases | {c for f in config_class.model_fields.values() for c in inside(f.annotation)}


@pytest.mark.parametrize("verb", [DistillConfig, CaptureConfig, EvaluateConfig, ChatConfig, PruneConfig, ImportConfig])
def test_the_help_of_a_verb_tells_every_setting_with_its_meaning(verb):
    lines = [line.strip() for line in explain(verb).splitlines()]
    for config_class in reachable(verb):
        for name, field in config_class.model_fields.items():
            places = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
            meaning = [line.strip() for line in (field.description or "").splitlines()]
            assert any(lines[i + 1 : i + 1 + len(meaning)] == meaning for i in places), f"{config_class}.{name}"


def test_explaining_reaches_every_config_class_of_the_package():
    found = {c for c in config_classes() if not c.__name__.startswith("_")}
    verbs = (
        DistillConfig,
        CaptureConfig,
        EvaluateConfig,
        ChatConfig,
        PruneConfig,
        ImportConfig,
        JoinConfig,
        ConcatConfig,
        BetweenConfig,
        DoctorConfig,
        Hardware,
        Storage,
    )
    files = (MultipleChoice, MinimalPairs, ExactMatch, LastWord)  # descriptions of tasks, which the guide explains
    told = set[type[Config]]().union(*map(reachable, (*verbs, *files)))
    assert {c for c in told if not c.__name__.startswith("_")} == found


def test_a_recipe_may_name_its_verb_and_another_verb_refuses_it(tmp_path):
    values = {"model": "m", "layers": 2, "out": "o"}
    (tmp_path / "prune.yaml").write_text(json.dumps({"verb": "prune", **values}))
    (tmp_path / "plain.yaml").write_text(json.dumps(values))
    named, plain = (load(PruneConfig, tmp_path / f"{name}.yaml") for name in ("prune", "plain"))
    assert named == plain
    assert "verb" not in named.model_dump()
    with pytest.raises(ConfigError, match="the recipe is of `prune`, and was given to `distill`") as raised:
        load(DistillConfig, tmp_path / "prune.yaml")
    assert "stillroom prune" in raised.value.fix
    with pytest.raises(ConfigError, match="the recipe is of `7`, and was given to `prune`"):
        load(PruneConfig, tmp_path / "plain.yaml", ["verb=7"])


# --- what no file should do ------------------------------------------------------------------------------------------
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 3000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("steps: " + "1" * 5000, "4300 digits"),
        ('out: "\\ud83d"', "half of a character"),
        (BOMB, "more than 100,000 values"),
    ],
    ids=["depth", "itself", "digits", "surrogate", "aliases"],
)
def test_yaml_that_no_setting_can_be_is_refused(tmp_path, text, reason):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is not valid YAML") as error:
        read_recipe(tmp_path / "r.yaml")
    assert reason in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ["\\ud83d"]}', "half of a character"),
        ('{"\\uDE00": 1}', "half of a character"),
        (b'"\xff"', "utf-8"),
        ("1" * 5000, "4300 digits"),
    ],
)
def test_json_that_cannot_be_used_is_a_value_error(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_that_can_be_used():
    assert parse_json('"\\ud83d\\ude00 \\\\ud83d"') == "😀 \\ud83d"

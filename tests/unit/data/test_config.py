"""The settings of a data set."""

from typing import get_args

import pytest
from pydantic import ValidationError

from stillroom.config import Config
from stillroom.data.config import AnyData, ChatData, DataConfig, PromptCompletionData, TextData


class Root(Config):
    data: DataConfig


def read(**values: object) -> AnyData:
    return Root.model_validate({"data": values}).data


@pytest.mark.parametrize(
    ("format_", "config_class"),
    [("text", TextData), ("chat", ChatData), ("prompt_completion", PromptCompletionData)],
)
def test_the_format_chooses_the_settings(format_, config_class):
    data = read(path="d", format=format_)
    assert type(data) is config_class
    assert (data.length, data.pack, data.shuffle, data.empty, data.cache) == (1024, True, True, "refuse", "auto")


def test_every_format_can_be_chosen():
    [union, *_] = get_args(DataConfig)
    assert set(get_args(union)) == set(get_args(AnyData)) == {TextData, ChatData, PromptCompletionData}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"format": "text", "keep": "all"}, "keep"),
        ({"format": "text", "template": "auto"}, "template"),
        ({"format": "chat", "prompt": "x"}, "prompt"),
        ({"format": "prompt_completion", "column": "x"}, "column"),
    ],
)
def test_a_setting_of_another_format_is_refused(values, key):
    with pytest.raises(ValidationError) as caught:
        read(path="d", **values)
    [error] = caught.value.errors()
    assert (error["loc"], error["type"]) == (("data", values["format"], key), "extra_forbidden")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"format": "text", "length": 1}, "length"),
        ({"format": "text", "length": 8.0}, "length"),
        ({"format": "text", "max_documents": 0}, "max_documents"),
        ({"format": "text", "empty": "ignore"}, "empty"),
        ({"format": "chat", "overlong": "split"}, "overlong"),
        ({"format": "prompt_completion", "overlong": "split"}, "overlong"),
        ({"format": "chat", "keep": "completion"}, "keep"),
        ({"format": "prompt_completion", "keep": "assistant"}, "keep"),
        ({"format": "text", "pack": "yes"}, "pack"),
    ],
)
def test_a_value_out_of_bounds_is_refused(values, key):
    with pytest.raises(ValidationError) as caught:
        read(path="d", **values)
    assert [error["loc"][:3] for error in caught.value.errors()] == [("data", values["format"], key)]


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("PLACE", "/some/where")
    data = read(path="$PLACE/d.jsonl", format="text", cache="$PLACE/cache")
    assert (data.path, data.cache) == ("/some/where/d.jsonl", "/some/where/cache")

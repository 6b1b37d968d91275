"""The settings of a data set."""

from typing import get_args

import pytest
from pydantic import ValidationError

from stillroom.config import Config
from stillroom.data.config import AnyData, ChatData, DataConfig, PromptCompletionData, TextData, TokensData, most_tokens
from stillroom.data.dataset import prepare
from stillroom.tokenizers import load_tokenizer


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
    assert set(get_args(union)) == set(get_args(AnyData)) == {TextData, ChatData, PromptCompletionData, TokensData}


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


# --- bounds of the number of tokens: never below what is read, and none where nothing bounds it ---


@pytest.mark.parametrize("more", [{}, {"max_documents": 3, "overlong": "cut"}])
def test_there_are_no_more_tokens_than_said(text_files, tokenizer_folder, tmp_path, more):
    data = TextData(format="text", path=f"{text_files}/train.jsonl", length=16, cache=str(tmp_path), **more)
    read = (prepare(data, load_tokenizer(str(tokenizer_folder))).lengths - 1).sum()  # the last is only predicted
    most, why = most_tokens(data)
    assert most is not None
    assert read <= most
    assert why.startswith("at most")


def test_the_smaller_bound_is_taken(text_files):
    data = {"format": "text", "path": f"{text_files}/train.jsonl", "length": 16, "max_documents": 3}
    assert most_tokens(TextData(**data, overlong="cut"))[0] == 48
    split = most_tokens(TextData(**data))[0]
    assert split == (text_files / "train.jsonl").stat().st_size


def test_where_nothing_bounds_them_that_is_said(text_files):
    for data in (
        TextData(format="text", path=str(text_files)),
        TextData(format="text", path="owner/name"),
        PromptCompletionData(format="prompt_completion", path=f"{text_files}/train.jsonl"),
    ):
        most, why = most_tokens(data)
        assert most is None
        assert "data_tokens" in why

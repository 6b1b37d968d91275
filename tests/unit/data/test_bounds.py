"""Bounds of the number of tokens: never below what is read, and none where nothing bounds it."""

import pytest

from stillroom.data.bounds import most_tokens
from stillroom.data.config import PromptCompletionData, TextData
from stillroom.data.dataset import prepare
from stillroom.tokenizers import load_tokenizer


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

"""Answers: which part of a document is its prompt, and the documents that the teacher's answers make."""

import json
from pathlib import Path

import numpy as np
import pytest

from stillroom.capture.config import Generate
from stillroom.capture.signals import Document, answered, prompts
from stillroom.data.config import AnyData, ChatData, PromptCompletionData, TextData
from stillroom.data.dataset import prepare
from stillroom.errors import DataError


def document(target_mask: str, number: int = 0) -> Document:
    """A document of tokens 10, 11, …; "x" marks those to learn."""
    return Document(
        number, np.arange(10, 10 + len(target_mask), dtype=np.int32), np.array([sign == "x" for sign in target_mask])
    )


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target_mask", "size"),
    [("...xxx", 3), (".x", 1), ("..xx..xx", 6), ("..xx..x.", 6), ("xx..xx", 4), ("..xx..", 2)],
)
def test_a_prompt_is_all_before_the_last_stretch_to_learn(target_mask, size):
    ((number, prompt),) = prompts([document(target_mask, 7)], Generate(max_tokens=2), 16)
    assert number == 7
    assert prompt.tolist() == list(range(10, 10 + size))


@pytest.mark.parametrize("target_mask", ["xxxx", "xx..", "x"])
def test_a_document_that_begins_with_what_is_learnt_has_no_prompt(target_mask):
    with pytest.raises(DataError, match="document 3 has no prompt") as caught:
        prompts([document("..x", 2), document(target_mask, 3)], Generate(max_tokens=2), 16)
    assert "data.keep" in caught.value.fix


def test_the_prompt_of_a_text_is_its_first_tokens():
    texts = [document("x" * 8, 0), document("xxx", 1)]
    found = prompts(texts, Generate(max_tokens=2, prompt_tokens=5), 16)
    assert [(number, len(prompt)) for number, prompt in found] == [
        (0, 5),
        (1, 2),
    ]  # the last token is never in a prompt


def test_a_prompt_that_leaves_too_little_room_is_refused_and_named():
    asked = [document("." * 8 + "x", 4)]
    assert len(prompts(asked, Generate(max_tokens=5), 12)[0][1]) == 8
    with pytest.raises(DataError, match="document 4 leaves too little room") as caught:
        prompts(asked, Generate(max_tokens=6), 12)
    assert caught.value.values == {"prompt": "8 tokens", "generate.max_tokens": 6, "data.length": 12}


def test_nothing_has_no_prompts():
    assert prompts([], Generate(max_tokens=2), 8) == []


CHAT = [{"role": "system", "content": "drip"}, {"role": "user", "content": "how many?"},
        {"role": "assistant", "content": "12"}, {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "34"}]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "row", "prompt"),
    [
        (
            ChatData(path="x", format="chat", length=200),
            {"messages": CHAT},
            "<|im_start|>system\ndrip<|im_end|>\n<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n12"
            "<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            PromptCompletionData(path="x", format="prompt_completion", length=200),
            {"prompt": "how many drops?", "completion": " 12"},
            "<s>how many drops?",
        ),
        (
            PromptCompletionData(path="x", format="prompt_completion", length=200, chat=True),
            {"prompt": "how many?", "completion": "12"},
            "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=["chat", "pair", "pair as chat"],
)
def test_the_prompt_of_each_format_ends_where_the_answer_begins(
    tmp_path, chat_tokenizer, data: AnyData, row: dict[str, object], prompt: str
):
    ((_, found),) = prompts([_read(tmp_path, data, row, chat_tokenizer)], Generate(max_tokens=4), 200)
    assert chat_tokenizer.decode(found) == prompt


@pytest.mark.parametrize(
    ("data", "row"),
    [
        (ChatData(path="x", format="chat", length=200, keep="all"), {"messages": CHAT}),
        (
            PromptCompletionData(path="x", format="prompt_completion", length=200, keep="all"),
            {"prompt": "a", "completion": "b"},
        ),
    ],
    ids=["chat", "pair"],
)
def test_data_of_which_all_is_learnt_have_no_prompts(tmp_path, chat_tokenizer, data: AnyData, row: dict[str, object]):
    with pytest.raises(DataError, match="has no prompt"):
        prompts([_read(tmp_path, data, row, chat_tokenizer)], Generate(max_tokens=4), 200)


def test_a_short_text_is_not_answered_after_its_end(tmp_path, tiny_tokenizer):
    """The end of sequence closes a text; what a model writes after it answers nothing."""
    text = _read(tmp_path, TextData(path="x", format="text", length=64), {"text": "drops"}, tiny_tokenizer)
    assert text.tokens[-1] == tiny_tokenizer.eos_token_id
    ((_, prompt),) = prompts([text], Generate(max_tokens=4, prompt_tokens=50), 64)
    assert tiny_tokenizer.eos_token_id not in prompt


def _read(folder: Path, data: AnyData, row: dict[str, object], tokenizer) -> Document:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    documents = prepare(data.model_copy(update={"path": str(path)}), tokenizer)
    assert len(documents) == 1
    return Document(0, documents.tokens(0), documents.target_mask(0))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_make_documents_with_numbers_of_their_own():
    asked = [(3, np.array([5, 6], np.int32)), (4, np.array([7], np.int32))]
    answers = [
        [np.array([1, 2], np.int64), np.array([3], np.int64)],
        [np.array([8], np.int64), np.array([9, 9], np.int64)],
    ]
    found = answered(asked, answers, Generate(max_tokens=4, answers=2))
    assert [d.number for d in found] == [6, 7, 8, 9]
    assert [d.tokens.tolist() for d in found] == [[5, 6, 1, 2], [5, 6, 3], [7, 8], [7, 9, 9]]
    assert all(d.tokens.dtype == np.int32 for d in found)
    assert [d.loss_mask.tolist() for d in found] == [
        [False, True, True, False], [False, True, False], [True, False], [True, True, False],
    ]  # fmt: skip


def test_only_the_answer_is_learnt_and_not_earlier_ones():
    asked = prompts([document("..xx..xx", 1)], Generate(max_tokens=3), 16)
    (found,) = answered(asked, [[np.array([1, 2, 3], np.int32)]], Generate(max_tokens=3))
    assert found.target_mask.tolist() == [False] * 6 + [True] * 3


def test_an_empty_answer_is_refused_and_named():
    with pytest.raises(DataError, match="answer to document 5 is empty"):
        answered([(5, np.array([1], np.int32))], [[np.zeros(0, np.int32)]], Generate(max_tokens=3))


def test_a_prompt_without_its_answers_is_not_passed_over():
    with pytest.raises(ValueError, match="shorter"):
        answered([(5, np.array([1], np.int32))], [], Generate(max_tokens=3))

"""Formats: which tokens a row becomes, and exactly which of them are learned."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_tokenizer
from stillroom.data.chat_templates import learns_to_stop
from stillroom.data.config import AnyData, ChatData, PromptCompletionData, TextData, TokensData
from stillroom.data.formats import encoder
from stillroom.errors import ConfigError, DataError, MissingError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many drops?"},
    {"role": "assistant", "content": "12 drops."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.\n"},
]
MARKED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>\n",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n",
)


def text_data(**settings) -> TextData:
    return TextData(format="text", path="x.jsonl", **settings)


def chat_data(**settings) -> ChatData:
    return ChatData(format="chat", path="x.jsonl", **settings)


def pair_data(**settings) -> PromptCompletionData:
    return PromptCompletionData(format="prompt_completion", path="x.jsonl", **settings)


def encode(config: AnyData, tokenizer: Any, rows: Sequence[dict], template: str | None = None):
    return encoder(config, tokenizer, template)(rows, lambda index: f"x.jsonl line {index + 1}")


def learnt(tokenizer: Any, document) -> list[str]:
    """The text of each run of learnt tokens."""
    runs, previous = [], False
    for token, target_mask in zip(document.tokens.tolist(), document.target_mask.tolist(), strict=True):
        if target_mask:
            runs.append([*runs.pop(), token] if previous else [token])
        previous = target_mask
    return [tokenizer.decode(run) for run in runs]


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_gets_one_beginning_and_one_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "The still."}, {"text": "<s>The still."}, {"text": "The still.</s>"}]
    documents = encode(text_data(), tiny_tokenizer, rows)
    expected = [0, *tiny_tokenizer.encode("The still.", add_special_tokens=False), 1]
    for document in documents:
        assert document.tokens.tolist() == expected
        assert document.target_mask.all()


def test_long_text_gives_no_warning(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 4
    [document] = encode(text_data(), tokenizer, [{"text": "drops " * 99}])
    assert len(document.tokens) > 100
    assert not recwarn.list
    assert not caplog.records


def test_another_column(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(text_data(column="story"), tiny_tokenizer, [{"story": "drops", "text": "no"}])
    assert tiny_tokenizer.decode(document.tokens) == "<s>drops</s>"


def test_empty_text_has_nothing_to_learn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(text_data(), tiny_tokenizer, [{"text": ""}])
    assert not document.target_mask.any()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"txet": "x", "id": "1"},
            r"x\.jsonl line 2 has no column `text`\n  columns there: txet, id +did you mean: txet",
        ),
        ({"text": None}, r"x\.jsonl line 2: the column `text` does not hold a text\n  expected: a text +found: null"),
        ({"text": 42}, r"found: 42 \(int\)"),
    ],
)
def test_rows_that_are_no_text(tiny_tokenizer: PreTrainedTokenizerFast, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(text_data(), tiny_tokenizer, [{"text": "fine"}, row])


# --- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistant_is_learnt_with_its_first_token_and_its_end_of_turn(
    chat_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    [document] = encode(chat_data(), chat_tokenizer, [{"messages": TURNS}], template)
    assert learnt(chat_tokenizer, document) == ["12 drops.<|im_end|>", "Yes.\n<|im_end|>"]
    whole = chat_tokenizer.apply_chat_template(TURNS, chat_template=template, tokenize=False)
    assert chat_tokenizer.decode(document.tokens) == whole
    first = document.target_mask.tolist().index(True)
    assert str(chat_tokenizer.decode(document.tokens[:first])).endswith("<|im_start|>assistant\n")


def test_marks_agree_with_transformers(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(chat_data(), chat_tokenizer, [{"messages": TURNS}], MARKED)
    reference: Any = chat_tokenizer.apply_chat_template(
        TURNS, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert document.tokens.tolist() == reference["input_ids"]
    assert document.target_mask.tolist() == [bool(mask) for mask in reference["assistant_masks"]]


def test_marks_hold_where_offsets_leave_out_white_space() -> None:
    """With trimmed offsets the answer's first character belongs to no token, and a lookup by character finds none."""
    tokenizer = build_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": " slowly, and"}]
    for template in (CHATML, MARKED):
        [document] = encode(chat_data(), tokenizer, [{"messages": turns}], template)
        assert learnt(tokenizer, document) == [" slowly, and<|im_end|>"]


def test_all_of_a_chat_is_learnt_when_asked(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(chat_data(keep="all"), chat_tokenizer, [{"messages": TURNS}], CHATML)
    assert document.target_mask.all()


def test_sharegpt_is_the_same_as_messages(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    a, b = encode(chat_data(), chat_tokenizer, [{"messages": TURNS}, {"conversations": shared}], CHATML)
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.target_mask.tolist() == b.target_mask.tolist()


def test_function_is_a_tool_and_is_not_learnt(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [*TURNS[:3], {"from": "function", "value": "34"}, {"from": "gpt", "value": "34."}]
    [document] = encode(chat_data(), chat_tokenizer, [{"conversations": turns}], CHATML)
    assert "<|im_start|>tool\n34<|im_end|>" in chat_tokenizer.decode(document.tokens)
    assert learnt(chat_tokenizer, document) == ["12 drops.<|im_end|>", "34.<|im_end|>"]


def test_template_and_tokenizer_do_not_both_add_a_beginning(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(chat_data(), chat_tokenizer, [{"messages": TURNS}], "{{ bos_token }}" + CHATML)
    assert document.tokens.tolist().count(0) == 1
    assert document.tokens[0] == 0
    assert document.tokens[-1] != 1, "no end of sequence that the template does not write"


def test_a_chat_without_an_assistant_or_with_a_silent_one(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": TURNS[:2]}, {"messages": [TURNS[1], {"role": "assistant", "content": ""}]}]
    for document in encode(chat_data(), chat_tokenizer, rows, CHATML):
        assert len(document.tokens)
        assert not document.target_mask.any()


def test_the_assistant_may_begin(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hi."}, {"from": "gpt", "value": "12?"}]
    [document] = encode(chat_data(), chat_tokenizer, [{"conversations": turns}], CHATML)
    assert learnt(chat_tokenizer, document) == ["Hello.<|im_end|>", "12?<|im_end|>"]
    with pytest.raises(DataError, match="begins with the assistant"):
        encode(chat_data(), chat_tokenizer, [{"conversations": turns}], "{{ messages[-1]['content'] }}")


def test_a_template_that_rewrites_earlier_turns_is_refused(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rewriting = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else '…' }}")
    with pytest.raises(DataError, match=r"(?s)line 1: the chat template rewrites earlier turns.*generation"):
        encode(chat_data(), chat_tokenizer, [{"messages": TURNS}], rewriting)
    [document] = encode(chat_data(keep="all"), chat_tokenizer, [{"messages": TURNS}], rewriting)
    assert document.target_mask.all()


def test_a_template_that_refuses_is_quoted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode(chat_data(), chat_tokenizer, [{"messages": TURNS}], refusing)


def test_no_template_is_said_at_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(MissingError, match="no chat template"):
        encoder(chat_data(), tiny_tokenizer, None)
    with pytest.raises(MissingError, match="no chat template"):
        encoder(pair_data(chat=True), tiny_tokenizer, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has no column `messages`"),
        ({"messages": "x"}, r"expected: a list of messages +found: str"),
        ({"messages": []}, "found: an empty list"),
        ({"messages": ["x"]}, "message 1 is not an object"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        (
            {"messages": [TURNS[1], {"role": "narrator", "content": "x"}]},
            "message 2 has an unknown role\n  found: 'narr",
        ),
        ({"messages": [{"role": "user"}]}, r"message 1 has no text\n  expected `content`: a text +found: NoneType"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "found: dict"),
    ],
)
def test_misshapen_chats(chat_tokenizer: PreTrainedTokenizerFast, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode(chat_data(), chat_tokenizer, [row], CHATML)
    assert "x.jsonl line 1" in str(caught.value)


# --- prompt and completion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("How many drops?", " 12 drops."), ("a", "b"), ("drops\n", "drops"), ("x", "\n\n"), ("", "é🙂")],
)
def test_only_the_completion_and_the_end_are_learnt(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    [document] = encode(pair_data(), tiny_tokenizer, [{"prompt": prompt, "completion": completion}])
    whole = [0, *tiny_tokenizer.encode(prompt + completion, add_special_tokens=False), 1]
    assert document.tokens.tolist() == whole
    assert "".join(learnt(tiny_tokenizer, document)) == completion + "</s>"
    assert not document.target_mask[0]


def test_a_token_over_the_border_is_learnt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    merged = tiny_tokenizer.encode(" t", add_special_tokens=False)
    assert len(merged) == 1
    [document] = encode(pair_data(), tiny_tokenizer, [{"prompt": " ", "completion": "t"}])
    assert document.tokens.tolist() == [0, *merged, 1]
    assert document.target_mask.tolist() == [False, True, True]


def test_an_end_of_sequence_that_the_tokenizer_adds_is_learnt_once() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    [document] = encode(pair_data(), tokenizer, [{"prompt": "How?\n", "completion": "12"}])
    assert learnt(tokenizer, document) == ["12</s>"]
    assert document.tokens.tolist().count(1) == 1


def test_an_empty_completion_has_nothing_to_learn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(pair_data(), tiny_tokenizer, [{"prompt": "How?", "completion": ""}])
    assert not document.target_mask.any()


def test_all_of_a_pair_is_learnt_when_asked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [document] = encode(pair_data(keep="all"), tiny_tokenizer, [{"prompt": "How?", "completion": " 12"}])
    assert document.target_mask.all()


def test_columns_in_braces(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = pair_data(prompt="Q {{1}}: {question}\nA:", completion=" {the answer}!")
    [document] = encode(config, tiny_tokenizer, [{"question": "drops?", "the answer": "12 {x}"}])
    assert tiny_tokenizer.decode(document.tokens) == "<s>Q {1}: drops?\nA: 12 {x}!</s>"
    assert learnt(tiny_tokenizer, document) == [" 12 {x}!</s>"]


@pytest.mark.parametrize("text", ["{}", "{a!r}", "{a:>9}", "{a", "a}", "{{a}}"])
def test_braces_that_cannot_be_meant(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompt"):
        encoder(pair_data(prompt=text), tiny_tokenizer, None)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"instruction": "Add.", "input": "1, 2"}, "Add.\n1, 2\n= "),
        ({"instruction": "Add.", "input": ""}, "Add.\n= "),
        ({"instruction": "Add.", "input": None}, "Add.\n= "),
        ({"instruction": "Add."}, "Add.\n= "),
    ],
)
def test_a_column_that_may_be_absent(tiny_tokenizer: PreTrainedTokenizerFast, row: dict, wanted: str) -> None:
    """As the input of Alpaca's rows."""
    data = pair_data(prompt="{instruction}\n{input?}\n= ", completion="output")
    [document] = encode(data, tiny_tokenizer, [{**row, "output": "3"}])
    assert tiny_tokenizer.decode(document.tokens, skip_special_tokens=True) == wanted + "3"
    with pytest.raises(DataError, match="instruction"):
        encode(data, tiny_tokenizer, [{"output": "3"}])
    with pytest.raises(DataError, match="does not hold a text"):
        encode(data, tiny_tokenizer, [{**row, "input": 3, "output": "3"}])


def test_a_line_beside_words_of_its_own_stays(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = pair_data(prompt="Input: {input?}\n\n{more?} {rest?}\n= ", completion="output")
    [document] = encode(data, tiny_tokenizer, [{"output": "3"}])
    assert tiny_tokenizer.decode(document.tokens, skip_special_tokens=True) == "Input: \n\n= 3"


def test_a_system_message_beside_a_pair(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    row, template = {"prompt": "How?", "completion": "So."}, "{{ shout }}" + CHATML
    data = pair_data(chat=True, system="{s?}", chat_template_kwargs={"shout": "!"})
    with_system, without = encode(data, chat_tokenizer, [{**row, "s": "Be brief."}, row], template)
    [messages] = encode(
        chat_data(chat_template_kwargs={"shout": "!"}),
        chat_tokenizer,
        [{"messages": [TURNS[0], {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}],
        template,
    )
    assert with_system.tokens.tolist() == messages.tokens.tolist()
    assert str(chat_tokenizer.decode(without.tokens)).startswith("!<|im_start|>user")
    for settings in ({"system": "s"}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(ValueError, match="chat=true"):
            pair_data(**settings)


def test_braces_reach_into_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"no column `a\.__class__`"):
        encode(pair_data(prompt="{a.__class__}"), tiny_tokenizer, [{"a": "x", "completion": "y"}])


def test_question_and_answer_are_suggested(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"Set data\.prompt='\{question\}\\n' data\.completion=answer"):
        encode(pair_data(), tiny_tokenizer, [{"question": "x", "answer": "y"}])


def test_a_pair_as_a_chat(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    [pair] = encode(pair_data(chat=True), chat_tokenizer, [{"prompt": "How?", "completion": "12"}], CHATML)
    assert chat_tokenizer.decode(pair.tokens) == (
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
    )
    assert learnt(chat_tokenizer, pair) == ["12<|im_end|>"]


def test_a_tokenizer_that_drops_characters_is_refused_where_it_matters() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("§", "removed")
    rows = [{"prompt": "How 🙂🙂🙂?", "completion": " 12"}]
    with pytest.raises(DataError, match="does not say where its tokens lie"):
        encode(pair_data(), tokenizer, rows)
    assert encode(pair_data(keep="all"), tokenizer, rows)[0].target_mask.all()


# --- real tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_real_tokenizers_learn_exactly_the_completion(shared_data, name: str) -> None:
    from stillroom.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    [document] = encode(pair_data(), tokenizer, [{"prompt": "2 + 2 =", "completion": " 4, naïve 🙂."}])
    first = document.target_mask.tolist().index(True)
    assert str(tokenizer.decode(document.tokens[:first])).endswith("2 + 2 =")
    assert document.target_mask[first:].all()
    assert document.tokens[-1] == tokenizer.eos_token_id
    assert document.tokens.tolist().count(tokenizer.bos_token_id) == 1


# --- what a row and its messages say besides -------------------------------------------------------------------------
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def called(arguments: object, **message) -> dict:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "Bern?"}, {"role": "assistant", "tool_calls": [call], **message}]}


def test_tools_and_a_system_text_reach_the_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"messages": TURNS[1:], "tools": tools, "system": "Be brief."} for tools in (TOOL, json.dumps(TOOL), None, [])
    ]
    texts = [str(chat_tokenizer.decode(d.tokens)) for d in encode(chat_data(), chat_tokenizer, rows, TOOLS)]
    for text, tools in zip(texts, (TOOL, TOOL, None, None), strict=True):
        assert text == chat_tokenizer.apply_chat_template(TURNS, tools=tools, chat_template=TOOLS, tokenize=False)
    assert '"weather"' in texts[0]


def test_settings_of_the_template_reach_it(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ 'thinks ' if thinking }}" + CHATML
    rows = [{"messages": TURNS, "chat_template_kwargs": {"thinking": value}} for value in (True, False)]
    texts = [str(chat_tokenizer.decode(d.tokens)) for d in encode(chat_data(), chat_tokenizer, rows, template)]
    assert [text.startswith("thinks ") for text in texts] == [True, False]


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}], ids=["null", "absent", "empty"])
@pytest.mark.parametrize(
    "arguments", [{"city": "Bern", "n": None}, '{"city": "Bern", "n": null}'], ids=["object", "text"]
)
def test_a_tool_call_needs_no_text(chat_tokenizer: PreTrainedTokenizerFast, content: dict, arguments: object) -> None:
    [document] = encode(chat_data(), chat_tokenizer, [called(arguments, **content)], TOOLS)
    assert learnt(chat_tokenizer, document) == ['<call>weather {"city": "Bern", "n": null}</call><|im_end|>']


@pytest.mark.parametrize("key", ["weight", "train", "loss_mask"])
@pytest.mark.parametrize("marks", [False, True], ids=["by turns", "by marks"])
def test_a_message_that_is_not_to_be_learned_is_not(chat_tokenizer, key: str, marks: bool) -> None:
    turns = [{**turn, key: 0} if turn["content"].startswith("12") else turn for turn in TURNS]
    assert turns != TURNS
    [document, whole] = encode(
        chat_data(), chat_tokenizer, [{"messages": turns}, {"messages": TURNS}], MARKED if marks else CHATML
    )
    assert document.tokens.tolist() == whole.tokens.tolist()
    assert learnt(chat_tokenizer, document) == learnt(chat_tokenizer, whole)[1:]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": TURNS, "tools": "hammer"}, "its `tools` are no list"),
        ({"messages": TURNS, "functions": TOOL}, "`functions` are not read"),
        ({"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"}, "two system messages"),
        ({"messages": [{**TURNS[0], "weight": 1}, *TURNS[1:]]}, "is to be learned, and is not the assistant's"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": "x", "weight": 0.5}]}, "does not say whether"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": None}]}, "message 2 has no text"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "function_call": {"name": "x"}}]}, "a way that is not read"),
        (called("not JSON"), "arguments that are no object"),
        (called({}, tool_calls=[3]), "tool calls that are no list of objects"),
    ],
)
def test_what_would_be_passed_over_is_refused(chat_tokenizer: PreTrainedTokenizerFast, row: dict, what: str) -> None:
    with pytest.raises(DataError, match=what):
        encode(chat_data(), chat_tokenizer, [row], TOOLS)


@pytest.mark.parametrize(("row", "what"), [({"messages": TURNS, "tools": TOOL}, "tools"), (called({}), "tool_calls")])
def test_a_template_without_a_place_for_tools_is_told(chat_tokenizer, row: dict, what: str) -> None:
    with pytest.raises(DataError, match=f"the chat template has no place for `{what}`"):
        encode(chat_data(), chat_tokenizer, [row], CHATML)


def test_only_the_last_answer_is_learned(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": TURNS}, {"messages": [*TURNS[:4], {**TURNS[4], "weight": 0}]}]
    for template in (CHATML, MARKED):
        last, none = encode(chat_data(keep="last"), chat_tokenizer, rows, template)
        assert [text.strip() for text in learnt(chat_tokenizer, last)] == ["Yes.\n<|im_end|>"]
        assert not none.target_mask.any()


def test_other_words_for_roles(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [{"role": "Q", "content": "How?"}, {"role": "bot", "content": "So."}]}
    with pytest.raises(DataError, match="unknown role") as caught:
        encode(chat_data(), chat_tokenizer, [row], CHATML)
    assert "data.roles" in str(caught.value)
    [document] = encode(chat_data(roles={"Q": "user", "bot": "assistant"}), chat_tokenizer, [row], CHATML)
    assert learnt(chat_tokenizer, document) == ["So.<|im_end|>"]


def test_content_in_parts(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "How many "}, {"type": "text", "text": "drops?"}]
    turns = [TURNS[0], {"role": "user", "content": parts}, *TURNS[2:]]
    documents = encode(chat_data(), chat_tokenizer, [{"messages": TURNS}, {"messages": turns}], CHATML)
    assert documents[0].tokens.tolist() == documents[1].tokens.tolist()
    turns[1]["content"] = [*parts, {"type": "image_url", "image_url": {"url": "x.png"}}]
    with pytest.raises(DataError, match="message 2 has a part that is not text"):
        encode(chat_data(), chat_tokenizer, [{"messages": turns}], CHATML)


def test_all_cannot_be_learned_where_a_message_says_otherwise(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [TURNS[1], {**TURNS[2], "weight": 0}]}
    with pytest.raises(DataError, match=r"data\.keep says that all is"):
        encode(chat_data(keep="all"), chat_tokenizer, [row], CHATML)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, True),
        (MARKED, True),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
         "{% endif %}", False),
        ("{{ raise_exception('never') }}", None),
    ],
)  # fmt: skip
def test_a_template_in_which_no_end_is_learned_is_known(chat_tokenizer, template: str, wanted: bool | None) -> None:
    assert learns_to_stop(chat_tokenizer, template) is wanted


# --- tokens -----------------------------------------------------------------------------------------------------------
def tokens_data(**settings) -> TokensData:
    return TokensData(format="tokens", path="x.jsonl", **settings)


def test_rows_that_are_tokenized_already(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"tokens": [0, 5, 299], "m": [0, 1, True]}, {"tokens": [], "m": []}]
    whole, empty = encode(tokens_data(), tiny_tokenizer, rows)
    assert (whole.tokens.tolist(), whole.tokens.dtype, whole.target_mask.all()) == ([0, 5, 299], "int32", True)
    assert not len(empty.tokens)
    masked, _ = encode(tokens_data(loss_mask="m"), tiny_tokenizer, rows)
    assert masked.target_mask.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"t": [1]}, "has no column `tokens`"),
        ({"tokens": "1 2", "m": []}, "does not hold whole numbers"),
        ({"tokens": [1, 2.0], "m": []}, "does not hold whole numbers"),
        ({"tokens": [1, 2**70], "m": []}, "does not hold whole numbers"),
        ({"tokens": [1, 300], "m": []}, r"means nothing\n  found: 300 +from 0 to: 299"),
        ({"tokens": [-1], "m": []}, "found: -1"),
        ({"tokens": [1, 2], "m": [1]}, r"tokens: 2 +m: 1"),
        ({"tokens": [1, 2], "m": [1, 2]}, r"found: 2 +from 0 to: 1"),
    ],
)
def test_tokens_that_mean_nothing_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(tokens_data(loss_mask="m"), tiny_tokenizer, [row])


def test_a_tokenizer_that_cannot_say_a() -> None:
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "A": 2, "C": 3}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    [document] = encode(text_data(), tokenizer, [{"text": "ACCA"}])
    assert document.tokens.tolist() == [2, 3, 3, 2, 1]
    assert document.target_mask.all()

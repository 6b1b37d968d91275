"""What models answer: the tokens that `generate` would give, drawn by the seed alone, piece by piece."""

import threading

import pytest
import torch
from transformers import GenerationConfig

from conftest import build_model
from stillroom.chat.config import ChatConfig
from stillroom.chat.run import ChatModel, answers, load, run
from stillroom.config import load as load_config
from stillroom.errors import ConfigError

SETTINGS = {"system": None, "max_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3}


def talk(tokenizer, *seeds: int, prompt: str = "The still", **settings) -> list[str]:
    models = [ChatModel(f"model {seed}", build_model(seed=seed), tokenizer) for seed in seeds]
    texts = [""] * len(models)
    for piece in answers(models, prompt, **{**SETTINGS, **settings}):
        texts[piece.model] += piece.text
    return texts


def test_the_likeliest_tokens_are_those_of_generate(tiny_tokenizer):
    model = build_model(seed=1)
    ids = tiny_tokenizer("The still", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert talk(tiny_tokenizer, 1, temperature=0) == [tiny_tokenizer.decode(wanted, skip_special_tokens=True)]


def test_an_answer_does_not_depend_on_who_else_answers(tiny_tokenizer):
    """Each model draws with a generator of its own."""
    torch.manual_seed(0)
    alone = talk(tiny_tokenizer, 1) + talk(tiny_tokenizer, 2)
    torch.manual_seed(1)
    assert talk(tiny_tokenizer, 1, 2) == alone
    assert talk(tiny_tokenizer, 1, seed=4) != alone[:1]


def test_the_model_s_own_texts_end_an_answer_and_are_not_shown(tiny_tokenizer):
    """Nor are their beginnings, wherever the pieces are cut."""
    (whole,) = talk(tiny_tokenizer, 1, temperature=0)
    chat = ChatModel("m", build_model(seed=1), tiny_tokenizer)
    chat.model.generation_config = GenerationConfig(stop_strings=["never there", whole[4:7]])
    chat.model.generation_config.num_return_sequences = 2
    pieces = list(answers([chat], "The still", **{**SETTINGS, "temperature": 0}))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(whole[4:7])]
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_conversation_goes_through_the_template_and_is_remembered(chat_tokenizer):
    chat = ChatModel("m", build_model(seed=1, max_position_embeddings=512), chat_tokenizer)
    for prompt in ("How many?", "And now?"):
        answer = "".join(piece.text for piece in answers([chat], prompt, **{**SETTINGS, "system": "Be brief."}))
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in chat.messages] == roles
    assert chat.messages[-1]["content"] == answer
    text = chat_tokenizer.decode(chat.tokens("More?", None, 1))
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text
    assert text.endswith("<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_that_leaves_no_room_for_the_answer(tiny_tokenizer):
    with pytest.raises(ConfigError, match="cannot read prompt and answer") as caught:
        talk(tiny_tokenizer, 1, max_tokens=60)
    assert caught.value.fix == "Set max_tokens to at most 57."


def test_who_stops_reading_stops_the_models(tiny_tokenizer):
    before = threading.active_count()
    pieces = answers(
        [ChatModel("m", build_model(seed=1), tiny_tokenizer)], "The still", **{**SETTINGS, "max_tokens": 50}
    )
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_an_error_of_a_model_is_raised(tiny_tokenizer, monkeypatch):
    model = build_model(seed=1)
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(answers([ChatModel("m", model, tiny_tokenizer)], "The still", **SETTINGS))


def test_the_folder_of_a_run_means_its_model(saved_model, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "model").symlink_to(saved_model(seed=1))
    loaded = load(str(tmp_path), device="cpu", dtype="auto", trust_remote_code=False)
    assert loaded.name == str(tmp_path / "model")


def test_each_prompt_is_answered_by_every_model(saved_model):
    models = [str(saved_model(seed=1)), str(saved_model(seed=2))]
    config = load_config(ChatConfig, None, [f"models={models}", "max_tokens=4", "device=cpu"])
    seen = []
    run(config, ["The still", "A teacher"], lambda pieces: seen.append({piece.model for piece in pieces}), print)
    assert seen == [{0, 1}, {0, 1}]


@pytest.mark.parametrize("turn_by_turn", [True, False])
@pytest.mark.parametrize("way", ["too long", "stopped"])
def test_a_turn_that_fails_ends_alone_where_one_is_asked_turn_by_turn(
    saved_model, chat_tokenizer_folder, way, turn_by_turn
):
    model = saved_model(seed=1, tokenizer=chat_tokenizer_folder, max_position_embeddings=512)
    config = load_config(ChatConfig, None, [f"models=[{model}]", "max_tokens=40", "temperature=0", "device=cpu"])
    num_threads = threading.active_count()
    given, shown, told = ["How many?", "again " * 500 if way == "too long" else "And now?", "And now?"], [], []

    def show(pieces) -> None:
        texts = []
        for piece in pieces:
            texts.append(piece.text)
            if way == "stopped" and len(shown) == 1:
                shown.append(None)
                raise KeyboardInterrupt
        shown.append("".join(texts))

    if not turn_by_turn:
        with pytest.raises(ConfigError if way == "too long" else KeyboardInterrupt):
            run(config, given, show, told.append)
        assert told == []
        return
    run(config, given, show, told.append, turn_by_turn=True)
    assert threading.active_count() == num_threads
    assert len(told) == 1
    assert told[0].startswith("error: " if way == "too long" else "\nstopped; this turn is forgotten")
    wanted = []
    run(
        config, [given[0], given[2]], lambda pieces: wanted.append("".join(piece.text for piece in pieces)), told.append
    )
    assert [text for text in shown if text is not None] == wanted, "the turn that failed was remembered"

"""Writing: the likeliest token at each step, the same in any batch, ended where it should."""

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from conftest import build_model
from stillroom.errors import DataError, NonFiniteError, OutOfMemoryError
from stillroom.evaluate.tasks import lm
from stillroom.evaluate.tasks.lm import generate
from stillroom.models.generation import cut

PROMPTS = ["The still", "A teacher says what it thinks of every word", "12", "User: how many drops?"]


def step_by_step(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, number: int) -> str:
    tokens = list(tokenizer(prompt)["input_ids"])
    start = len(tokens)
    for _ in range(number):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.parametrize("num_tokens", [None, 1])
def test_is_the_likeliest_token_at_each_step(tiny_tokenizer: PreTrainedTokenizerFast, num_tokens: int | None):
    model, told = build_model(), []
    found = generate(model, tiny_tokenizer, PROMPTS, until=(), max_tokens=8, num_tokens=num_tokens, done=told.append)
    assert [one.text for one in found] == [step_by_step(model, tiny_tokenizer, prompt, 8) for prompt in PROMPTS]
    assert told[-1] == len(PROMPTS)


def test_penalties_and_beams_of_the_model_s_own_config_are_left_out(tiny_tokenizer: PreTrainedTokenizerFast):
    model = build_model()
    own = GenerationConfig(repetition_penalty=5.0, num_beams=3, min_new_tokens=8, no_repeat_ngram_size=1)
    model.generation_config = own
    found = generate(model, tiny_tokenizer, PROMPTS, until=(), max_tokens=8)
    assert [one.text for one in found] == [step_by_step(model, tiny_tokenizer, prompt, 8) for prompt in PROMPTS]
    assert model.generation_config is own


def test_ends_before_the_first_stop_and_writes_no_more(tiny_tokenizer: PreTrainedTokenizerFast):
    model = build_model()
    (whole,) = generate(model, tiny_tokenizer, PROMPTS[:1], until=(), max_tokens=20)
    stop = whole.text[5:7]
    read = []
    model.model.register_forward_pre_hook(lambda *_: read.append(1))
    (found,) = generate(model, tiny_tokenizer, PROMPTS[:1], until=("never there", stop), max_tokens=20)
    assert found.text == whole.text[: whole.text.index(stop)]
    assert len(read) < 20


def test_too_long_a_prompt_is_cut_at_its_left_and_told(tiny_tokenizer: PreTrainedTokenizerFast):
    model = build_model(max_position_embeddings=16)
    ids = tiny_tokenizer(PROMPTS[1])["input_ids"]
    (found,) = generate(model, tiny_tokenizer, [PROMPTS[1]], until=(), max_tokens=4)
    assert found.num_cut == len(ids) - 12 > 0


def test_an_answer_that_leaves_no_room_for_a_question_is_refused(tiny_tokenizer: PreTrainedTokenizerFast):
    model = build_model(max_position_embeddings=16)
    assert generate(model, tiny_tokenizer, PROMPTS[:1], until=(), max_tokens=15)[0].num_cut > 0
    with pytest.raises(DataError, match="longer than the model can read"):
        generate(model, tiny_tokenizer, PROMPTS[:1], until=(), max_tokens=16)


def test_logits_that_are_no_numbers_are_refused(tiny_tokenizer: PreTrainedTokenizerFast):
    model = build_model()
    torch.nn.init.constant_(model.lm_head.weight[3], torch.nan)
    with pytest.raises(NonFiniteError):
        generate(model, tiny_tokenizer, PROMPTS[:1], until=(), max_tokens=2)


def test_a_prompt_that_begins_with_the_beginning_of_sequence_has_one(tiny_tokenizer: PreTrainedTokenizerFast):
    model, read = build_model(), []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    plain, begun = (
        generate(model, tiny_tokenizer, [text], until=(), max_tokens=1)[0] for text in ("The still", "<s>The still")
    )
    assert plain == begun
    assert read[0].tolist() == read[1].tolist()


def test_memory_that_does_not_suffice_for_one_answer_is_told(tiny_tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm, "_generate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(OutOfMemoryError, match="a single answer"):
        generate(build_model(), tiny_tokenizer, PROMPTS, until=(), max_tokens=2)


def test_cut_takes_the_earliest():
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one", ("two",)) == "one"

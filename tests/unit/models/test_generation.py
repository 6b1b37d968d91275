"""Text that a model writes: the same alone and in a batch, drawn by its own seed, ended where any of its files says."""

from functools import wraps

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from conftest import CHATML, build_model
from stillroom.data.chat_templates import end_of_turn
from stillroom.errors import DataError, MismatchError, NonFiniteError
from stillroom.models.generation import (
    Sampling,
    Stops,
    draw,
    end_tokens,
    generate,
    groups,
    own_stops,
    stands_padding,
)

PROMPTS = [[5, 9, 7], [8, 3, 4, 11, 6, 20, 14, 5, 9, 21, 22, 23, 24], [30], [12, 13, 14]]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8, "rope_theta": 10000.0}


def long_rope(border: int) -> PreTrainedModel:
    rope = {**LONGROPE, "original_max_position_embeddings": border, "factor": 4.0}
    return build_model(head_dim=16, rope_parameters=rope, max_position_embeddings=4 * border)


def unmasked() -> PreTrainedModel:
    """A model that takes padding for tokens, as some recurrent families do."""
    model = build_model()
    forward = model.forward

    @wraps(forward)
    def without_mask(**given):
        return forward(**{**given, "attention_mask": None, "position_ids": None})

    model.forward = without_mask
    return model


def write(model: PreTrainedModel, prompts, *, seeds=(), stops=None, ends=(), **sampling) -> list[list[list[int]]]:
    drawn = Sampling(**{"max_tokens": 8, **sampling})
    found = generate(model, prompts, drawn, ends=ends, pad_token=0, seeds=seeds, stops=stops)
    return [[answer.tolist() for answer in several] for several in found]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "long_rope", "unmasked"])
def test_an_answer_is_the_same_alone_and_in_its_group(family, temperature):
    made = {"long_rope": lambda: long_rope(20), "unmasked": unmasked}
    model = made[family]() if family in made else build_model(family)
    num_answers = 2 if temperature else 1
    seeds = [40, 41, 42, 43]
    alone = [
        write(model, [prompt], seeds=[seed], temperature=temperature, num_answers=num_answers)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    found, made_groups = {}, groups(model, list(map(len, PROMPTS)), 8)
    for group in made_groups:
        together = write(
            model, [PROMPTS[i] for i in group], seeds=[seeds[i] for i in group],
            temperature=temperature, num_answers=num_answers,
        )  # fmt: skip
        found |= dict(zip(group, together, strict=True))
    assert [found[i] for i in range(len(PROMPTS))] == alone
    if temperature:
        assert all(one != two for one, two in alone)
    assert (
        made_groups
        == {
            "llama": [[1, 0, 3, 2]],
            "gpt2": [[1, 0, 3, 2]],
            "long_rope": [[1], [0, 3, 2]],  # 13 + 8 tokens pass the border, 3 + 8 do not
            "unmasked": [[1], [0, 3], [2]],
        }[family]
    )


def test_a_family_that_does_not_mask_its_padding_is_found():
    assert stands_padding(build_model())
    assert not stands_padding(unmasked())


def test_tokens_are_drawn_from_the_tempered_distribution():
    logits, generator = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(logits, Sampling(1, 0.5), [generator])] += 1
    assert torch.allclose(counts / 4000, torch.softmax(logits[0] / 0.5, 0), atol=0.02)


@pytest.mark.parametrize(("top_p", "left"), [(0.1, 1), (0.65, 2), (0.9, 3), (1.0, 4)])
def test_the_nucleus_is_the_fewest_tokens_that_have_the_mass(top_p, left):
    logits, generator = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), torch.Generator().manual_seed(0)
    seen = {int(draw(logits, Sampling(1, 1.0, top_p), [generator])) for _ in range(200)}
    assert seen == set([1, 3, 2, 0][:left])


def test_a_token_without_probability_is_never_drawn(monkeypatch):
    """Not even by the smallest and the largest number that a generator gives."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.3, -torch.inf]])
    for uniform, token in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, value=uniform, **__: torch.tensor([value], dtype=torch.float64))
        assert draw(logits, Sampling(1, 1.0), [torch.Generator()]).tolist() == [[token]]


def test_the_process_s_own_generator_and_the_model_s_config_stay_as_they_were():
    model, state = build_model(), torch.get_rng_state()
    own = model.generation_config = GenerationConfig(repetition_penalty=5.0, num_beams=3, num_return_sequences=2)
    wanted = write(build_model(), PROMPTS, seeds=range(4), temperature=1.0)
    assert write(model, PROMPTS, seeds=range(4), temperature=1.0) == wanted
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


def test_no_token_beyond_the_vocabulary_is_written():
    for temperature in (0.0, 3.0):
        sampling = Sampling(30, temperature)
        ((answer,),) = generate(build_model(), PROMPTS[:1], sampling, ends=[], pad_token=0, seeds=[1], vocab_size=25)
        assert len(answer) == 30
        assert answer.max() < 25


def test_each_answer_ends_with_its_first_end():
    (whole,) = write(build_model(), PROMPTS[:1], max_tokens=12)[0]
    end = whole[3]
    first = whole.index(end)
    found = write(build_model(), PROMPTS[:2], max_tokens=12, ends=[end, 299])
    assert found[0] == [whole[: first + 1]]


def test_a_text_ends_an_answer_with_the_token_that_completes_it(tiny_tokenizer):
    (whole,) = write(build_model(), PROMPTS[:1], max_tokens=12)[0]
    text = tiny_tokenizer.decode(whole)
    for stop in (text[3:6], text[7:9]):
        (found,) = write(build_model(), [PROMPTS[1], PROMPTS[0]], max_tokens=12, stops=Stops([stop], tiny_tokenizer))[1]
        assert found == whole[: len(found)]
        assert stop in tiny_tokenizer.decode(found)
        assert stop not in tiny_tokenizer.decode(found[:-1])


def test_a_token_without_an_embedding_is_refused():
    with pytest.raises(MismatchError, match="no embedding") as caught:
        write(build_model(), [[3, 512]])
    assert caught.value.values["token"] == 512


def test_logits_that_are_no_numbers_are_refused():
    model = build_model()
    torch.nn.init.constant_(model.lm_head.weight[3], torch.nan)
    with pytest.raises(NonFiniteError, match="not a number"):
        write(model, PROMPTS[:1])


# --- what ends an answer ---------------------------------------------------------------------------------------------
def test_the_ends_of_all_files_count(chat_tokenizer):
    """As of the many models whose generation_config.json names <|endoftext|> alone, where a turn ends with
    <|im_end|>."""
    model = build_model()
    model.config.eos_token_id, model.generation_config = [7, 9], GenerationConfig(eos_token_id=11)
    of_turn = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    turn_end = end_of_turn(chat_tokenizer, CHATML)
    assert turn_end == "<|im_end|>"
    assert end_tokens(model, chat_tokenizer, turn_end) == [11, 7, 9, chat_tokenizer.eos_token_id, of_turn]
    assert of_turn not in end_tokens(model, chat_tokenizer, None)


@pytest.mark.parametrize("after", ["", "e", " the end"])
def test_words_that_a_template_writes_after_a_turn_end_nothing(chat_tokenizer, after):
    """They may stand in any answer."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + after + "{% endfor %}"
    model = build_model()
    assert end_tokens(model, chat_tokenizer, end_of_turn(chat_tokenizer, template)) == end_tokens(
        model, chat_tokenizer, None
    )


@pytest.mark.parametrize("said", ["2", 1.5, [2, "3"], True, {"a": 1}])
def test_an_end_that_is_no_token_is_refused(chat_tokenizer, said):
    model = build_model()
    model.generation_config = GenerationConfig()
    model.generation_config.eos_token_id = said
    with pytest.raises(DataError, match="eos_token_id"):
        end_tokens(model, chat_tokenizer, None)


def test_texts_that_end_an_answer_are_texts():
    model = build_model()
    for said, wanted in ((None, []), ("END", ["END"]), (["a", ""], ["a"])):
        model.generation_config.stop_strings = said
        assert own_stops(model) == wanted
    model.generation_config.stop_strings = [3]
    with pytest.raises(DataError, match="stop_strings"):
        own_stops(model)


def test_answers_are_int32():
    ((answer,),) = generate(build_model(), [np.array([3, 4])], Sampling(2), ends=[], pad_token=0)
    assert answer.dtype == np.int32

"""A teacher in this process, against a plain forward pass over each document by itself.

The models are in float64, where how documents are batched changes no number that is stored.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import build_documents, build_model
from stillroom.batch import Batch
from stillroom.capture.config import Generate
from stillroom.capture.signals import CapturedSignal, Document, SignalCapture, uniforms
from stillroom.errors import NonFiniteError
from stillroom.models import hidden_states
from stillroom.store.config import AnySignal, Full, HeadAndSample, Sampled, TopK, TopP
from stillroom.store.quantize import LogProbCodes, to_sparse
from stillroom.teachers.live import LiveTeacher

COLUMNS = 300
LENGTHS = [6, 33, 12, 2, 29, 7, 18, 33, 5]
SIGNALS: list[AnySignal] = [
    TopK(kind="top_k", k=7, label=True, entropy=True, temperatures=(2.0,)),
    TopP(kind="top_p", mass=0.8, most=9, label=True),
    Sampled(kind="sampled", draws=12, label=True),
    HeadAndSample(kind="head_and_sample", head=5, draws=4, least=0.01, label=True),
    HeadAndSample(kind="head_and_sample", head=5, draws=4, least=0.0),
]
NAMES = ["top_k", "top_p", "sampled", "head_and_sample", "head_and_sample, least 0"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model("llama", seed=2).double()


def teacher(
    model: PreTrainedModel, signal: AnySignal, *, batch_tokens: int = 64, logits_bytes: int = 2**20, **settings: Any
) -> SignalCapture:
    values: dict[str, Any] = {"vocab_size": COLUMNS, "length": 32, "pack": True, "seed": 0, "ends": [1], **settings}
    return SignalCapture(LiveTeacher(model), signal, batch_tokens=batch_tokens, logits_bytes=logits_bytes, **values)


def documents(lengths: Sequence[int] = LENGTHS, first: int = 0) -> list[Document]:
    made = build_documents(list(lengths))
    return [Document(first + i, made.tokens(i), made.target_mask(i)) for i in range(len(made))]


def levels_of(said: CapturedSignal) -> LogProbCodes:
    assert isinstance(said.signal, LogProbCodes)
    return said.signal


def same(one: Sequence[CapturedSignal], other: Sequence[CapturedSignal]) -> bool:
    pairs = [(levels_of(a), levels_of(b)) for a, b in zip(one, other, strict=True)]
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in pairs
        for name in LogProbCodes.__dataclass_fields__
    )


def plain_logits(model: PreTrainedModel, document: Document) -> Tensor:
    """float64 [kept, columns], from the document alone."""
    with torch.no_grad():
        logits = model(torch.from_numpy(document.tokens.astype(np.int64))[None]).logits[0, :, :COLUMNS]
    return logits[torch.from_numpy(document.loss_mask)].double()


# --- what cannot be said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [*SIGNALS, Full(kind="full")], ids=[*NAMES, "full"])
def test_a_teacher_that_says_nothing_is_heard(model, signal, monkeypatch):
    """The document and the position are named; what is not to be learned may be anything."""
    asked = documents(first=40)
    positions = np.flatnonzero(asked[4].loss_mask)[[5, 6]].tolist()
    run = hidden_states.last_hidden_states

    def broken(model: PreTrainedModel, batch: Batch) -> Tensor:
        at = (batch.documents == 4) & torch.isin(
            batch.positions, torch.tensor(positions)
        ) & batch.loss_mask | ~batch.loss_mask
        return run(model, batch).masked_fill(at.unsqueeze(-1), math.nan)

    monkeypatch.setattr(hidden_states, "last_hidden_states", broken)
    with pytest.raises(NonFiniteError, match=r"not finite in document 44\n") as raised:
        teacher(model, signal, logits_bytes=8 * 300 * 4).capture(asked)
    assert raised.value.values["position"] == f"{positions[0]} (from 0)"
    assert raised.value.values["columns"] == "300 of 300 are not a number"
    positions.clear()
    assert len(teacher(model, signal).capture(asked)) == len(asked)


@pytest.mark.parametrize("signal", [*SIGNALS, Full(kind="full")], ids=[*NAMES, "full"])
def test_impossible_tokens_and_columns_that_do_not_count(signal):
    model = build_model("phi", seed=2).double()
    with torch.no_grad():
        model.lm_head.bias[3], model.lm_head.bias[COLUMNS] = -math.inf, math.nan
    for said in teacher(model, signal).capture(documents()):
        if isinstance(said.signal, LogProbCodes):
            assert 3 not in (*said.signal.ids, *said.signal.sample_ids)
        else:
            assert np.isneginf(said.signal[:, 3]).all()
            assert np.isfinite(np.delete(said.signal, 3, axis=1)).all()


@pytest.mark.parametrize(
    ("bias", "columns"), [(math.inf, "1 of 300 are infinite"), (-math.inf, "300 of 300 are -infinity")]
)
def test_one_token_that_is_infinitely_likely_and_none_that_is_possible(bias, columns):
    model = build_model("phi", seed=2).double()
    with torch.no_grad():
        model.lm_head.bias[3 if bias > 0 else slice(None)] = bias
    with pytest.raises(NonFiniteError) as raised:
        teacher(model, SIGNALS[3]).capture(documents())
    assert raised.value.values["columns"] == columns


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_cannot_be_taken_from_anything(model, temperature):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[9] = math.nan
    prompts = [(7, np.array([1, 2, 3, 4])), (8, np.array([5, 9]))]
    with pytest.raises(NonFiniteError, match="not finite in document 8") as raised:
        teacher(broken, Full(kind="full")).answers(prompts, Generate(max_tokens=2, temperature=temperature, answers=1))
    assert raised.value.values["position"] == "1 (from 0)"


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "phi"])
def test_every_logit_is_that_of_a_plain_forward_pass(family):
    model = build_model(family, seed=2).double()
    asked = documents()
    said = teacher(model, Full(kind="full"), pack=family not in ("gpt2",)).capture(asked)
    for document, (logits, error, _) in zip(asked, said, strict=True):
        assert isinstance(logits, np.ndarray)
        assert logits.shape == (int(document.loss_mask.sum()), COLUMNS)
        assert error == 0
        assert np.abs(logits - plain_logits(model, document).numpy()).max(initial=0) < 1e-6  # gemma2 norms in float32


def check_truncated(read, log_p: Tensor, logits: Tensor, wanted: Sequence[Sequence[int]], signal: TopK | TopP) -> None:
    for row, ids in enumerate(wanted):
        there = torch.isfinite(read.log_probs[row])
        assert read.ids[row][there].tolist() == list(ids)
        assert (read.log_probs[row][there] - log_p[row, ids]).abs().max() <= signal.step / 2 + 1e-4
        for temperature, rests in read.log_rests.items():
            tempered = (logits[row] / temperature).log_softmax(-1)
            tempered[list(ids)] = -torch.inf
            assert abs(rests[row] - tempered.logsumexp(-1)) <= 0.0051


@pytest.mark.parametrize("pack", [True, False])
def test_the_likeliest_are_those_of_a_plain_forward_pass(model, pack):
    signal = SIGNALS[0]
    assert isinstance(signal, TopK)
    asked = documents()
    for document, said in zip(asked, teacher(model, signal, pack=pack).capture(asked), strict=True):
        logits = plain_logits(model, document)
        log_p = logits.log_softmax(-1)
        read = to_sparse(levels_of(said), signal)
        assert sorted(read.log_rests) == [1.0, 2.0]
        check_truncated(read, log_p, logits, log_p.topk(7).indices.tolist(), signal)
        assert read.entropy is not None
        assert (read.entropy - torch.special.entr(log_p.exp()).sum(-1)).abs().max() <= 1 / 127


@pytest.mark.parametrize("pack", [True, False])
def test_the_nucleus_is_that_of_a_plain_forward_pass(model, pack):
    signal = SIGNALS[1]
    assert isinstance(signal, TopP)
    asked = documents()
    for document, said in zip(asked, teacher(model, signal, pack=pack).capture(asked), strict=True):
        logits = plain_logits(model, document)
        log_p = logits.log_softmax(-1)
        wanted = []
        for row in log_p:
            ids, mass = [], 0.0
            for i in row.argsort(descending=True).tolist():
                if mass >= signal.mass or len(ids) == signal.most:
                    break
                ids, mass = [*ids, i], mass + float(row[i].exp())
            wanted.append(ids)
        check_truncated(to_sparse(levels_of(said), signal), log_p, logits, wanted, signal)


def pairs(levels: LogProbCodes, row: int) -> dict[int, int]:
    """The drawn ids of a position, with how often each came."""
    ends = np.cumsum(levels.sample_counts)
    part = slice(int(ends[row] - levels.sample_counts[row]), int(ends[row]))
    return dict(zip(levels.sample_ids[part].tolist(), levels.sample_repeats[part].tolist(), strict=True))


def drawn(probabilities: np.ndarray, points: np.ndarray) -> dict[int, int]:
    found = np.searchsorted(np.cumsum(probabilities), points, side="right").tolist()
    return {i: found.count(i) for i in found}


@pytest.mark.parametrize("pack", [True, False])
def test_draws_are_those_of_the_plain_distribution(model, pack):
    signal = SIGNALS[2]
    assert isinstance(signal, Sampled)
    asked, asks = documents(first=40), teacher(model, signal, pack=pack)
    for document, said in zip(asked, asks.capture(asked), strict=True):
        p = plain_logits(model, document).softmax(-1).numpy()
        points = uniforms(signal, 0, document.number, int(document.loss_mask.sum()))[:, : signal.draws]
        levels = levels_of(said)
        assert not levels.counts.any()
        for row in range(len(p)):
            assert pairs(levels, row) == drawn(p[row], points[row].astype(np.float64) * p[row].sum())


@pytest.mark.parametrize("signal", SIGNALS[3:], ids=NAMES[3:])
@pytest.mark.parametrize("pack", [True, False])
def test_head_and_draws_are_those_of_the_plain_distribution(model, signal, pack):
    asked, asks = documents(first=40), teacher(model, signal, pack=pack)
    for document, said in zip(asked, asks.capture(asked), strict=True):
        p = plain_logits(model, document).softmax(-1).numpy()
        points = uniforms(signal, 0, document.number, int(document.loss_mask.sum())).astype(np.float64)
        levels = levels_of(said)
        ends = np.cumsum(levels.counts)
        for row in range(len(p)):
            order = np.argsort(-p[row])[: signal.head]
            head = [i for k, i in enumerate(order.tolist()) if p[row, i] >= signal.least or not k]
            part = slice(int(ends[row] - levels.counts[row]), int(ends[row]))
            assert sorted(levels.ids[part].tolist()) == sorted(head)
            exact = -np.log(p[row, levels.ids[part]]) / signal.step
            assert (np.abs(levels.levels[part] - exact) < 1).all()  # rounded up or down at random
            tail = p[row].copy()
            tail[head] = 0
            unit = max(tail.sum() / signal.draws, signal.least)
            drawn_at = (points[row, 0] + np.arange(signal.draws)) * unit
            assert pairs(levels, row) == drawn(tail, drawn_at[drawn_at < tail.sum()])


@pytest.mark.parametrize("signal", SIGNALS[:4], ids=NAMES[:4])
def test_the_label_is_the_next_token(model, signal):
    asked = documents()
    for document, said in zip(asked, teacher(model, signal).capture(asked), strict=True):
        log_p = plain_logits(model, document).log_softmax(-1).numpy()
        labels = document.tokens[1:][document.loss_mask[:-1]]
        found = to_sparse(levels_of(said), signal).label_log_probs
        assert found is not None
        assert np.abs(found.numpy() - log_p[np.arange(len(labels)), labels]).max() <= 0.0051


def test_as_many_as_there_are_leave_nothing_out(model):
    signal = TopK(kind="top_k", k=65536)
    asked = documents([9, 12])
    for document, said in zip(asked, teacher(model, signal).capture(asked), strict=True):
        levels = levels_of(said)
        assert (levels.counts == COLUMNS).all()
        assert (levels.side[:, 0] == 0).all()  # nothing is left
        assert int(document.loss_mask.sum()) == len(levels)


def test_the_error_is_that_of_the_grid(model):
    asked = documents([33] * 8)
    for step in (0.1, 0.4):
        said = teacher(model, TopK(kind="top_k", k=30, step=step)).capture(asked)
        positions = sum(len(levels_of(s)) for s in said)
        assert 0 < sum(s.error_nats for s in said) / positions < step**2 / 12


# --- whatever the batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", SIGNALS, ids=NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_tokens": 32},
        {"batch_tokens": 1000, "pack": False},
        {"batch_tokens": 41, "logits_bytes": 1},
        {"pack": False, "logits_bytes": 4 * COLUMNS * 7},
        {"pad_token": 299, "pack": False},
    ],
    ids=str,
)
def test_what_is_said_does_not_depend_on_the_batch(model, signal, settings):
    asked = documents()
    assert same(teacher(model, signal).capture(asked), teacher(model, signal, **settings).capture(asked))


@pytest.mark.parametrize("signal", SIGNALS, ids=NAMES)
def test_what_is_said_of_a_document_does_not_depend_on_the_others(model, signal):
    asked, asks = documents(), teacher(model, signal)
    together = asks.capture(asked)
    assert same([asks.capture([document])[0] for document in asked], together)
    assert same(asks.capture(asked[::-1])[::-1], together)


@pytest.mark.parametrize("signal", SIGNALS[2:4], ids=NAMES[2:4])
def test_draws_depend_on_the_seed_and_on_the_number(model, signal):
    asked = documents()
    first = teacher(model, signal).capture(asked)
    assert same(teacher(model, signal).capture(asked), first)
    assert not same(teacher(model, signal, seed=1).capture(asked), first)
    assert not same(teacher(model, signal).capture(documents(first=1)), first)


@pytest.mark.parametrize("signal", SIGNALS[:2], ids=NAMES[:2])
def test_what_is_not_drawn_does_not_depend_on_the_seed(model, signal):
    asked = documents()
    assert same(teacher(model, signal, seed=1).capture(asked), teacher(model, signal).capture(asked))


@pytest.mark.parametrize("signal", [*SIGNALS[:4], Full(kind="full")], ids=[*NAMES[:4], "full"])
def test_only_kept_positions_are_said(model, signal):
    target_mask = np.zeros(12, bool)
    target_mask[[0, 5, 6, 11]] = True
    (sparse,) = [Document(9, documents([12])[0].tokens, target_mask)]
    (some,) = teacher(model, signal).capture([sparse])
    assert len(some.signal) == int(sparse.loss_mask.sum()) == 3
    if isinstance(signal, TopK | TopP):
        (all_,) = teacher(model, signal).capture([Document(9, sparse.tokens, np.ones(12, bool))])
        wanted = [levels_of(all_).slice(i, i + 1) for i in (4, 5, 10)]
        assert same([some], [CapturedSignal(LogProbCodes.concatenate(wanted), 0)])


def test_nothing_is_said_of_nothing(model):
    assert teacher(model, SIGNALS[0]).capture([]) == []


def test_it_leaves_torchs_random_state_as_it_was(model):
    before = torch.get_rng_state()
    asks = teacher(model, SIGNALS[3])
    asks.capture(documents())
    asks.answers([(0, np.array([5, 6], np.int32))], Generate(max_tokens=4, prompt_tokens=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_frozen():
    model = build_model("llama").train()
    teacher(model, SIGNALS[0])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- answers ---------------------------------------------------------------------------------------------------------

PROMPTS = [(n, np.arange(3 + 5 * n, 5 + 8 * n, dtype=np.int32)) for n in range(5)]


def listed(answers: list[list[np.ndarray]]) -> list[list[list[int]]]:
    return [[answer.tolist() for answer in several] for several in answers]


def greedy(model: PreTrainedModel, prompt: np.ndarray, most: int) -> list[int]:
    tokens = prompt.tolist()
    for _ in range(most):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :COLUMNS].argmax()))
        if tokens[-1] == 1:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_tokens", [32, 1000])
def test_at_temperature_0_the_likeliest_follow(model, batch_tokens):
    found = teacher(model, SIGNALS[0], batch_tokens=batch_tokens).answers(
        PROMPTS, Generate(max_tokens=6, temperature=0, prompt_tokens=1)
    )
    assert listed(found) == [[greedy(model, prompt, 6)] for _, prompt in PROMPTS]
    assert all(answer.dtype == np.int32 for several in found for answer in several)


def test_a_nucleus_of_nothing_is_the_likeliest(model):
    asks = teacher(model, SIGNALS[0])
    found = asks.answers(PROMPTS, Generate(max_tokens=6, top_p=1e-6, prompt_tokens=1))
    assert listed(found) == [[greedy(model, prompt, 6)] for _, prompt in PROMPTS]


def test_answers_are_the_same_for_the_same_seed_in_any_batch(model):
    generate = Generate(max_tokens=6, answers=3, prompt_tokens=1)
    first = listed(teacher(model, SIGNALS[0]).answers(PROMPTS, generate))
    for batch_tokens in (1, 100):
        assert listed(teacher(model, SIGNALS[0], batch_tokens=batch_tokens).answers(PROMPTS, generate)) == first
    assert listed(teacher(model, SIGNALS[0]).answers(PROMPTS[2:], generate)) == first[2:]
    assert [len(several) for several in first] == [3] * len(PROMPTS)
    assert all(len({tuple(answer) for answer in several}) == 3 for several in first)
    assert listed(teacher(model, SIGNALS[0]).answers(PROMPTS, generate)) == first
    assert listed(teacher(model, SIGNALS[0], seed=1).answers(PROMPTS, generate)) != first


def test_an_answer_stops_at_the_end_of_sequence_and_holds_it():
    model = build_model("phi", seed=2).double()
    bias = model.get_output_embeddings().bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias[1] += 12
    found = listed(teacher(model, SIGNALS[0]).answers(PROMPTS, Generate(max_tokens=20, answers=2, prompt_tokens=1)))
    answers = [answer for several in found for answer in several]
    assert all(answer.count(1) == (answer[-1] == 1) for answer in answers)
    assert any(answer[-1] == 1 for answer in answers)
    assert all(1 <= len(answer) <= 20 for answer in answers)


def test_an_answer_holds_no_token_that_the_tokenizer_lacks():
    model = build_model("phi", seed=2).double()
    bias = model.get_output_embeddings().bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias[COLUMNS:] += 30
    for temperature in (0.0, 1.0):
        found = listed(
            teacher(model, SIGNALS[0]).answers(
                PROMPTS, Generate(max_tokens=8, temperature=temperature, prompt_tokens=1)
            )
        )
        assert max(max(answer) for several in found for answer in several) < COLUMNS


@pytest.mark.parametrize(
    "habit", [{"repetition_penalty": 50.0}, {"min_new_tokens": 8}, {"no_repeat_ngram_size": 1}, {"num_beams": 3},
              {"min_p": 0.9}, {"top_k": 1}, {"typical_p": 0.1}, {"max_length": 5}], ids=str)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_own_habits_of_answering_do_not_count(habit, temperature):
    """Answers are drawn from the teacher's distribution by the settings of the capture alone."""
    generate = Generate(max_tokens=8, temperature=temperature, prompt_tokens=1)
    asked = [(0, np.array([61, 110, 61, 273], np.int32)), (1, np.array([0, 110, 4], np.int32))]
    plain, other = (build_model("phi", seed=2).double() for _ in range(2))
    for model in (plain, other):
        bias = model.get_output_embeddings().bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[[1, 61, 110]] += torch.tensor([4.0, 5.0, 5.0]).double()
    other.generation_config.update(**habit)
    one, two = (listed(teacher(model, SIGNALS[0]).answers(asked, generate)) for model in (plain, other))
    assert one == two


def test_no_prompts_have_no_answers(model):
    assert teacher(model, SIGNALS[0]).answers([], Generate(prompt_tokens=1)) == []

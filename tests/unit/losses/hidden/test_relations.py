"""Distances that go by document: chunks, what is kept for backward, causality, heads."""

import pytest
import torch
from distances import documents_of, random_states, values, values_and_gradients
from torch.autograd.graph import saved_tensors_hooks

from stillroom.errors import MismatchError
from stillroom.losses import hidden
from stillroom.losses.hidden import Pair, attention_relation, by_length
from stillroom.signals import Attention

LENGTHS = (9, 2, 9, 1, 20)
RELATION = "attention_relation"


@pytest.mark.parametrize("chunk_bytes", [1, 700, 3_000, 20_000, 10**9])
def test_relations_in_chunks_are_those_in_one(chunk_bytes):
    """From one row at a time, through parts of documents and some of several, to everything at once."""
    student, teacher = (random_states(RELATION, LENGTHS, seed=seed) for seed in (0, 1))
    wanted, wanted_gradients = values_and_gradients(RELATION, student, teacher, LENGTHS)
    found, gradients = values_and_gradients(RELATION, student, teacher, LENGTHS, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000])
def test_alignments_in_chunks_are_those_in_one(chunk_bytes, monkeypatch):
    student, teacher = (random_states("linear_cka", LENGTHS, seed=seed) for seed in (0, 1))
    wanted, wanted_gradients = values_and_gradients("linear_cka", student, teacher, LENGTHS)
    monkeypatch.setattr(hidden, "CKA_BYTES", chunk_bytes)
    found, gradients = values_and_gradients("linear_cka", student, teacher, LENGTHS)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["linear_cka", RELATION])
def test_nothing_that_grows_with_the_square_of_a_document_is_kept_for_backward(name):
    kept = 0

    def loss_mask(x):
        nonlocal kept
        kept += x.numel()
        return x

    student, teacher = (random_states(name, (100,), width=4, seed=seed) for seed in (0, 1))
    for x in student:
        x.requires_grad_()
    with saved_tensors_hooks(loss_mask, lambda x: x):
        values(name, student, teacher, (100,))
    assert kept <= 2 * len(student) * 100 * 4


def test_the_budget_holds_for_the_relations_held_at_once():
    """Of one document of 512 positions, whose relations would be 2 MB a head; what is read and a mask come on top."""
    student, teacher = (random_states(RELATION, (512,), 8, seed=seed) for seed in (0, 1))
    budget = 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        values_and_gradients(RELATION, student, teacher, (512,), chunk_bytes=budget)
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert budget / 2 < most < 1.1 * budget + 6 * student[0].nbytes


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_what_comes_later_changes_no_relation(changed, chunk_bytes):
    """Of queries, keys and values, in student and teacher."""
    student, teacher = (random_states(RELATION, (8,), seed=seed) for seed in (0, 1))
    before = values(RELATION, student, teacher, (8,), chunk_bytes=chunk_bytes)
    for side in (student, teacher):
        x = side[changed]
        old, x[5] = x[5].clone(), 50 * x[4]
        after = values(RELATION, student, teacher, (8,), chunk_bytes=chunk_bytes)
        x[5] = old
        assert torch.equal(after[:5], before[:5])
        assert (after[5:] != before[5:]).all()


def test_a_position_by_itself_relates_to_nothing_else():
    student, teacher = (random_states(RELATION, (1, 3), seed=seed) for seed in (0, 1))
    found, gradients = values_and_gradients(RELATION, student, teacher, (1, 3))
    assert (found == 0).tolist() == [True, True, False, False]
    assert all((gradient[0] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("case", ["one position", "two positions", "the same everywhere", "the teacher the same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_alignment_of_what_tells_nothing_is_0_with_no_gradient(case, dtype):
    m = {"one position": 1, "two positions": 2}.get(case, 5)
    student, teacher = (random_states("linear_cka", (m,), seed=seed, dtype=dtype) for seed in (0, 1))
    if "the same" in case:
        (teacher if "teacher" in case else student)[0][:] = torch.tensor([0.1, 0.7, 1e5, -3.3, 0.0, 1e-3])
    found, (gradient,) = values_and_gradients("linear_cka", student, teacher, (m,))
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_number_of_heads_counts_and_must_divide_all_widths():
    student, teacher = (random_states(RELATION, width=6, seed=seed) for seed in (0, 1))
    by_heads = [values(RELATION, student, teacher, heads=heads).sum().item() for heads in (1, 2, 3, 6)]
    assert len({round(x, 6) for x in by_heads}) == 4
    narrow = Attention(teacher[0], teacher[1][:, :4], teacher[2])
    pair = Pair(Attention(*student), narrow, torch.zeros(len(student[0]), dtype=torch.long))
    with pytest.raises(MismatchError) as error:
        attention_relation(pair, heads=3)
    assert str(error.value) == (
        "vectors cannot be split into 3 relation heads\n"
        "  heads: 3     teacher keys: 4 channels\n"
        "  Each relation head takes an equal share of the channels.\n"
        "  Choose a number of heads that divides the widths of queries, keys and values in both models."
    )
    with pytest.raises(MismatchError, match="split into 0 relation heads"):
        attention_relation(pair, heads=0)


def test_documents_by_length():
    """The same number again after another document is another document."""
    assert [x.tolist() for x in by_length(torch.tensor([4, 4, 0, 4, 4, 7, 7, 7]))] == [
        [[2]],
        [[0, 1], [3, 4]],
        [[5, 6, 7]],
    ]
    assert documents_of((2, 1)).tolist() == [0, 0, 1]
    assert by_length(torch.zeros(0, dtype=torch.long)) == []

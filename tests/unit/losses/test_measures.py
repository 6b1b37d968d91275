"""Measures: numbers that are only reported."""

import math

import pytest
import torch
from reference import naive_logits, objective, problem

from stillroom.errors import MismatchError
from stillroom.losses.block import LogitBlock
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.logits import confidence, correct, student_entropy, top1_agreement, top10_overlap
from stillroom.signals import Sparse


def test_top1_agreement_of_a_few_rows():
    student = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0], [-1.0, -2.0, -0.5]])
    teacher = torch.tensor([[0.0, 9.0, 8.0], [0.0, 0.0, 1.0], [-9.0, -8.0, -0.1]])
    agreement = top1_agreement(LogitBlock(student, teacher, torch.tensor([0, 0, 0])))
    assert agreement.tolist() == [1.0, 0.0, 1.0]
    assert agreement.dtype == torch.float32


@pytest.mark.parametrize("chunk_bytes", [1, 500, 2**20])
def test_top1_agreement_through_the_fused_path(chunk_bytes):
    p = problem(n=40, columns=5, teacher_columns=7)
    student, teacher = naive_logits(p.hidden, p.head(), 4), naive_logits(p.signal.hidden, p.signal.head, 4)
    wanted = [
        float(s.index(max(s)) == t.index(max(t))) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    tokens = p.labels.clamp(max=3)
    found = linear_losses(
        p.hidden, p.head(), [objective("forward_kl")], tokens, p.weights, p.signal,
        vocab_size=4, measures=[top1_agreement, lambda block: block.labels.double()], chunk_bytes=chunk_bytes,
    )  # fmt: skip
    assert found.measures[0].tolist() == wanted
    assert 0 < sum(wanted) < 40
    assert found.measures[1].tolist() == tokens.tolist()
    assert not found.measures.requires_grad


def test_a_measure_changes_neither_loss_nor_gradient():
    p = problem()
    arguments = (p.hidden, p.head(), [objective("reverse_kl", temperature=2.0)], p.labels, p.weights, p.signal)
    plain, measured = linear_losses(*arguments), linear_losses(*arguments, measures=[top1_agreement])
    assert torch.equal(plain.total, measured.total)
    for a, b in zip(p.gradients(plain.total), p.gradients(measured.total), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("transformation", [{}, {"softcap": 2.0}])
def test_a_measure_without_any_objective_has_the_loss_0_and_the_gradient_0(transformation):
    p = problem()
    head = p.head(**transformation)
    found = linear_losses(p.hidden, head, [], p.labels, p.weights, measures=[student_entropy])
    beside = linear_losses(
        p.hidden, head, [objective("cross_entropy")], p.labels, p.weights, measures=[student_entropy]
    )
    assert torch.equal(found.measures, beside.measures)
    assert found.total.item() == 0
    assert all(not gradient.any() for gradient in p.gradients(found.total))


def test_top10_overlap_without_a_dense_teacher_is_refused():
    entries = Sparse(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), {1.0: torch.zeros(1)})
    for sparse, given in ((None, "no signal"), (entries, "a few entries")):
        with pytest.raises(MismatchError, match="the teacher's logits are needed") as raised:
            top10_overlap(LogitBlock(torch.zeros(1, 12), None, torch.zeros(1, dtype=torch.long), sparse))
        assert raised.value.values["given"] == given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [12, 300])
def test_top10_overlap_counts_the_likeliest_ten_that_both_have(dtype, columns):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(40, columns, generator=generator, dtype=dtype)
    student = teacher + 0.5 * torch.randn(40, columns, generator=generator, dtype=dtype)
    tens = [[set(row.argsort()[-10:].tolist()) for row in logits] for logits in (student, teacher)]
    wanted = [len(s & t) / 10 for s, t in zip(*tens, strict=True)]
    found = top10_overlap(LogitBlock(student, teacher, torch.zeros(40, dtype=torch.long)))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=dtype))
    assert len(set(wanted)) > 2
    assert top10_overlap(LogitBlock(teacher, teacher.clone(), torch.zeros(40, dtype=torch.long))).tolist() == [1.0] * 40


def test_of_fewer_than_ten_columns_all_are_in_the_overlap():
    block = LogitBlock(torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    assert top10_overlap(block).tolist() == [1.0, 1.0, 1.0]


def test_confidence_and_correct_of_a_few_rows():
    block = LogitBlock(torch.tensor([[0.0, 0.0, 3.0], [2.0, 1.0, 0.0]]), None, torch.tensor([2, 1]))
    wanted = [math.exp(3) / (2 + math.exp(3)), math.exp(2) / (math.exp(2) + math.exp(1) + 1)]
    assert confidence(block).tolist() == pytest.approx(wanted)
    assert correct(block).tolist() == [1.0, 0.0]

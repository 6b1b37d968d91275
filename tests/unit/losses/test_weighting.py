"""What each token counts: by entropies, and by the data."""

import math

import pytest
import torch
from reference import naive_logits, objective, problem
from sparse_reference import sample, truncated

from stillroom.errors import ConfigError, MismatchError
from stillroom.losses.block import LogitBlock
from stillroom.losses.config import LOSSES
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.logits import accepted_mass, student_entropy, teacher_entropy
from stillroom.losses.objective import Objective, by_data, by_entropy
from stillroom.signals import Sparse


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def total_and_gradients(p, objectives, **arguments):
    found = linear_losses(p.hidden, p.head(), objectives, p.labels, p.weights, p.signal, **arguments)
    return found, p.gradients(found.total)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(("certain", "uncertain"), [(0.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_by_entropy_is_another_weight_of_each_position(who, certain, uncertain, chunk_bytes):
    p = problem()
    weigh = by_entropy(who, certain=certain, uncertain=uncertain)
    kl, ce = objective("forward_kl", 0.7), objective("cross_entropy", 0.2)
    weighed = Objective("forward_kl", kl.loss, 0.7, {}, weigh)
    head = p.head() if who == "student" else p.signal.head
    hidden = p.hidden if who == "student" else p.signal.hidden
    factor = certain + (uncertain - certain) * entropy(naive_logits(hidden, head).detach()) / math.log(13)
    found, gradients = total_and_gradients(p, [weighed, ce], chunk_bytes=chunk_bytes)
    plain = p.weights.clone()
    rest, rest_gradients = total_and_gradients(p, [ce])
    p.weights = plain * factor
    part, part_gradients = total_and_gradients(p, [kl])
    torch.testing.assert_close(found.total, part.total + rest.total, rtol=1e-12, atol=1e-12)
    for a, b, c in zip(gradients, part_gradients, rest_gradients, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.nats[0], part.nats[0], rtol=1e-12, atol=1e-12)  # told without the weight


def test_by_data_counts_what_the_batch_says():
    p = problem()
    of_data = torch.rand(11, generator=torch.Generator().manual_seed(3))
    of_data[2] = 0
    weighed = Objective("forward_kl", LOSSES["forward_kl"].load(), 1.0, {}, by_data)
    found, gradients = total_and_gradients(p, [weighed], data_weights=of_data, chunk_bytes=1)
    assert (gradients[0][2] == 0).all()
    p.weights = p.weights * of_data
    wanted, wanted_gradients = total_and_gradients(p, [objective("forward_kl")])
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with pytest.raises(MismatchError, match="the batch brings no weights"):
        total_and_gradients(p, [weighed])


def test_entropies_and_accepted_mass_of_a_few_rows():
    student = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).double().log()
    teacher = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]).double().log()
    block = LogitBlock(student.clone(), teacher.clone(), torch.zeros(2, dtype=torch.long))
    assert student_entropy(block).tolist() == pytest.approx([math.log(2), 1.5 * math.log(2)])
    assert teacher_entropy(block).tolist() == pytest.approx([1.5 * math.log(2)] * 2)
    assert accepted_mass(block).tolist() == pytest.approx([0.5, 1.0])
    block = LogitBlock(student.clone(), None, torch.zeros(2, dtype=torch.long), truncated(teacher, 1))
    assert accepted_mass(block).tolist() == pytest.approx([0.5, 1.0])


def test_accepted_mass_is_one_less_the_total_variation():
    student, teacher = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for signal in (None, truncated(teacher, 5)):
        dense = teacher.clone() if signal is None else None
        block = LogitBlock(student.clone(), dense, torch.zeros(6, dtype=torch.long), signal)
        variation, _ = LOSSES["total_variation"].load()(block)
        torch.testing.assert_close(accepted_mass(block), 1 - variation, rtol=1e-12, atol=1e-12)


def test_an_entropy_that_the_signal_does_not_tell_is_refused():
    teacher = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    drawn, cut = sample(teacher, 5, torch.Generator().manual_seed(1)), truncated(teacher, 3)
    for signal in (drawn, cut):
        with pytest.raises(MismatchError, match="does not tell the teacher's entropy"):
            teacher_entropy(LogitBlock(teacher.clone(), None, torch.zeros(4, dtype=torch.long), signal))
    told = Sparse(cut.ids, cut.log_probs, cut.log_rests, entropy=entropy(teacher))
    block = LogitBlock(teacher.clone(), None, torch.zeros(4, dtype=torch.long), told)
    assert torch.equal(teacher_entropy(block), entropy(teacher))


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        ("jensen_shannon", {"beta": 0.0}, "forward_kl"),
        ("jensen_shannon", {"beta": 1.0}, "reverse_kl"),
        ("skew_kl", {"alpha": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"alpha": 0.0}, "reverse_kl"),
        ("adaptive_kl", {"mu": 1.0}, "forward_kl"),
        ("alpha_beta", {"alpha": 1.0, "beta": 0.0}, "forward_kl"),
        ("alpha_beta", {"alpha": 0.0, "beta": 1.0}, "reverse_kl"),
    ],
)
def test_at_the_ends_the_error_names_the_loss_that_is_meant(name, arguments, names):
    logits = torch.zeros(1, 3)
    with pytest.raises(ConfigError, match=names):
        LOSSES[name].load()(LogitBlock(logits.clone(), logits.clone(), torch.zeros(1, dtype=torch.long)), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "other", "factor"),
    [
        ("jensen_shannon", {"beta": 1e-6}, "forward_kl", 1e6),
        ("jensen_shannon", {"beta": 1 - 1e-6}, "reverse_kl", 1e6),
        ("skew_kl", {"alpha": 1e-6}, "forward_kl", 1.0),
        ("skew_reverse_kl", {"alpha": 1e-6}, "reverse_kl", 1.0),
        ("alpha_beta", {"alpha": 1.0, "beta": 1e-5}, "forward_kl", 1.0),
        ("alpha_beta", {"alpha": 1e-5, "beta": 1.0}, "reverse_kl", 1.0),
    ],
)
def test_near_its_ends_a_family_is_the_loss_of_that_end(name, arguments, other, factor):
    student, teacher = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    none = torch.zeros(5, dtype=torch.long)
    found = LOSSES[name].load()(LogitBlock(student.clone(), teacher.clone(), none), **arguments)
    wanted = LOSSES[other].load()(LogitBlock(student.clone(), teacher.clone(), none))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a * factor, b, rtol=1e-3, atol=1e-4)

"""Sparse signals, and logits as a signal, through the fused head and divergence."""

import pytest
import torch
from reference import DIVERGENCES, objective, problem
from sparse_reference import (
    TRUNCATED,
    naive_sampled,
    naive_truncated,
    sample,
    truncated,
)

from stillroom.errors import MismatchError
from stillroom.lm_head import LMHead
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.logits import teacher_cross_entropy, top1_agreement
from stillroom.signals import Logits, Sparse


def through_the_head(p, signal: Sparse, name: str, temperature: float, **transformation):
    """``linear_losses`` as a function of what it is differentiable in; 5 of the 7 columns are compared."""

    def total(*leaves: torch.Tensor) -> torch.Tensor:
        head, objectives = (
            LMHead(leaves[0], leaves[1], **transformation),
            [objective(name, 0.7, temperature=temperature)],
        )
        found = linear_losses(leaves[2], head, objectives, p.labels, p.weights, signal, vocab_size=5, chunk_bytes=200)
        return found.total

    return total


@pytest.mark.parametrize("transformation", [{}, {"scale": 3.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize(
    ("name", "temperature"), [("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 2.0), ("sampled", 1.0)]
)
def test_gradients_through_the_head(name, temperature, transformation):
    """Against differences of the loss itself, and against autograd of the naive formula with whole logits."""
    p = problem(n=4, columns=7, width=3)
    teacher = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    g = torch.Generator().manual_seed(4)
    signal = sample(teacher, 6, g) if name == "sampled" else truncated(teacher, 2, vocab_size=5)
    name = "forward_kl" if name == "sampled" else name
    leaves = (p.weight, p.bias, p.hidden)
    total = through_the_head(p, signal, name, temperature, **transformation)
    assert torch.autograd.gradcheck(total, leaves)

    logits = (p.hidden @ p.weight.T + p.bias) * transformation.get("scale", 1.0)
    if cap := transformation.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    student = logits[:, :5]
    if signal.sampled:
        nats = naive_sampled(student, signal)
    else:
        nats = naive_truncated(name, student, teacher, signal.ids, temperature)
    wanted = torch.autograd.grad(0.7 * nats @ p.weights, leaves)
    for a, b in zip(torch.autograd.grad(total(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def linear(p, signal, *, chunk_bytes: int = 2**20, measures=()):
    """Total, values and gradients of a sum of objectives."""
    names = ["forward_kl"] if isinstance(signal, Sparse) and signal.sampled else list(TRUNCATED)
    objectives = [objective(name, 0.5 + i) for i, name in enumerate([*names, "cross_entropy"])]
    head = p.head(scale=0.7, softcap=6.0)
    found = linear_losses(
        p.hidden, head, objectives, p.labels, p.weights, signal, chunk_bytes=chunk_bytes, measures=measures
    )
    return found, p.gradients(found.total)


def signals_of(p) -> dict[str, Sparse]:
    teacher = p.signal.head.logits(p.signal.hidden)
    return {"truncated": truncated(teacher, 4), "sampled": sample(teacher, 5, torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("kind", ["truncated", "sampled"])
@pytest.mark.parametrize("chunk_bytes", [1, 300, 1500])
def test_chunked_is_unchunked(kind, chunk_bytes):
    p = problem(n=17, columns=13)
    signal = signals_of(p)[kind]
    whole, whole_gradients = linear(p, signal)
    parts, gradients = linear(p, signal, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(parts.nats, whole.nats, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-13, atol=1e-14)
    for a, b in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["truncated", "sampled"])
def test_a_position_of_weight_zero_has_gradient_exactly_zero(kind):
    p = problem()
    p.weights[3] = 0
    _, (hidden, _, _) = linear(p, signals_of(p)[kind])
    assert (hidden[3] == 0).all()
    assert (hidden[4] != 0).all()


@pytest.mark.parametrize("kind", ["truncated", "sampled"])
def test_a_shift_by_one_position_changes_every_value(kind):
    p = problem()
    signal = signals_of(p)[kind]
    right, shifted = (linear(p, s)[0].nats[0] for s in (signal, signal.at((torch.arange(11) + 1) % 11)))
    assert ((right - shifted).abs() > 1e-6).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_as_a_signal_are_the_dense_signal_exactly(name):
    p = problem(n=11, columns=13, dtype=torch.float32, teacher_columns=16)
    logits = Logits(p.signal.head.logits(p.signal.hidden))
    assert (len(logits), logits.vocab_size) == (11, 16)
    found = []
    for signal in (p.signal, logits):
        out = linear_losses(
            p.hidden,
            p.head(),
            [objective(name)],
            p.labels,
            p.weights.float(),
            signal,
            measures=[top1_agreement, teacher_cross_entropy],
        )
        found.append([out.nats, out.measures, *p.gradients(out.total)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_measures_of_a_sparse_signal_are_those_of_the_dense_one():
    p = problem(columns=13)
    teacher = p.signal.head.logits(p.signal.hidden)
    label = teacher.log_softmax(-1).gather(-1, p.labels.unsqueeze(-1)).squeeze(-1)
    kept = truncated(teacher, 3)
    sparse = Sparse(kept.ids, kept.log_probs, kept.log_rests, label_log_probs=label)
    measures = [top1_agreement, teacher_cross_entropy]
    found, wanted = (linear(p, signal, measures=measures)[0].measures for signal in (sparse, Logits(teacher)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocab_size", [12, 14])
def test_a_signal_over_other_columns_is_refused(vocab_size):
    p = problem(columns=13)
    kept = truncated(p.signal.head.logits(p.signal.hidden)[:, :12], 3, vocab_size=vocab_size)
    with pytest.raises(MismatchError, match="taken over other columns"):
        linear(p, kept)


def test_a_signal_of_other_positions_is_refused():
    p = problem(columns=13)
    with pytest.raises(MismatchError, match="speak of different positions"):
        linear(p, signals_of(p)["truncated"].at(slice(0, 10)))

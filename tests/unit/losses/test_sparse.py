"""Divergences from sparse signals: truncated with a bucket, and sampled."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import logit_pairs, properties, relative_error
from reference import value_and_gradient as dense
from sparse_reference import (
    STORED,
    TRUNCATED,
    naive_sampled,
    naive_truncated,
    outcomes,
    random_logits,
    sample,
    truncated,
    value_and_gradient,
)

from stillroom.errors import MismatchError
from stillroom.losses import config, divergences, logits
from stillroom.losses.block import LogitBlock, check_sparse
from stillroom.signals import Sparse

with_corners = ("total_variation",)  # whose gradient has the size of a probability however near t and s are
every_smooth_loss = pytest.mark.parametrize("name", [name for name in TRUNCATED if name not in with_corners])
every_loss = pytest.mark.parametrize("name", TRUNCATED)
every_temperature = pytest.mark.parametrize("temperature", STORED)
few = settings(properties, max_examples=15)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def no_tokens(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long)


@every_loss
@every_temperature
@pytest.mark.parametrize("k", [1, 3, 8])
def test_truncated_equals_the_naive_formula_and_its_gradient(name, temperature, k):
    student, teacher = random_logits()
    signal = truncated(teacher, k)
    leaf = student.clone().requires_grad_()
    wanted = naive_truncated(name, leaf, teacher, signal.ids, temperature)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    nats, gradient = value_and_gradient(name, student, signal, temperature)
    torch.testing.assert_close(nats, wanted.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.6, 1.4])
def test_sampled_equals_the_naive_formula_and_its_gradient(weight):
    """Also where the weights do not sum to 1, as they need not with an exact head and draws from the tail."""
    student, teacher = random_logits(n=12)
    signal = sample(teacher, 20, torch.Generator().manual_seed(0))
    signal.log_probs.add_(math.log(weight))
    leaf = student.clone().requires_grad_()
    wanted = naive_sampled(leaf, signal)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    nats, gradient = value_and_gradient("forward_kl", student, signal)
    torch.testing.assert_close(nats, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-12)


@every_smooth_loss
@every_temperature
def test_float32_stays_near_float64_over_many_columns(name, temperature):
    student, teacher = (x.float() for x in random_logits(6, 5000))
    signal = truncated(teacher, 40)
    leaf = student.double().requires_grad_()
    wanted = naive_truncated(name, leaf, teacher, signal.ids, temperature)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    nats, gradient = value_and_gradient(name, student, signal, temperature)
    assert nats.dtype == gradient.dtype == torch.float32
    assert relative_error(nats, wanted.detach()) <= 1e-5
    assert relative_error(gradient, wanted_gradient) <= 1e-5


@every_loss
@every_temperature
@both_types
@few
@given(pair=logit_pairs, k=st.integers(1, 6))
def test_never_negative_and_finite(name, temperature, dtype, pair, k):
    student, teacher = (torch.tensor([x], dtype=dtype) for x in pair)
    nats, gradient = value_and_gradient(name, student, truncated(teacher, min(k, teacher.shape[1])), temperature)
    assert nats.item() >= 0
    assert gradient.isfinite().all()


@every_loss
@every_temperature
@few
@given(pair=logit_pairs, k=st.integers(1, 6))
def test_zero_only_where_equal_on_the_outcomes(name, temperature, pair, k):
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    signal = truncated(teacher, min(k, teacher.shape[1]))
    nats, _ = value_and_gradient(name, student, signal, temperature)
    p, q = (outcomes(x[0], signal.ids[0], temperature) for x in (teacher, student))
    if (p - q).abs().max() > 1e-6:
        assert nats.item() > 0


@every_smooth_loss
@every_temperature
@both_types
def test_zero_where_equal_on_the_outcomes_though_the_others_differ(name, temperature, dtype):
    """Another order among the ids that were left out is not seen, and is left as it is."""
    _, teacher = random_logits(6, 12)
    signal = truncated(teacher.to(dtype), 4)
    student = teacher.clone()
    order = teacher.argsort(-1, descending=True)
    student.scatter_(-1, order[:, 4:], teacher.gather(-1, order[:, 4:].flip(-1)))
    assert not torch.equal(student, teacher)
    nats, gradient = value_and_gradient(name, student.to(dtype), signal, temperature)
    eps = torch.finfo(dtype).eps
    assert nats.max().item() <= 20 * temperature**2 * eps
    assert gradient.abs().max().item() <= 30 * eps


@every_smooth_loss
@every_temperature
@both_types
@pytest.mark.parametrize("k", [1, 5, 12])
def test_student_equal_to_its_teacher_has_loss_zero_and_gradient_zero(name, temperature, dtype, k):
    teacher = random_logits(40, 12, spread=4.0)[1].to(dtype)
    nats, gradient = value_and_gradient(name, teacher, truncated(teacher, k), temperature)
    eps = torch.finfo(dtype).eps
    assert nats.max().item() <= 20 * temperature**2 * eps
    assert gradient.abs().max().item() <= 30 * eps


@every_smooth_loss
@both_types
@pytest.mark.parametrize("left_out", [1e-4, 1e-7, 1e-9, 1e-12, 0.0])
def test_student_equal_to_its_teacher_however_little_was_left_out(name, dtype, left_out):
    """log(1 − mass kept) would be that of 0 or of rounding noise; the exact log of the rest is neither."""
    v = 6
    logs = torch.tensor([0.7, 0.2, 0.1]).double().log()
    tail = torch.full((v - 3,), left_out / (v - 3), dtype=torch.float64).log()
    teacher = torch.cat([logs, tail]).to(dtype).unsqueeze(0)
    nats, gradient = value_and_gradient(name, teacher, truncated(teacher, 3), 1.0)
    eps = torch.finfo(dtype).eps
    assert nats.item() <= 20 * eps
    assert gradient.abs().max().item() <= 30 * eps
    assert gradient[0, 3:].abs().max().item() <= 200 * eps * left_out


@every_loss
@both_types
def test_with_every_id_kept_and_a_rest_of_exactly_zero_it_is_the_dense_loss(name, dtype):
    student, teacher = (x.to(dtype) for x in random_logits(20, 9))
    signal = truncated(teacher, 9)
    assert (signal.log_rests[1.0] == -torch.inf).all()
    nats, gradient = value_and_gradient(name, student, signal)
    wanted, wanted_gradient = dense(name, student, teacher, no_tokens(20))
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(nats, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in TRUNCATED if name != "adaptive_kl"])  # its mixture adapts
@every_temperature
@few
@given(pair=logit_pairs)
def test_grows_with_k_towards_the_dense_loss_and_never_above_it(name, temperature, pair):
    """The data-processing inequality: what is seen through coarser outcomes differs less."""
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    v = teacher.shape[1]
    found = [value_and_gradient(name, student, truncated(teacher, k), temperature)[0].item() for k in range(1, v + 1)]
    whole = dense(name, student, teacher, no_tokens(1), temperature=temperature)[0].item()
    slack = 1e-12 + 1e-9 * whole
    assert all(a <= b + slack for a, b in zip(found, [*found[1:], whole], strict=True))
    assert found[-1] == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_value_and_gradient_of_samples_are_those_of_the_dense_loss_in_expectation():
    student, teacher = random_logits(1, 7, spread=1.5)
    times = 20_000
    signal = sample(teacher.expand(times, -1), 5, torch.Generator().manual_seed(1))
    found = value_and_gradient("forward_kl", student.expand(times, -1), signal)
    wanted = dense("forward_kl", student, teacher, no_tokens(1))
    for values, value in zip(found, wanted, strict=True):
        values, value = values.reshape(times, -1), value.reshape(-1)
        error = values.std(0) / times**0.5
        assert ((values.mean(0) - value).abs() <= 4 * error + 1e-12).all()
        assert (error > 0).all()


def test_student_equal_to_its_teacher_has_loss_zero_and_gradient_zero_in_expectation_from_samples():
    _, teacher = random_logits(1, 7, spread=1.5)
    times = 20_000
    same = teacher.expand(times, -1)
    nats, gradient = value_and_gradient("forward_kl", same, sample(same, 5, torch.Generator().manual_seed(2)))
    assert nats.abs().max() <= 1e-14  # the same entries on both sides: no noise is left in the value
    assert (gradient.mean(0).abs() <= 4 * gradient.std(0) / times**0.5).all()


@every_loss
@every_temperature
@both_types
def test_finite_at_extreme_logits(name, temperature, dtype):
    big, off = 1e4, float("-inf")
    rows = [[big, -big, 0.0, 0.0], [-big, big, 0.0, 0.0], [big] * 4, [-big] * 4, [off, big, -big, off]]
    rows += [[0.0, off, off, off], [0.0, 100.0, 90.0, -80.0]]
    student = torch.tensor([s for s in rows for _ in rows], dtype=dtype)
    teacher = torch.tensor([t for _ in rows for t in rows], dtype=dtype)
    for k in (1, 2, 4):
        signal = truncated(teacher, k)
        nats, gradient = value_and_gradient(name, student, signal, temperature)
        assert nats.isfinite().all()
        assert (nats >= 0).all()
        assert gradient.isfinite().all()
    if name == "forward_kl" and temperature == 1.0:
        signal = sample(teacher, 3, torch.Generator().manual_seed(0))
        for found in value_and_gradient(name, student, signal):
            assert found.isfinite().all()


@every_loss
def test_a_student_that_is_certain_still_learns_of_the_bucket(name):
    """Its mass there is below what the type can hold; the value is bounded and the kept ids' gradient is right."""
    student, teacher = torch.tensor([[0.0, -500.0, -500.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    nats, gradient = value_and_gradient(name, student, truncated(teacher, 1))
    assert nats.isfinite().all()
    assert nats.item() > 0.1
    if name == "forward_kl":
        assert gradient[0, 0].item() == pytest.approx(2 / 3, rel=1e-5)


@both_types
def test_a_bucket_of_nothing_is_bounded(dtype):
    """Half of the student lies where the teacher says that there is nothing; its reverse KL is large, not boundless."""
    student = torch.zeros(1, 4, dtype=dtype)
    rests = {1.0: torch.tensor([-torch.inf], dtype=dtype)}
    signal = Sparse(torch.tensor([[0, 1]]), torch.full((1, 2), 0.5, dtype=dtype).log(), rests)
    nats, gradient = value_and_gradient("reverse_kl", student, signal)
    least = math.log(torch.finfo(dtype).tiny)
    assert nats.item() == pytest.approx(math.log(0.5) - 0.5 * least, rel=1e-5)
    assert gradient.abs().max() < -least
    assert gradient[0, 2:].tolist() == [pytest.approx(-0.125 * least, rel=1e-5)] * 2


@every_loss
@pytest.mark.parametrize("left_out", [1e-7, 1e-8, 1e-20])
def test_confident_tokens_in_float32_are_right(name, left_out):
    """Mass kept 1 − 1e-7, where 1 − mass is 0 or rounding noise in float32."""
    v = 64
    probabilities = torch.full((3, v), left_out / (v - 2), dtype=torch.float64)
    probabilities[:, 0], probabilities[:, 1] = 0.98, 0.02 - left_out
    teacher = probabilities.log().float()
    student = teacher + torch.randn(3, v, generator=torch.Generator().manual_seed(0))
    signal = truncated(teacher, 2)
    leaf = student.double().requires_grad_()
    wanted = naive_truncated(name, leaf, teacher, signal.ids)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    nats, gradient = value_and_gradient(name, student, signal)
    assert relative_error(nats, wanted.detach()) <= 1e-4
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-7)


@every_temperature
@pytest.mark.parametrize("name", [*TRUNCATED, "sampled"])
def test_padding_changes_nothing(name, temperature):
    student, teacher = random_logits()
    if name == "sampled":
        name, temperature = "forward_kl", 1.0
        signal = sample(teacher, 4, torch.Generator().manual_seed(0))
    else:
        signal = truncated(teacher, 3)
    nothing = torch.full((5, 4), -torch.inf, dtype=torch.float64)
    padded = Sparse(
        torch.cat([signal.ids, signal.ids[:, :1].expand(-1, 4)], 1),
        torch.cat([signal.log_probs, nothing], 1),
        signal.log_rests,
        signal.entropy,
        sampled=signal.sampled,
    )
    plain, other = (value_and_gradient(name, student, s, temperature) for s in (signal, padded))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_some_positions_of_a_signal_are_their_part_of_it():
    signal = truncated(random_logits(11)[1], 4)
    which = torch.tensor([7, 0, 7])
    part, same = signal.at(which), signal.at(slice(2, 5))
    assert torch.equal(part.ids, signal.ids[which])
    assert torch.equal(part.log_rests[2.0], signal.log_rests[2.0][which])
    assert torch.equal(same.log_probs, signal.log_probs[2:5])
    assert len(part) == 3


@both_types
def test_total_variation_of_equals_is_rounding(dtype):
    teacher = random_logits(40, 12, spread=4.0)[1].to(dtype)
    nats, _ = value_and_gradient("total_variation", teacher, truncated(teacher, 5))
    assert nats.max().item() <= 20 * torch.finfo(dtype).eps


def completed(name: str, teacher: torch.Tensor, ids: torch.Tensor, label: int) -> torch.Tensor:
    """Targets over all columns, by the rule for what was left out."""
    p = teacher.double().softmax(-1)
    target = torch.zeros_like(p)
    target[ids] = p[ids]
    if name == "renormalise":
        return target / target.sum()
    if name == "label":
        target[label] += 1 - target.sum()
    return target


@pytest.mark.parametrize("missing", ["renormalise", "zero", "label"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_was_left_out_is_put_where_the_rule_says(missing, temperature):
    """Next tokens among the entries and beyond them; a position with fewer entries than others."""
    student, teacher = random_logits(8, 9)
    labels = torch.arange(8) % 5
    signal = truncated(teacher, 3)
    signal.ids[4, 2], signal.log_probs[4, 2] = signal.ids[4, 0], -torch.inf
    for t, rest in signal.log_rests.items():
        logs = (teacher[4] / t).log_softmax(-1)
        rest[4] = logs.index_fill(0, signal.ids[4, :2], -torch.inf).logsumexp(-1)
    leaf = student.clone().requires_grad_()
    log_s = (leaf / temperature).log_softmax(-1)
    wanted = []
    for i in range(8):
        ids = signal.ids[i, :2] if i == 4 else signal.ids[i]
        y = completed(missing, teacher[i] / temperature, ids, int(labels[i]))
        on = y > 0
        wanted.append(temperature**2 * (y[on] * (y[on].log() - log_s[i][on])).sum())
    (wanted_gradient,) = torch.autograd.grad(torch.stack(wanted).sum(), leaf)
    block = LogitBlock(student.clone(), None, labels, signal)
    nats, gradient = divergences.forward_kl(block, temperature=temperature, missing=missing)
    torch.testing.assert_close(nats, torch.stack(wanted).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-12)


def test_rankings_take_the_order_from_the_entries():
    student, teacher = random_logits(6, 9)
    for name in ("hinge_ranking", "logistic_ranking"):
        few = config.LOSSES[name].load()(LogitBlock(student.clone(), None, no_tokens(6), truncated(teacher, 4)), k=4)
        whole = dense(name, student, teacher, no_tokens(6), k=4)
        assert all(torch.equal(a, b) for a, b in zip(few, whole, strict=True))


@pytest.mark.parametrize("name", ["logit_mse", "hinge_ranking", "logistic_ranking", "jensen_shannon"])
def test_losses_that_a_sample_cannot_teach_are_refused(name):
    block = LogitBlock(random_logits()[0], None, no_tokens(5), a_sample())
    with pytest.raises(MismatchError, match="cannot be learned"):
        config.LOSSES[name].load()(block)


def test_the_distance_of_logits_needs_them_all():
    block = LogitBlock(random_logits()[0], None, no_tokens(5), truncated(random_logits()[1], 3))
    with pytest.raises(MismatchError, match="logit_mse cannot be learned from a few entries"):
        logits.logit_mse(block)


def test_targets_and_bucket_sum_to_one():
    _, teacher = random_logits(30, 50)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        signal = truncated(teacher.to(dtype), 7)
        for temperature in STORED:
            targets, rest = signal.log_targets(temperature)
            total = targets.double().exp().sum(-1) + rest.double().exp()
            torch.testing.assert_close(total, torch.ones(30, dtype=torch.float64), rtol=0, atol=tolerance)


def a_sample(**changes) -> Sparse:
    made = sample(random_logits()[1], 4, torch.Generator().manual_seed(0))
    return Sparse(**{**made.__dict__, **changes})


@pytest.mark.parametrize(
    ("name", "temperature", "signal", "says"),
    [
        ("reverse_kl", 1.0, a_sample(), "cannot be learned from sampled targets"),
        ("forward_kl", 2.0, a_sample(), "cannot be used at temperature 2.0"),
        ("forward_kl", 3.0, truncated(random_logits()[1], 2), "cannot be used at temperature 3.0"),
        ("reverse_kl", 2.0, truncated(random_logits()[1], 2, (1.0,)), "cannot be used at temperature 2.0"),
        ("forward_kl", 1.0, a_sample(entropy=None), "without the teacher's entropy"),
    ],
)
def test_what_a_signal_does_not_tell_is_refused(name, temperature, signal, says):
    with pytest.raises(MismatchError, match=says):
        value_and_gradient(name, random_logits()[0], signal, temperature)


def test_what_can_be_learned_is_known_before_anything_is_computed():
    for allowed in (
        ("forward_kl", 1.0, True, ()),
        ("reverse_kl", 2.0, False, STORED),
        ("cross_entropy", 5.0, True, ()),
        ("jensen_shannon", 2.0, False, STORED),
    ):
        name, temperature, sampled, temperatures = allowed
        check_sparse(name, temperature, sampled=sampled, temperatures=temperatures)
    for refused in (
        ("reverse_kl", 1.0, True, ()),
        ("forward_kl", 2.0, True, STORED),
        ("forward_kl", 4.0, False, STORED),
        ("jensen_shannon", 1.0, True, ()),
        ("logit_mse", 1.0, False, STORED),
    ):
        name, temperature, sampled, temperatures = refused
        with pytest.raises(MismatchError):
            check_sparse(name, temperature, sampled=sampled, temperatures=temperatures)
    with pytest.raises(MismatchError, match="missing=zero has no meaning"):
        check_sparse("forward_kl", sampled=True, temperatures=(), missing="zero")

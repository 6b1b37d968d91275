"""The Triton kernel at the size of real vocabularies, against the losses in float64 on the CPU. Run by `make gpu`."""

import pytest
import torch

from stillroom.kernels import MEASURES, Term
from stillroom.losses import logits
from stillroom.losses.block import LogitBlock
from stillroom.losses.config import LOSSES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

NUM_ROWS, NUM_COLUMNS, EVERY = 512, 128256, 64
"""One row in EVERY is compared."""
PARAMETERS = {
    "jensen_shannon": {"beta": 0.3},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha_beta": {"alpha": 0.3, "beta": 0.6},
    "cross_entropy": {"smoothing": 0.1},
}
TEMPERED = [
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "alpha_beta",
    "total_variation",
    "cross_entropy",
]
CASES = [*((name, temperature) for name in TEMPERED for temperature in (1.0, 2.0)), ("logit_mse", 1.0)]


def term(name: str, temperature: float = 1.0) -> Term:
    return Term(name, temperature, *PARAMETERS.get(name, {}).values())


def wanted(one: Term, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor):
    tempered = {} if one.name == "logit_mse" else {"temperature": one.temperature}
    block = LogitBlock(student.double().cpu(), teacher.double().cpu(), labels.cpu())
    return LOSSES[one.name].load()(block, **tempered, **PARAMETERS.get(one.name, {}))


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double().cpu() - right).norm() / right.norm())


@pytest.fixture(scope="module")
def fused():
    from stillroom.kernels.triton_fused import fused

    return fused


@pytest.fixture(scope="module")
def problem():
    """Logits as peaked as a language model's, a teacher that differs, and next tokens; a few logits are −inf."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=g) * 3
    teacher = student + torch.randn(NUM_ROWS, NUM_COLUMNS, generator=g)
    student[0, 3] = teacher[0, 3] = student[EVERY, 128000] = teacher[2 * EVERY, 7] = -torch.inf
    labels = torch.randint(8, 128000, (NUM_ROWS,), generator=g)
    return student.cuda(), teacher.cuda(), labels.cuda()


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_equals_float64_on_the_cpu(fused, problem, name, temperature):
    student, teacher, labels = problem
    one, gradient = term(name, temperature), student.clone()
    weights = torch.linspace(0.5, 2, NUM_ROWS, device="cuda").unsqueeze(0)
    nats, _ = fused(gradient, teacher, labels, [one], weights, gradient=True)
    rows = slice(None, None, EVERY)
    right, right_gradient = wanted(one, student[rows], teacher[rows], labels[rows])
    for found, value in zip(nats[0, rows].tolist(), right.tolist(), strict=True):
        assert found == pytest.approx(value, rel=1e-5)
    for found, row, weight in zip(gradient[rows], right_gradient, weights[0, rows].cpu(), strict=True):
        assert relative_error(found, row * weight) <= 1e-5
    assert (nats >= 0).all()


def test_a_weighted_sum_of_rows_far_apart_and_unaligned(fused, problem):
    """An odd number of columns, in buffers with more."""
    terms = [term("forward_kl", 2.0), term("reverse_kl"), term("cross_entropy"), term("jensen_shannon", 2.0)]
    weights = torch.tensor([0.6, -0.3, 0.1, 0.5], device="cuda").unsqueeze(-1).repeat(1, NUM_ROWS)
    student, teacher = (x[:, :127999] for x in problem[:2])
    labels = problem[2].clamp(max=127998)
    buffer = problem[0].clone()
    nats, measured = fused(buffer[:, :127999], teacher, labels, terms, weights, gradient=True)
    assert torch.equal(buffer[:, 127999:], problem[0][:, 127999:])
    rows = slice(None, None, EVERY)
    total = torch.zeros(NUM_ROWS // EVERY, 127999, dtype=torch.float64)
    for one, weight, found in zip(terms, weights[:, 0].tolist(), nats, strict=True):
        right, right_gradient = wanted(one, student[rows], teacher[rows], labels[rows])
        torch.testing.assert_close(found[rows].double().cpu(), right, rtol=1e-5, atol=1e-7)
        total += weight * right_gradient
    for found, row in zip(buffer[rows, :127999], total, strict=True):
        assert relative_error(found, row) <= 1e-5
    block = LogitBlock(student[rows].double().cpu(), teacher[rows].double().cpu(), labels[rows].cpu())
    for name, found in zip(MEASURES, measured, strict=True):
        right = getattr(logits, name)(block)
        torch.testing.assert_close(found[rows].double().cpu(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_equal_to_its_teacher_has_loss_0_and_gradient_0(fused, problem, temperature):
    """Each compiled alone: one that contracts a product and a sum on one side only would not."""
    _, teacher, labels = problem
    for name in (*TEMPERED[:-1], "logit_mse"):
        student = teacher.clone()
        one, weights = term(name, 1.0 if name == "logit_mse" else temperature), torch.ones(1, NUM_ROWS, device="cuda")
        nats, _ = fused(student, teacher, labels, [one], weights, gradient=True)
        assert not nats.any(), name
        assert not student.any(), name


def test_weights_of_0_and_logits_that_are_no_numbers(fused, problem):
    student, teacher, labels = (x[:4].clone() for x in problem)
    student[0, 5] = student[1, 5] = torch.nan
    terms = [term("forward_kl"), term("reverse_kl")]
    weights = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]], device="cuda")
    nats, _ = fused(student, teacher, labels, terms, weights, gradient=True)
    assert nats.isnan().all(0).tolist() == [True, True, False, False]
    assert not student[[0, 3]].any()
    assert student[1].isnan().any()
    assert student[2].isfinite().all()


def test_rows_beyond_two_billion_elements(fused, problem):
    start = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 4 * (start + NUM_COLUMNS) + 2**30:
        pytest.skip("the device has too little memory")
    student, teacher, labels = (x[:2].clone() for x in problem)
    buffer = torch.empty(start + NUM_COLUMNS, device="cuda")
    far = buffer.as_strided(student.shape, (start, 1))
    far.copy_(student)
    weights = torch.ones(1, 2, device="cuda")
    nats, _ = fused(far, teacher, labels, [term("reverse_kl")], weights, gradient=True)
    near, _ = fused(student, teacher, labels, [term("reverse_kl")], weights, gradient=True)
    assert torch.equal(nats, near)
    assert torch.equal(far, student)

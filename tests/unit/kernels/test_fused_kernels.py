"""The fused kernels: numba's on this processor; Triton's in its interpreter, and as far as its compiler goes without a
device. The interpreter is chosen when triton is imported: so it has a process of its own."""

import importlib.util
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.kernels import MEASURES, Term, numba_fused
from stillroom.losses import logits as all_measures
from stillroom.losses.block import LogitBlock
from stillroom.losses.config import LOSSES

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
PARAMETERS = {
    "jensen_shannon": ("beta",),
    "skew_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "alpha_beta": ("alpha", "beta"),
    "cross_entropy": ("smoothing",),
}
DIVERGENCES = (
    Term("forward_kl"),
    Term("reverse_kl"),
    Term("jensen_shannon", a=0.3),
    Term("skew_kl", a=0.1),
    Term("skew_reverse_kl", a=0.2),
    Term("alpha_beta", a=0.3, b=0.6),
    Term("total_variation"),
)
TERMS = (*DIVERGENCES, Term("cross_entropy"), Term("cross_entropy", a=0.3))
CASES = [*TERMS, *(term._replace(temperature=2.0) for term in TERMS), Term("logit_mse")]
SEVERAL = (
    Term("forward_kl", 2.0),
    Term("reverse_kl", 1.0),
    Term("cross_entropy", 1.0, 0.1),
    Term("jensen_shannon", 3.0, 0.5),
    Term("logit_mse"),
)


def in_interpreter(student, teacher, labels, terms, weights, gradient: bool, apart: int, block: int):
    os.environ["TRITON_INTERPRET"] = "1"
    from stillroom.kernels import triton_fused

    triton_fused.BLOCK = block
    return apart_in_memory(triton_fused.fused, student, teacher, labels, terms, weights, gradient, apart)


def apart_in_memory(kernel, student, teacher, labels, terms, weights, gradient: bool, apart: int):
    """``fused`` of a copy whose rows lie ``apart`` columns further apart: the copy afterwards, nats, measures."""
    wide = [None if x is None else torch.full((len(x), x.shape[1] + apart), torch.nan) for x in (student, teacher)]
    views = [None if x is None else x[:, : student.shape[1]] for x in wide]
    for view, x in zip(views, (student, teacher), strict=True):
        if x is not None:
            view.copy_(torch.from_numpy(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nats, measures = kernel(*views, torch.from_numpy(labels), terms, torch.from_numpy(weights), gradient=gradient)
    for x in wide:
        assert x is None or x[:, student.shape[1] :].isnan().all(), "written beside the columns"
    return views[0].numpy(), nats.numpy(), measures.numpy()


Fused = Callable[..., list[Tensor]]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_triton)])
def fused(request):
    """Called like the kernel, returns what is in the place of the student's logits, nats and measures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def call(
            student: Tensor,
            teacher: Tensor | None,
            labels: Tensor,
            terms: Sequence[Term],
            weights: Tensor | None = None,
            *,
            gradient: bool = True,
            block: int = 32,
            apart: int = 0,
        ) -> list[Tensor]:
            weights = torch.ones(len(terms), len(student)) if weights is None else weights
            arrays = [None if x is None else x.numpy() for x in (student, teacher, labels)]
            given = (*arrays, tuple(terms), weights.numpy(), gradient, apart)
            if request.param == "cpu":
                found = apart_in_memory(numba_fused.fused, *given)
            else:
                found = pool.submit(in_interpreter, *given, block).result(120)
            return [torch.from_numpy(x.copy()) for x in found]

        yield call


def problem(r: int = 3, v: int = 37, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits and next tokens; a few columns are impossible for one or for both."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, r, v, generator=g) * spread
    student[0, 3] = teacher[1, 5] = student[2, 7] = teacher[2, 7] = -torch.inf
    return student, teacher, torch.randint(8, v, (r,), generator=g)


def in_float64(student: Tensor, teacher: Tensor | None, labels: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = dict(zip(PARAMETERS.get(term.name, ()), (term.a, term.b), strict=False))
    if term.name != "logit_mse":
        arguments["temperature"] = term.temperature
    block = LogitBlock(student.double(), None if teacher is None else teacher.double(), labels)
    return LOSSES[term.name].load()(block, **arguments)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-6):
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("term", CASES, ids=str)
def test_equals_the_loss_in_float64(fused: Fused, term):
    student, teacher, labels = problem()
    weights = torch.tensor([[0.5, 1.0, -2.0]])
    gradient, nats, _ = fused(student, teacher, labels, [term], weights, apart=5)
    wanted, wanted_gradient = in_float64(student, teacher, labels, term)
    assert_near(nats[0], wanted)
    assert_near(gradient, wanted_gradient * weights[0].double().unsqueeze(-1))


@pytest.mark.parametrize(("v", "block"), [(37, 8), (32, 32), (5003, 2048), (1, 16)])
def test_a_weighted_sum_at_several_temperatures(fused: Fused, v, block):
    student, teacher, labels = problem(v=max(v, 9))
    student, teacher, labels = student[:, -v:], teacher[:, -v:], labels.clamp(max=v - 1)
    weights = torch.linspace(-0.5, 1, len(SEVERAL) * 3).view(-1, 3)
    gradient, nats, _ = fused(student, teacher, labels, SEVERAL, weights, block=block)
    wanted_gradient = torch.zeros(student.shape, dtype=torch.float64)
    for term, weight, found in zip(SEVERAL, weights, nats, strict=True):
        wanted, one = in_float64(student, teacher, labels, term)
        assert_near(found, wanted)
        wanted_gradient += weight.double().unsqueeze(-1) * one
    assert_near(gradient, wanted_gradient)


def test_of_a_student_nearly_equal_to_its_teacher_the_mixtures_lose_no_digits(fused: Fused):
    """Plain logarithms of t / m and s / m would lose all but two."""
    _, teacher, labels = problem(v=128)
    student = teacher + 0.003 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    term = Term("jensen_shannon", a=0.3)
    _, nats, _ = fused(student, teacher, labels, [term], gradient=False, block=128)
    wanted, _ = in_float64(student, teacher, labels, term)
    torch.testing.assert_close(nats[0].double(), wanted, rtol=2e-4, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("spread", [3.0, 1e4])
def test_a_student_equal_to_its_teacher_has_loss_0_and_gradient_0(fused: Fused, temperature, spread):
    student, _, labels = problem(spread=spread)
    terms = [*(term._replace(temperature=temperature) for term in DIVERGENCES), Term("logit_mse")]
    gradient, nats, _ = fused(student, student, labels, terms)
    assert (nats == 0).all()
    assert (gradient == 0).all()


def test_extreme_logits(fused: Fused):
    student, teacher = torch.full((2, 5, 33), -1e4)
    student[0, 3] = teacher[0, 32] = 1e4
    teacher[1, :-1] = -torch.inf
    student[2, 1:] = -torch.inf
    student[3], teacher[4] = -torch.inf, -torch.inf
    labels = torch.tensor([3, 32, 0, 5, 5])
    for term in (
        *(term._replace(temperature=0.25) for term in (*DIVERGENCES, Term("cross_entropy"))),
        Term("logit_mse"),
    ):
        gradient, nats, _ = fused(student, teacher, labels, [term])
        wanted, wanted_gradient = in_float64(student, teacher, labels, term)
        assert nats.isfinite().all()
        assert gradient.isfinite().all()
        assert_near(nats[0], wanted)
        assert_near(gradient, wanted_gradient, 5e-6)


def test_where_all_weights_are_0_the_gradient_is_exactly_0(fused: Fused):
    student, teacher, labels = problem()
    terms = (Term("reverse_kl", 2.0), Term("forward_kl"))
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 2.0]])
    wanted, wanted_nats, _ = fused(student, teacher, labels, terms, weights)
    student[0, 4] = torch.nan
    for kept in (terms, terms[1:]):
        gradient, nats, _ = fused(student, teacher, labels, kept, weights[-len(kept) :])
        assert (gradient[0] == 0).all()
        assert nats[:, 0].isnan().all()
        assert torch.equal(nats[:, 1:], wanted_nats[-len(kept) :, 1:])
        assert torch.equal(gradient[2], wanted[2])


def test_logits_that_are_no_numbers_do_not_stay_unseen(fused: Fused):
    student, teacher, labels = problem()
    teacher[1, -1] = torch.nan
    gradient, nats, measures = fused(student, teacher, labels, DIVERGENCES)
    assert nats[:, 1].isnan().all()
    assert gradient[1].isnan().all()
    assert measures[1, 1].isnan()
    assert nats[:, ::2].isfinite().all()


@pytest.mark.parametrize("terms", [(Term("forward_kl"),), (Term("reverse_kl", 2.0),)], ids=str)
def test_measures_are_those_of_the_package(fused: Fused, terms):
    student, teacher, labels = problem(6)
    teacher[4:] += 9 * torch.nn.functional.one_hot(student[4:].argmax(-1), 37)
    teacher[3] = student[3].round()  # whose largest may be several
    student[3] = teacher[3]
    student[0, [2, 34]], teacher[0, 2] = 50.0, 50.0  # two that are equally likely, in different blocks
    _, _, measures = fused(student, teacher, labels, terms)
    block = LogitBlock(student.double(), teacher.double(), labels)
    for name, found in zip(MEASURES, measures, strict=True):
        assert_near(found, getattr(all_measures, name)(block))
    assert 0 < measures[MEASURES.index("top1_agreement")].sum() < 6


def test_without_gradient_the_logits_stay(fused: Fused):
    student, teacher, labels = problem()
    with_gradient = fused(student, teacher, labels, SEVERAL)
    logits, nats, measures = fused(student, teacher, labels, SEVERAL, gradient=False)
    assert torch.equal(logits, student)
    assert torch.equal(nats, with_gradient[1])
    assert torch.equal(measures, with_gradient[2])


def test_cross_entropy_needs_no_teacher(fused: Fused):
    student, _, labels = problem()
    term = Term("cross_entropy", 2.0, 0.1)
    gradient, nats, measures = fused(student, None, labels, [term])
    wanted, wanted_gradient = in_float64(student, None, labels, term)
    assert_near(nats[0], wanted)
    assert_near(gradient, wanted_gradient)
    assert measures[0].isfinite().all()
    assert measures[1:].isnan().all()


def test_a_next_token_beyond_the_columns_is_not_taken_for_another(fused: Fused):
    student, teacher, labels = problem()
    labels[0], labels[2] = 37, -100
    _, nats, measures = fused(student, teacher, labels, (Term("cross_entropy"), Term("forward_kl")))
    assert nats[0].isnan().tolist() == measures[-1].isnan().tolist() == [True, False, True]
    assert nats[1].isfinite().all()


@needs_triton
def test_compiles_for_a_device(tmp_path, monkeypatch):
    """Which the interpreter does not show. No product and sum are contracted, or equal would not be exactly 0."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stillroom.kernels import triton_fused

    kinds = tuple(sorted(triton_fused.KINDS))
    constants = {
        "KINDS": kinds,
        "SLOTS": tuple(i % 2 for i in range(len(kinds))),
        "SUMS": tuple(triton_fused.KINDS[kind] for kind in kinds),
        "CLOSED": False,
        "HAS_TEACHER": True,
        "GRADIENT": True,
        "BLOCK": 1024,
    }
    types = dict.fromkeys(("student", "teacher", "weights", "nats", "measures"), "*fp32")
    types |= dict.fromkeys(("student_stride", "teacher_stride", "num_rows", "vocab_size"), "i32")
    types |= {"temperatures": ("fp32",) * 2, "inverses": ("fp32",) * 2, "a": ("fp32",) * len(kinds)}
    types |= {"b": types["a"], "labels": "*i64"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in triton_fused._row.arg_names}
    compiled = triton.compile(
        ASTSource(triton_fused._row, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options=triton_fused.OPTIONS,
    )
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert "add.rn.f32" in compiled.asm["ptx"]
    assert "fma.rn.f32" not in compiled.asm["ptx"]

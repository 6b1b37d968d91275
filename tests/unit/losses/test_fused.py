"""Which losses the kernels take, and that these give what the losses on tensors give."""

import pytest
import torch

from stillroom.errors import MismatchError
from stillroom.kernels.selection import top_indices
from stillroom.lm_head import LMHead
from stillroom.losses import config, fused_linear, logits
from stillroom.losses.block import LogitBlock
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.objective import Measure, Objective, by_data, by_entropy
from stillroom.signals import Logits, Signal, Sparse

LOSSES = {name: entry.load() for name, entry in config.LOSSES.items()}
ALL: list[Measure] = [
    logits.top1_agreement,
    logits.accepted_mass,
    logits.student_entropy,
    logits.teacher_cross_entropy,
    logits.teacher_entropy,
]
DENSE = [
    [Objective("a", LOSSES["adaptive_kl"], 0.7, {"mu": 0.3}), Objective("b", LOSSES["cross_entropy"], 0.3)],
    [Objective("a", LOSSES["adaptive_kl"], 1.0, {"temperature": 2.0})],
    [Objective("a", LOSSES["logit_mse"]), Objective("b", LOSSES["skew_kl"], 0.5, token_weight=by_data)],
    [Objective("a", LOSSES["alpha_beta"], 1.0, {"temperature": 3.0}), Objective("b", LOSSES["reverse_kl"])],
]
FROM_ENTRIES = [
    [Objective("a", LOSSES["forward_kl"], 0.9, {"missing": missing}), Objective("b", LOSSES["cross_entropy"], 0.1)]
    for missing in ("bucket", "renormalise", "zero", "label")
]
TEMPERED = [Objective("a", LOSSES["forward_kl"], 1.0, {"temperature": 2.0})]


def problem(n: int = 9, d: int = 5, v: int = 4103) -> tuple[torch.Tensor, ...]:
    """Hidden states, a head, the teacher's logits, next tokens, what the data say of each; more than one tile."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    teacher = 3 * torch.randn(n, v, generator=g)
    teacher[0, 2] = -torch.inf
    return hidden, weight, teacher, torch.randint(3, v, (n,), generator=g), torch.rand(n, generator=g)


def truncated(teacher: torch.Tensor, k: int = 7) -> Sparse:
    def seen(temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = (teacher.double() / temperature).softmax(-1)
        values, ids = top_indices(p, k)
        return ids, values.log(), p.scatter(-1, ids, 0).sum(-1).log().float()

    ids, log_probs, _ = seen(1.0)
    log_probs[1, 4:] = -torch.inf
    ids[1, 4:] = ids[1, 0]
    kept = log_probs.exp().sum(-1)
    rests = {1.0: (1 - kept).log().float(), 2.0: seen(2.0)[2]}
    label = teacher.double().log_softmax(-1)[:, 0].float()
    return Sparse(ids, log_probs.float(), rests, torch.ones(len(teacher)), label, vocab_size=teacher.shape[1])


def run(objectives, signal: Signal | None, wanted: list[Measure], dtype: torch.dtype):
    hidden, weight, _, labels, of_data = (x.to(dtype) if x.is_floating_point() else x for x in problem())
    if isinstance(signal, Logits):
        signal = Logits(signal.logits.to(dtype))
    trained = hidden.requires_grad_(), weight.requires_grad_()
    head, weights = LMHead(weight, scale=0.5), of_data + 0.5
    found = linear_losses(
        hidden, head, objectives, labels, weights, signal, measures=wanted, data_weights=of_data,
        chunk_bytes=4 * len(weight) * 4,
    )  # fmt: skip
    return found, torch.autograd.grad(found.total, trained)


def run_on_logits(student: torch.Tensor, objectives, signal: Signal | None, wanted: list[Measure], weight: float = 1.0):
    """Of one position whose logits are those of the student, [v]: what is found, and the gradient in them."""
    assert chosen(objectives, signal, wanted)
    head = student.unsqueeze(-1).requires_grad_()
    found = linear_losses(
        torch.ones(1, 1), LMHead(head), objectives, torch.zeros(1, dtype=torch.long), torch.full((1,), weight), signal,
        measures=wanted,
    )  # fmt: skip
    return found, torch.autograd.grad(found.total, head)[0].squeeze(-1)


def assert_equals_tensors(objectives, signal: Signal | None, wanted: list[Measure]):
    """float32 goes through kernels, float64 does not."""
    assert chosen(objectives, signal, wanted)
    (found, gradients), (exact, exact_gradients) = (
        run(objectives, signal, wanted, dtype) for dtype in (torch.float32, torch.float64)
    )
    for x, y in zip((*found, *gradients), (*exact, *exact_gradients), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)


def chosen(objectives, signal: Signal | None, wanted: list[Measure], dtype=torch.float32) -> bool:
    device = torch.device("cpu")
    return fused_linear.kernel_terms(objectives, wanted, signal, dtype=dtype, device=device) is not None


@pytest.mark.parametrize("objectives", DENSE, ids=lambda some: "+".join(o.loss.__name__ for o in some))
def test_of_a_dense_teacher(objectives):
    assert_equals_tensors(objectives, Logits(problem()[2]), ALL)


@pytest.mark.parametrize("objectives", [*FROM_ENTRIES, TEMPERED], ids=lambda some: str(some[0].arguments))
def test_of_a_truncated_signal(objectives):
    tells_bucket = objectives is FROM_ENTRIES[0]
    wanted = ALL if tells_bucket else [m for m in ALL if m is not logits.accepted_mass]
    assert_equals_tensors(objectives, truncated(problem()[2]), wanted)


def test_of_a_sampled_signal():
    entries = truncated(problem()[2])
    signal = Sparse(entries.ids, entries.log_probs, entropy=entries.entropy, sampled=True)
    objectives = [Objective("a", LOSSES["forward_kl"], 0.9), Objective("b", LOSSES["cross_entropy"], 0.1)]
    assert_equals_tensors(objectives, signal, [logits.student_entropy, logits.top1_agreement])


def test_of_no_teacher():
    objectives = [Objective("a", LOSSES["cross_entropy"], 1.0, {"smoothing": 0.2, "temperature": 2.0})]
    assert_equals_tensors(objectives, None, [logits.student_entropy])


def test_of_equals_at_the_border_the_head_has_the_first():
    """As many as are needed: of four equally likely, two hold 0.4."""
    teacher, student = torch.zeros(1, 4), torch.tensor([[2.0, 0.0, 1.0, 0.0]])
    objectives = [Objective("a", LOSSES["adaptive_kl"], 1.0, {"mu": 0.4})]
    found, _ = run_on_logits(student[0], objectives, Logits(teacher), [])
    block = LogitBlock(student.double(), teacher.double(), torch.zeros(1, dtype=torch.long))
    wanted, _ = LOSSES["adaptive_kl"](block, mu=0.4)
    torch.testing.assert_close(found.nats[0].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("objective", "signal"),
    [
        (Objective("a", LOSSES["hinge_ranking"]), "dense"),
        (Objective("a", LOSSES["forward_kl"], token_weight=by_entropy("teacher", certain=0.0, uncertain=1.0)), "dense"),
        (Objective("a", lambda block: LOSSES["forward_kl"](block)), "dense"),
        (Objective("a", LOSSES["reverse_kl"]), "truncated"),
        (Objective("a", LOSSES["forward_kl"]), "none"),
    ],
)
def test_what_kernels_do_not_know_is_left_to_tensors(objective, signal):
    teacher = problem()[2]
    signals = {"dense": Logits(teacher), "truncated": truncated(teacher), "none": None}
    assert not chosen([objective], signals[signal], [])
    assert not chosen([Objective("a", LOSSES["forward_kl"])], Logits(teacher), [], torch.float64)
    assert not chosen([Objective("a", LOSSES["forward_kl"])], Logits(teacher), [lambda block: block.labels])


@pytest.mark.parametrize("place", [-1, 4103, 10**9])
def test_ids_that_are_no_columns_are_refused(place):
    """They would be read, and written, beside the logits."""
    entries = truncated(problem()[2])
    entries.ids[3, 2] = place
    with pytest.raises(MismatchError, match="not in the student's vocabulary") as raised:
        run(FROM_ENTRIES[0], entries, [], torch.float32)
    assert str(place) in raised.value.values["ids"]


def test_of_a_student_that_leaves_next_to_nothing_beside_the_entries():
    """The bucket's ratio is as large as the type can hold, and may not be multiplied by anything first."""
    student = torch.full((300,), -100.0)
    student[:4] = 0
    signal = Sparse(torch.arange(4)[None], torch.full((1, 4), 0.125).log(), {1.0: torch.tensor([0.5]).log()})
    _, gradient = run_on_logits(student, [Objective("a", LOSSES["forward_kl"])], signal, [], weight=10.0)
    assert gradient.isfinite().all()


def test_entropy_does_not_depend_on_what_all_logits_have_in_common():
    """Of a sure position it lies in the logarithm of the sum, which is nothing beside large logits."""
    near, objectives = torch.tensor([0.0, -12.0, -60.0]), [Objective("a", LOSSES["cross_entropy"])]
    found = [run_on_logits(near + more, objectives, None, [logits.student_entropy])[0] for more in (0.0, 1024.0)]
    torch.testing.assert_close(found[1].measures, found[0].measures, rtol=1e-4, atol=0)


def test_buffers_of_an_evaluation_can_be_trained_with():
    hidden, weight, teacher, labels, of_data = problem()
    buffers, head = Buffers(), LMHead(weight)
    objectives = [Objective("a", LOSSES["forward_kl"])]
    with torch.inference_mode():
        linear_losses(hidden, head, objectives, labels, of_data, Logits(teacher), buffers=buffers)
    trained = hidden.requires_grad_()
    linear_losses(trained, head, objectives, labels, of_data, Logits(teacher), buffers=buffers).total.backward()
    assert trained.grad is not None

"""Held-out measurement: equal to what full logits of each document alone give."""

import pytest
import torch
from transformers import PreTrainedModel

from conftest import build_documents, build_model, build_stream
from stillroom.data.dataset import Documents
from stillroom.losses.divergences import forward_kl, reverse_kl
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.teachers.live import LiveTeacher
from stillroom.training.step import StudentStep
from stillroom.training.validation import measure_held_out

OBJECTIVES = (
    Objective("reverse_kl", reverse_kl, 0.5, {"temperature": 3.0}),
    Objective("cross_entropy", cross_entropy, 0.25),
)
DOCUMENTS = build_documents([20, 9, 30, 4, 33, 12, 27], seed=3)


def measure(student: PreTrainedModel, teacher: PreTrainedModel | None, objectives=OBJECTIVES, *, pack=True, tokens=64):
    module = StudentStep(student, objectives, vocab_size=None, logits_bytes=2**20)
    steps = build_stream(DOCUMENTS, pack=pack, shuffle=False, tokens=tokens, micro_tokens=tokens, epochs=1)
    return measure_held_out(module, None if teacher is None else LiveTeacher(teacher), steps, "cpu")


def naive(student: PreTrainedModel, teacher: PreTrainedModel, documents: Documents) -> dict[str, float]:
    """Each document alone, over full logits in float64."""
    sums: dict[str, float] = {}
    num = 0
    for number in range(len(documents)):
        tokens = torch.from_numpy(documents.tokens(number).copy()).long()
        keep = torch.from_numpy(documents.target_mask(number))[1:]
        with torch.no_grad():
            s, t = (model(input_ids=tokens[None]).logits[0, :-1][keep].double() for model in (student, teacher))
        targets = tokens[1:][keep][:, None]
        log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
        cold_s, cold_t = torch.log_softmax(s / 3, -1), torch.log_softmax(t / 3, -1)
        values = {
            "cross_entropy_nats": -log_s.gather(-1, targets),
            "teacher_cross_entropy_nats": -log_t.gather(-1, targets),
            "forward_kl_nats": (log_t.exp() * (log_t - log_s)).sum(-1),
            "reverse_kl": 9 * (cold_s.exp() * (cold_s - cold_t)).sum(-1),
            "student_entropy_nats": -(log_s.exp() * log_s).sum(-1),
            "accepted_mass": torch.minimum(log_s.exp(), log_t.exp()).sum(-1),
            "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double(),
        }
        sums = {name: sums.get(name, 0.0) + value.sum().item() for name, value in values.items()}
        num += int(keep.sum())
    means = {name: value / num for name, value in sums.items()}
    loss = 0.5 * means.pop("reverse_kl") + 0.25 * means["cross_entropy_nats"]
    return {"loss_nats": loss, **means, "num_tokens": num}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_measures_are_means_over_the_kept_positions(family):
    student, teacher = build_model(family, seed=1), build_model(family, seed=2)
    with torch.no_grad():  # a teacher that agrees now and then
        for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
            p.mul_(0.3).add_(q, alpha=0.9)
    found, wanted = measure(student, teacher), naive(student, teacher, DOCUMENTS)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert 0.05 < found["top1_agreement"] < 0.95


@pytest.mark.parametrize(("pack", "tokens"), [(True, 32), (True, 256), (False, 32), (False, 256)])
def test_measures_do_not_depend_on_how_the_text_is_batched(pack, tokens):
    student, teacher = build_model(seed=1), build_model(seed=2)
    assert measure(student, teacher, pack=pack, tokens=tokens) == pytest.approx(measure(student, teacher), rel=1e-5)


def test_a_student_that_is_its_teacher():
    found = measure(build_model(seed=1), build_model(seed=1))
    assert found["forward_kl_nats"] == 0
    assert found["top1_agreement"] == 1
    assert found["cross_entropy_nats"] == found["teacher_cross_entropy_nats"]


def test_without_a_teacher_only_hard_labels_are_measured():
    hard = [Objective("cross_entropy", cross_entropy, 2.0)]
    found = measure(build_model(seed=1), None, hard)
    assert found.keys() == {"loss_nats", "cross_entropy_nats", "student_entropy_nats", "num_tokens"}
    assert found["loss_nats"] == pytest.approx(2 * found["cross_entropy_nats"])


def test_measuring_changes_nothing():
    """No weight, no gradient, no random number; and dropout is off."""
    student = build_model("gpt2", seed=1).train()
    assert student.config.resid_pdrop > 0
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (measure(student, build_model(seed=2), [Objective("kl", forward_kl)]) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())

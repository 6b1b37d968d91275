"""The student's own text: what is drawn is the student's, and the divergence is that of full logits."""

import numpy as np
import pytest
import torch

from conftest import build_documents, build_model
from stillroom.data.dataset import Documents
from stillroom.distill import preflight as module
from stillroom.distill.preflight import on_policy_kl
from stillroom.teachers.live import LiveTeacher
from stillroom.training.step import StudentStep

DOCUMENTS = build_documents([20, 9, 30, 33], seed=3)
COLUMNS = 300


def measure(student, teacher, documents: Documents = DOCUMENTS, **settings):
    step = StudentStep(student, [], vocab_size=COLUMNS, logits_bytes=2**20)
    values = {"vocab_size": COLUMNS, "length": 48, "ends": [], "seed": 0, **settings}
    return on_policy_kl(step, LiveTeacher(teacher), documents, range(len(documents)), **values)


@pytest.fixture
def written(monkeypatch):
    """Every text that is written, with its prompt's length."""
    found = []

    def write(model, prompts, *rest, generate=module.generate, **named):
        answers = generate(model, prompts, *rest, **named)
        found.append((len(prompts[0]), np.concatenate([prompts[0], answers[0][0]]).astype(np.int64)))
        return answers

    monkeypatch.setattr(module, "generate", write)
    return found


def test_the_divergence_is_that_of_full_logits_over_what_was_written(written):
    student, teacher = build_model(seed=1), build_model(seed=2)
    found, number = measure(student, teacher)
    total, num = 0.0, 0
    for start, text in written:
        with torch.no_grad():
            s, t = (
                m(input_ids=torch.from_numpy(text)[None]).logits[0, start - 1 : -1, :COLUMNS]
                for m in (student, teacher)
            )
        log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
        total += (log_s.exp() * (log_s - log_t)).sum().item()
        num += len(log_s)
    assert number == num
    assert found == pytest.approx(total / num, rel=1e-5)
    assert [start for start, _ in written] == [4, 4, 6, 6], (
        "what is no target, or half of it where that is a single token"
    )
    assert all(text.max() < COLUMNS and len(text) <= 49 for _, text in written)
    assert all((text[:start] == DOCUMENTS.tokens(i)[:start]).all() for i, (start, text) in enumerate(written))


def test_a_student_that_is_its_teacher():
    assert measure(build_model(seed=1), build_model(seed=1))[0] == pytest.approx(0, abs=1e-6)


def test_tokens_are_drawn_from_the_student_and_the_same_by_the_same_seed(written):
    student = build_model(seed=1)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(40)  # so that one token has nearly all the mass
    measure(student, build_model(seed=2))
    for start, text in written:
        with torch.no_grad():
            logits = student(input_ids=torch.from_numpy(text)[None]).logits[0, start - 1 : -1, :COLUMNS]
        assert (logits.argmax(-1).numpy() == text[start:]).mean() > 0.8
    again = [text for _, text in written]
    written.clear()
    measure(student, build_model(seed=2))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(again, written, strict=True))


def test_a_text_ends_with_its_end_and_a_prompt_without_room_is_left_out(written):
    student, teacher = build_model(seed=1), build_model(seed=2)
    measure(student, teacher)
    end = int(written[2][1][written[2][0]])  # the first token that was written there
    written.clear()
    measure(student, teacher, ends=[end])
    assert any(len(text) == start + 1 and text[-1] == end for start, text in written)
    written.clear()
    number = measure(student, teacher, build_documents([20, 5]), length=4)[1]
    assert [(start, len(text)) for start, text in written] == [(2, 5)]
    assert number == 3

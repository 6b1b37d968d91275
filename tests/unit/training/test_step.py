"""The student step: the loss and gradient of full logits in float64, however the batch is split."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import FAMILIES, build_batch, build_documents, build_model, build_stream
from stillroom.batch import Batch
from stillroom.losses.divergences import forward_kl, reverse_kl
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.teachers.live import LiveTeacher
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.config import AdamWConfig
from stillroom.training.loop import train
from stillroom.training.prefetch import Prefetcher
from stillroom.training.state import TrainState, build_optimizer, build_schedule
from stillroom.training.step import StudentStep

T = 2.0
ALL = (
    Objective("forward_kl", forward_kl, 0.5, {"temperature": T}),
    Objective("reverse_kl", reverse_kl, 0.25, {"temperature": 1.0}),
    Objective("cross_entropy", cross_entropy, 0.4, {"temperature": 1.0}),
)


def step_of(model: PreTrainedModel, objectives=ALL, *, vocab_size: int | None = None, **settings) -> StudentStep:
    return StudentStep(model, objectives, vocab_size=vocab_size, **{"logits_bytes": 2**20, **settings})


def naive_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, vocab_size: int = 304) -> Tensor:
    """ALL over the models' own full logits, by plain autograd: the mean over the kept positions."""

    def logits(model: PreTrainedModel) -> Tensor:
        own = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
        return own[..., :vocab_size][batch.loss_mask].double()

    s, t = logits(student), logits(teacher).detach()
    log_s, log_t = torch.log_softmax(s / T, -1), torch.log_softmax(t / T, -1)
    forward = T**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    reverse = (log_s.exp() * (log_s - log_t)).sum(-1)
    hard = -log_s.gather(-1, batch.labels[batch.loss_mask].unsqueeze(-1)).squeeze(-1)
    return (0.5 * forward + 0.25 * reverse + 0.4 * hard).mean()


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_loss(module: StudentStep, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    return module(batch, LiveTeacher(teacher).forward(batch), batch.num_kept).loss


# --- against the formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_are_those_of_full_logits(family, tied):
    student = build_model(family, seed=1, tie_word_embeddings=tied).double()
    teacher = build_model(family, seed=2).double()
    batch = build_batch(20, 9, 30, 14, 6)
    wanted = naive_loss(student, teacher, batch)
    wanted_gradients = gradients(student, wanted)
    loss = step_loss(step_of(student), teacher, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    found = gradients(student, loss)
    assert found.keys() == wanted_gradients.keys() == dict(student.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-7, atol=1e-9, msg=name)


def test_a_teacher_of_another_family_and_width():
    student, teacher = build_model("gpt2", seed=1).double(), build_model("gemma2", hidden_size=24).double()
    batch = build_batch(20, 9, 30)
    wanted = naive_loss(student, teacher, batch)
    torch.testing.assert_close(step_loss(step_of(student), teacher, batch), wanted, rtol=1e-9, atol=1e-9)


def test_sums_tell_each_objective_without_its_weight():
    student, teacher = build_model(seed=1).double(), build_model(seed=2).double()
    batch = build_batch(20, 9, 30)
    result = step_of(student)(batch, LiveTeacher(teacher).forward(batch), batch.num_kept)
    means = (result.sums / batch.num_kept).tolist()
    assert sum(o.weight * mean for o, mean in zip(ALL, means, strict=True)) == pytest.approx(result.loss.item())
    (hard,) = step_of(student, [Objective("h", cross_entropy)])(batch, None, batch.num_kept).sums.tolist()
    assert hard / batch.num_kept == pytest.approx(means[2])


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family, loss, temperature):
    model = build_model(family)
    batch = build_batch(20, 9, 30)
    module = step_of(model, [Objective("kl", loss, 1.0, {"temperature": temperature})])
    value = module(batch, LiveTeacher(build_model(family)).forward(batch), batch.num_kept).loss
    assert value.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(model, value).values())


# --- what counts -----------------------------------------------------------------------------------------------------


def test_positions_that_are_not_kept_contribute_nothing():
    """Their targets do not matter, and neither would a loss that was computed there."""
    student, teacher = build_model(seed=1).double(), build_model(seed=2).double()
    batch = build_batch(20, 9, 30)
    assert 0 < batch.num_kept < batch.loss_mask.numel()
    other = replace(batch, labels=torch.where(batch.loss_mask, batch.labels, 299 - batch.labels))
    module = step_of(student)
    wanted = gradients(student, step_loss(module, teacher, batch))
    found = gradients(student, step_loss(module, teacher, other))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tokens_after_the_last_kept_position_have_no_gradient():
    student, teacher = build_model(seed=1).double(), build_model(seed=2).double()
    batch = build_batch(20)
    loss_mask = batch.loss_mask.clone()
    loss_mask[0, 10:] = False
    seen = set(batch.tokens[0, :10].tolist())
    found = gradients(student, step_loss(step_of(student), teacher, replace(batch, loss_mask=loss_mask)))
    rows = found["model.embed_tokens.weight"].abs().sum(-1).nonzero().squeeze(-1).tolist()
    assert set(rows) == seen


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_labels_are_those_that_transformers_makes_of_each_document(family):
    """Which shifts labels itself: a target, a mask or a border one place off would be noticed."""
    documents = build_documents([20, 9, 30, 4])
    model = build_model(family, seed=1)
    (batch,) = next(build_stream(documents, shuffle=False, epochs=1, micro_tokens=256))
    assert len(batch.tokens) < len(documents)
    total, num_kept = 0.0, 0
    for number in range(len(documents)):
        tokens = torch.from_numpy(documents.tokens(number).copy()).long()
        labels = torch.where(torch.from_numpy(documents.target_mask(number)), tokens, -100)
        num = int((labels[1:] >= 0).sum())
        with torch.no_grad():
            total += num * model(input_ids=tokens[None], labels=labels[None]).loss.item()
        num_kept += num
    loss = step_of(model, [Objective("cross_entropy", cross_entropy)])(batch, None, batch.num_kept).loss.item()
    assert batch.num_kept == num_kept
    assert loss == pytest.approx(total / num_kept, rel=1e-5)


def test_a_micro_batch_without_a_kept_position():
    student, teacher = build_model(seed=1), build_model(seed=2)
    batch = build_batch(20, 9, 30)
    nothing = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    result = step_of(student)(nothing, LiveTeacher(teacher).forward(nothing), 7)
    assert result.loss.item() == 0
    assert (result.sums == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(student, result.loss).values())


# --- how a step is split ---------------------------------------------------------------------------------------------


def trained(folder: Path, micro_tokens: int, lengths: list[int], *, logits_bytes: int = 2**20) -> TrainState:
    """Three steps of about 256 tokens on documents of different lengths, in float64."""
    student = build_model("llama", seed=1, tie_word_embeddings=True).double()
    module = step_of(student, logits_bytes=logits_bytes)
    config = AdamWConfig(learning_rate=1e-2, clip=0.5)
    optimizer = build_optimizer(module, config)
    stream = build_stream(build_documents(lengths), micro_tokens=micro_tokens)
    state = TrainState(module, optimizer, build_schedule(optimizer, config, 3), Prefetcher(stream, None))
    train(
        state,
        LiveTeacher(build_model("llama", seed=2).double()),
        num_steps=3,
        clip=config.clip,
        checkpoints=Checkpoints(folder, keep=1),
        checkpoint_every=None,
        measure=None,
        measure_every=None,
        keep_best=False,
        record=lambda _: None,
        report=lambda *_: None,
    )
    return state


LENGTHS = [6, 33, 12, 7, 29, 31, 18, 33, 5, 24, 9, 33, 16, 28, 33, 11, 21, 33, 8, 26, 30, 4, 33, 19] * 2


def test_a_step_is_the_same_for_every_way_of_splitting_it(tmp_path):
    streams = {
        micro_batch: build_stream(build_documents(LENGTHS), micro_tokens=micro_batch) for micro_batch in (256, 128, 32)
    }
    counts = {micro_batch: [len(step) for step in islice(stream, 3)] for micro_batch, stream in streams.items()}
    assert counts == {256: [1, 1, 1], 128: [2, 2, 2], 32: [8, 8, 8]}
    whole = trained(tmp_path / "1", 256, LENGTHS)
    start = build_model("llama", seed=1).double().state_dict()
    for micro_tokens in (128, 32):
        split = trained(tmp_path / str(micro_tokens), micro_tokens, LENGTHS)
        assert split.num_tokens == whole.num_tokens
        for name, tensor in whole.module.model.state_dict().items():
            found = split.module.model.state_dict()[name]
            assert (found - tensor).abs().max() < 1e-10, name
            assert (tensor - start[name]).abs().max() > 1e-3, name


def test_micro_batches_add_up_to_the_step():
    """The mean over all kept positions, and not the mean of the micro-batches' means."""
    student, teacher = build_model(seed=1).double(), LiveTeacher(build_model(seed=2).double())
    micro_batches = next(build_stream(build_documents(LENGTHS), micro_tokens=32, tokens=128, pack=False))
    kept = [micro_batch.num_kept for micro_batch in micro_batches]
    assert len(set(kept)) > 1
    module = step_of(student)
    parts = [module(micro_batch, teacher.forward(micro_batch), sum(kept)).loss.item() for micro_batch in micro_batches]
    means = [
        module(micro_batch, teacher.forward(micro_batch), micro_batch.num_kept).loss.item()
        for micro_batch in micro_batches
    ]
    assert sum(parts) == pytest.approx(sum(m * k for m, k in zip(means, kept, strict=True)) / sum(kept), rel=1e-12)
    assert sum(parts) != pytest.approx(sum(means) / len(means), rel=1e-6)


@pytest.mark.parametrize("logits_bytes", [1, 10_000, 2**24])
def test_the_budget_for_logits_changes_nothing(logits_bytes):
    student, teacher = build_model("gemma2", seed=1).double(), build_model("gemma2", seed=2).double()
    batch = build_batch(20, 9, 30, 14, 6)
    loss = step_loss(step_of(student, logits_bytes=logits_bytes), teacher, batch)
    wanted = naive_loss(student, teacher, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    found = gradients(student, loss)
    wanted_gradients = gradients(student, naive_loss(student, teacher, batch))
    assert all(torch.allclose(found[n], g, rtol=1e-7, atol=1e-9) for n, g in wanted_gradients.items())


# --- vocabularies that are padded differently ------------------------------------------------------------------------


def test_only_the_shared_columns_are_compared():
    student = build_model("llama", seed=1).double()
    teacher = build_model("llama", seed=2, vocab_size=320).double()
    batch = build_batch(20, 9, 30)
    module = step_of(student, vocab_size=300)
    wanted = naive_loss(student, teacher, batch, 300)
    loss = step_loss(module, teacher, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    head = gradients(student, loss)["lm_head.weight"]
    assert (head[300:] == 0).all()
    assert (head[:300].abs().sum(-1) > 0).all()


def test_what_stands_in_the_padding_does_not_matter():
    student = build_model("llama", seed=1).double()
    teacher = build_model("llama", seed=2, vocab_size=320).double()
    batch = build_batch(20, 9, 30)
    module = step_of(student, vocab_size=300)
    loss = step_loss(module, teacher, batch).item()
    with torch.no_grad():
        teacher.lm_head.weight[300:] = 1e6
        student.lm_head.weight[300:] = -1e6
    assert step_loss(module, teacher, batch).item() == loss


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_bfloat16_stays_close_and_keeps_float32_weights(family):
    student, teacher = build_model(family, seed=1), build_model(family, seed=2)
    batch = build_batch(20, 9, 30, 14, 6)
    exact = step_loss(step_of(student), teacher, batch)
    wanted = gradients(student, exact)
    half = step_loss(step_of(student, precision=torch.bfloat16), teacher, batch)
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    assert half.item() != exact.item()
    for name, gradient in gradients(student, half).items():
        assert gradient.dtype == torch.float32
        similarity = torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)
        assert similarity > 0.97, (name, similarity)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_bfloat16_gives_a_student_that_is_its_teacher_no_negative_divergence():
    model, teacher = build_model(seed=1), build_model(seed=1).bfloat16()
    batch = build_batch(20, 9, 30)
    module = step_of(model, [Objective("forward_kl", forward_kl)], precision=torch.bfloat16)
    value = step_loss(module, teacher, batch)
    assert 0 <= value.item() < 1e-3


# --- the module ------------------------------------------------------------------------------------------------------


def test_projections_beside_the_head_are_part_of_the_module():
    """Whatever a step holds is trained by it, so all of the student is among its parameters, once."""
    model = build_model("qwen2")
    module = step_of(model)
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(module.parameters())) == len(list(model.parameters()))


def test_evaluation_has_no_gradient():
    student, teacher = build_model(seed=1), build_model(seed=2)
    batch = build_batch(20, 9, 30)
    with torch.no_grad():
        assert not step_loss(step_of(student), teacher, batch).requires_grad


def test_a_compiled_model_has_the_same_gradients():
    student, teacher = build_model(seed=1, num_hidden_layers=1), build_model(seed=2)
    batch = build_batch(20, 9, 30)
    wanted = gradients(student, step_loss(step_of(student), teacher, batch))
    module = step_of(student)
    student.model.compile(backend="aot_eager")
    found = gradients(student, step_loss(module, teacher, batch))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)

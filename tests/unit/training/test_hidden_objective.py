"""The hidden-state objective: the formula over the models' own states, however the batch is split; projectors."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import build_batch, build_documents, build_model, build_stream
from stillroom.batch import Batch
from stillroom.losses.config import DISTANCES
from stillroom.losses.divergences import forward_kl
from stillroom.losses.objective import Objective
from stillroom.models import loading
from stillroom.teachers.live import LiveTeacher
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.config import AdamWConfig
from stillroom.training.hidden_objective import HiddenLoss, HiddenSpec, fit_to_first_step, layers_of
from stillroom.training.loop import train
from stillroom.training.prefetch import Prefetcher
from stillroom.training.state import TrainState, build_optimizer, build_schedule
from stillroom.training.step import StudentStep, documents_of

PAIRS = ((0, 1), (1, 3), ("embeddings", "embeddings"), ("final_norm", "final_norm"))
BLOCKS = ((0, 1), (1, 3))
ARGUMENTS = {"attention_relation": {"heads": 2}, "channel_kl": {"temperature": 2.0}}
KL = Objective("forward_kl", forward_kl, 0.5)


def spec_of(distance: str = "mse", **settings) -> HiddenSpec:
    """Of a student of 2 layers of 16, and a teacher of 4 layers of 24."""
    pairs = BLOCKS if distance == "attention_relation" else PAIRS
    start = None if distance in ("linear_cka", "attention_relation") else "orthogonal"
    values = {"pairs": pairs, "widths": (16, 24), "start": start, "arguments": ARGUMENTS.get(distance, {}), **settings}
    return HiddenSpec("hidden", distance, **values)


def models_of(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = build_model("llama", seed=seed + 2, num_hidden_layers=4, hidden_size=24)
    return build_model("llama", seed=seed + 1).double(), teacher.double()


def step_of(model: PreTrainedModel, *specs: HiddenSpec, objectives=(KL,), **settings) -> StudentStep:
    terms = [HiddenLoss(spec) for spec in specs]
    return StudentStep(model, objectives, vocab_size=None, logits_bytes=2**20, hidden=terms, **settings)


def teacher_of(model: PreTrainedModel, *specs: HiddenSpec) -> LiveTeacher:
    return LiveTeacher(model, *layers_of(specs, 1))


def own_states(model: PreTrainedModel, batch: Batch) -> dict[object, Tensor]:
    """By the model's own means: what its blocks read is what the ones before gave out; the last is before the norm."""
    found = model(
        input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    states: dict[object, Tensor] = dict(enumerate(found[1:-1])) | {"embeddings": found[0], "final_norm": found[-1]}
    number = len(found) - 2
    caught = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False)
    handle.remove()
    return states | {number: caught[0]}


def gradients(module: StudentStep, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_the_formula():
    student, teacher = models_of()
    spec = spec_of("normalized_mse", pair_weights=(1.0, 0.5, 0.25, 2.0))
    module, batch = step_of(student, spec, hidden_weights={"hidden": 0.7}), build_batch(20, 9, 30, 14, 6)
    ours, theirs = own_states(student, batch), own_states(teacher, batch)
    found = 0.0
    for number, ((s, t), weight) in enumerate(zip(PAIRS, spec.pair_weights, strict=True)):
        projected = ours[s][batch.loss_mask] @ module.hidden["hidden"].projector(number).double().T
        wanted = theirs[t][batch.loss_mask].detach()
        error = (projected - wanted).square().sum(-1) / wanted.square().sum(-1)
        found = found + weight * error.mean()
    result = module(batch, teacher_of(teacher, spec).forward(batch), batch.num_kept)
    kl = result.sums[0] / batch.num_kept
    torch.testing.assert_close(result.loss, 0.5 * kl + 0.7 * found, rtol=1e-6, atol=0)
    assert result.sums[1].item() / batch.num_kept == pytest.approx(found.item(), rel=1e-9)
    assert module.columns == ["forward_kl_nats", "hidden_distance"]

    alone = step_of(student, spec, objectives=(), hidden_weights={"hidden": 0.7})
    alone.hidden.load_state_dict(module.hidden.state_dict())
    by_hand = gradients(module, 0.7 * found)
    ours_of = gradients(alone, alone(batch, teacher_of(teacher, spec).forward(batch), batch.num_kept).loss)
    assert sum("projectors" in name for name in ours_of) == 4
    assert "model.lm_head.weight" not in ours_of or not ours_of["model.lm_head.weight"].any()
    for name, gradient in by_hand.items():
        torch.testing.assert_close(ours_of[name], gradient, rtol=1e-4, atol=1e-8)  # norms are in float32


def test_pairs_without_weights_count_as_their_mean():
    (student, teacher), spec, batch = models_of(), spec_of(shared=True), build_batch(20, 9)
    output = teacher_of(teacher, spec).forward(batch)

    def result(*pairs):
        return step_of(student, replace(spec, pairs=pairs), objectives=())(batch, output, 1)

    whole, single = result(*PAIRS), [result(pair) for pair in PAIRS]
    assert whole.loss.item() == pytest.approx(sum(one.loss.item() for one in single) / 4, rel=1e-9)
    assert whole.sums.item() == pytest.approx(sum(one.sums.item() for one in single) / 4, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_step_is_the_same_however_its_batch_is_split(distance):
    student, teacher = models_of()
    specs = [spec_of(distance), replace(spec_of("mse", shared=True, normalise="rms"), name="second")]
    module, teller = step_of(student, *specs), teacher_of(teacher, *specs)
    documents = build_documents([20, 9, 30, 14, 6, 33, 12, 7])
    found = []
    for size in (256, 64, 32):
        micro_batches = next(build_stream(documents, micro_tokens=size, shuffle=False, epochs=1))
        num_kept = sum(micro_batch.num_kept for micro_batch in micro_batches)
        module.zero_grad()
        losses = [module(micro_batch, teller.forward(micro_batch), num_kept).loss for micro_batch in micro_batches]
        sum(losses).backward()
        found.append((len(losses), sum(losses).item(), [p.grad.clone() for p in module.parameters()]))
    assert [number for number, _, _ in found] == [1, 2, 4]
    for _, loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-10)
        for one, other in zip(grads, found[0][2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distance", DISTANCES)
def test_positions_that_do_not_count_contribute_exactly_nothing(distance):
    """Neither prompts nor padding: what the teacher would say there changes nothing, nor is a gradient taken there."""
    student, teacher = models_of()
    spec = spec_of(distance, pairs=BLOCKS)
    module, batch = step_of(student, spec, objectives=()), build_batch(20, 9, 30)
    caught: list[Tensor] = []

    def catch(_, _args, _kwargs, output):
        output.register_hook(lambda gradient: caught.append(gradient.clone()))

    block = student.model.layers[1]
    watched = block.self_attn.q_proj if distance == "attention_relation" else block
    watched.register_forward_hook(catch, with_kwargs=True)
    module(batch, teacher_of(teacher, spec).forward(batch), batch.num_kept).loss.backward()
    (gradient,) = caught
    assert (gradient[~batch.loss_mask] == 0).all()
    assert (gradient[batch.loss_mask] != 0).any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(distance):
    model = build_model("llama", num_hidden_layers=4, seed=3)
    pairs = ((0, 0), (3, 3)) if distance == "attention_relation" else ((0, 0), (3, 3), ("final_norm", "final_norm"))
    spec = spec_of(distance, pairs=pairs, widths=(16, 16), start=None)
    module, batch = step_of(model, spec), build_batch(20, 9, 30)
    teacher = build_model("llama", num_hidden_layers=4, seed=3)
    loss = module(batch, teacher_of(teacher, spec).forward(batch), batch.num_kept).loss
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(module, loss).values())


def test_checkpointed_blocks_give_the_same_gradients():
    specs = [spec_of("mse"), replace(spec_of("attention_relation"), name="relations")]
    batch, found = build_batch(20, 9, 30), []
    for checkpointed in (False, True):
        student, teacher = models_of()
        module = step_of(student, *specs).train()
        if checkpointed:
            loading.checkpoint_activations(student)
        loss = module(batch, teacher_of(teacher, *specs).forward(batch), batch.num_kept).loss
        found.append(gradients(module, loss))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_packed_documents_are_told_apart():
    batch = build_batch(20, 9, 30, 14, 6)
    expected = [d for row in batch.documents for d in row.tolist()]
    kept = [expected[i] for i in batch.kept.tolist()]
    numbers = documents_of(batch).tolist()
    assert len(set(numbers)) == len(set(kept)) == 5
    assert {(a, b) for a, b in zip(numbers, kept, strict=True)} == {(a, b) for a, b in zip(numbers, kept, strict=True)}
    assert len(set(zip(numbers, kept, strict=True))) == 5


def test_tokens_count_by_the_data_where_it_is_asked_for():
    student, teacher = models_of()
    batch = build_batch(20, 9, 30)
    weighed = replace(batch, weights=(batch.documents == 0).double())
    spec = spec_of("mse", by_data=True)
    plain, counted = (step_of(student, replace(spec, by_data=by), objectives=()) for by in (False, True))
    told = teacher_of(teacher, spec).forward(batch)
    only = replace(batch, loss_mask=batch.loss_mask & (batch.documents == 0))
    wanted = plain(only, teacher_of(teacher, spec).forward(only), batch.num_kept)
    found = counted(weighed, told, batch.num_kept)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-9)
    assert found.sums.item() == pytest.approx(plain(batch, told, 1).sums.item())  # what is told is without it


# --- projectors ------------------------------------------------------------------------------------------------------


def test_an_orthogonal_start_keeps_lengths_and_differs_by_pair_and_seed():
    term = HiddenLoss(spec_of())
    for number in range(4):
        matrix = term.projector(number).double()
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    assert not torch.equal(term.projector(0), term.projector(1))
    assert torch.equal(term.projector(0), HiddenLoss(spec_of()).projector(0))
    assert not torch.equal(term.projector(0), HiddenLoss(spec_of(), seed=1).projector(0))


@pytest.mark.parametrize("places", [None, tuple(range(3, 19))])
def test_an_identity_puts_each_channel_in_its_place(places):
    state = torch.randn(5, 16)
    projected = state @ HiddenLoss(spec_of(start="identity", places=places)).projector(0).T
    wanted = torch.zeros(5, 24)
    wanted[:, list(places or range(16))] = state
    assert torch.equal(projected, wanted)


def test_a_shared_projector_is_one():
    term = HiddenLoss(spec_of(shared=True))
    assert len(term.projectors) == 1
    assert term.projector(0) is term.projector(3)


@pytest.mark.parametrize("shared", [False, True])
def test_least_squares_fits_the_first_step_as_one_regression_would(shared):
    student, teacher = models_of()
    spec = spec_of("mse", start="least_squares", shared=shared, pairs=((0, 1), (1, 3)))
    module, teller = step_of(student, spec).train(), teacher_of(teacher, spec)
    micro_batches = next(build_stream(build_documents([33, 30, 33, 31, 33, 20, 29]), shuffle=False, epochs=1))
    fit_to_first_step(module, teller.forward, [(micro_batch, None) for micro_batch in micro_batches])
    assert module.training
    assert len(micro_batches) > 1
    x, y = [], []
    for s, t in spec.pairs:
        x.append(torch.cat([own_states(student, m)[s][m.loss_mask].detach() for m in micro_batches]))
        y.append(torch.cat([own_states(teacher, m)[t][m.loss_mask].detach() for m in micro_batches]))
    if shared:
        x, y = [torch.cat(x)], [torch.cat(y)]
    for number, (ours, theirs) in enumerate(zip(x, y, strict=True)):
        weight = ours.square().mean(0).mean() * len(ours) * 1e-4
        extended = torch.cat([ours, weight.sqrt() * torch.eye(16, dtype=torch.float64)])
        wanted = torch.linalg.lstsq(extended, torch.cat([theirs, torch.zeros(16, 24, dtype=torch.float64)])).solution.T
        torch.testing.assert_close(module.hidden["hidden"].projector(number).double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_fit_of_states_that_say_little_is_finite_and_does_not_depend_on_rounding():
    """Of 16 channels 14 are copies: without a ridge the system would have no one solution."""
    from stillroom.training.hidden_objective import ridge

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64).repeat(1, 8) * 1e3
    y = torch.randn(50, 24, generator=generator, dtype=torch.float64)
    one = ridge(x.T @ x, x.T @ y)
    other = ridge((x.T @ x) * (1 + 1e-15), x.T @ y)
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_channels_are_scaled_by_the_teachers_own_size_in_the_first_step():
    student, teacher = models_of()
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight[5] *= 1000  # a massive channel
    spec = spec_of("channel_scaled_mse", pairs=((0, 1),))
    module, teller = step_of(student, spec), teacher_of(teacher, spec)
    micro_batches = next(build_stream(build_documents([33, 30, 33, 31, 33, 20, 29]), shuffle=False, epochs=1))
    fit_to_first_step(module, teller.forward, [(micro_batch, None) for micro_batch in micro_batches])
    states = torch.cat([own_states(teacher, m)[1][m.loss_mask].detach() for m in micro_batches])
    rms = states.square().mean(0).sqrt()
    found = module.hidden["hidden"].scales[0].double()
    torch.testing.assert_close(found, rms.clamp(min=0.1 * rms.median().item()), rtol=1e-5, atol=0)
    assert found[5] > 100 * found.median()


def test_projectors_are_trained_and_saved_and_restored(tmp_path: Path):
    spec = spec_of("mse")

    def state_of() -> TrainState:
        student, _ = models_of()
        module = step_of(student.float(), spec)
        optimizer = build_optimizer(module, AdamWConfig(learning_rate=1e-2))
        stream = Prefetcher(build_stream(build_documents([20, 9, 30, 14, 6, 33, 12]), tokens=64), None)
        return TrainState(module, optimizer, build_schedule(optimizer, AdamWConfig(learning_rate=1e-2), 4), stream)

    def go_on(state: TrainState, steps: int) -> list[float]:
        losses: list[float] = []
        _, teacher = models_of()
        train(
            state,
            teacher_of(teacher.float(), spec),
            num_steps=steps,
            clip=1.0,
            checkpoints=Checkpoints(tmp_path, keep=9),
            checkpoint_every=2,
            measure=None,
            measure_every=None,
            keep_best=False,
            record=lambda line: losses.append(line["hidden_distance"]),
            report=lambda *_: None,
        )
        return losses

    whole = state_of()
    before = whole.module.hidden["hidden"].projector(0).detach().clone()
    parameters = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in parameters for p in whole.module.hidden.parameters())
    losses = go_on(whole, 4)
    assert not torch.equal(whole.module.hidden["hidden"].projector(0), before)
    again = state_of()
    Checkpoints(tmp_path, keep=9).load(again, tmp_path / "step-00000002")
    assert not torch.equal(again.module.hidden["hidden"].projector(0), before)
    assert go_on(again, 4) == losses[2:]
    for one, other in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_what_is_mapped_is_held():
    _, teacher = models_of()
    spec = spec_of("mse", pairs=((1, 2),))
    told = teacher_of(teacher, spec).forward(build_batch(20, 9, 30))
    assert list(told.hidden.states) == [2]
    assert told.hidden.states[2]._base is None  # and not as a view of all positions
    assert len(list(islice(told.hidden.states.values(), 9))) == 1

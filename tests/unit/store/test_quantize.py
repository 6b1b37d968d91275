"""Quantise: from a selection to the whole numbers that are stored of it, and back to a signal."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.kernels.selection import Selection
from stillroom.signals import Sparse
from stillroom.store.config import HeadAndSample, Sampled, TopK, side_columns
from stillroom.store.quantize import (
    ENTROPY_STEP,
    LABEL_STEP,
    MAX_RESIDUAL_LEVEL,
    MIN_RESIDUAL_LOG_ODDS,
    RESIDUAL_STEP,
    LogProbCodes,
    quantize,
    to_sparse,
)

from .stores import CONFIGS, random_logits, random_uniforms, select

every_kind = pytest.mark.parametrize("kind", CONFIGS)


def stored(logits: torch.Tensor, config, seed: int = 0) -> tuple[Selection, LogProbCodes, float]:
    uniforms = random_uniforms(len(logits), config, seed)
    selection = select(logits, config, uniforms)
    return (selection, *quantize(selection, config, uniforms))


def check_levels(levels: LogProbCodes, n: int, v: int, config) -> None:
    """All that Levels promises, position by position."""
    assert len(levels) == n
    assert levels.side.shape == (n, len(side_columns(config)))
    assert len(levels.ids) == len(levels.levels) == levels.counts.sum()
    assert len(levels.sample_ids) == len(levels.sample_repeats) == levels.sample_counts.sum()
    for values in dataclasses.astuple(levels):
        assert values.dtype == np.int32
        assert values.size == 0 or 0 <= values.min() <= values.max() < 2**24
    entry = draw = 0
    for count, draws in zip(levels.counts, levels.sample_counts, strict=True):
        ids, steps = levels.ids[entry : entry + count], levels.levels[entry : entry + count]
        drawn = levels.sample_ids[draw : draw + draws]
        assert len({*ids.tolist(), *drawn.tolist()}) == count + draws
        assert all(0 <= i < v for i in (*ids, *drawn))
        assert (np.diff(steps) >= 0).all()
        assert (levels.sample_repeats[draw : draw + draws] >= 1).all()
        entry, draw = entry + count, draw + draws


@every_kind
def test_stored_levels_are_what_they_promise(kind):
    config = CONFIGS[kind]
    _, levels, cost = stored(random_logits(60, 40), config)
    check_levels(levels, 60, 40, config)
    assert math.isfinite(cost)
    assert cost >= 0


@every_kind
@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    n=st.integers(0, 4), v=st.integers(1, 20), spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]), seed=st.integers(0, 99)
)
def test_any_shape_is_stored_and_read_back(kind, n, v, spread, seed):
    config = CONFIGS[kind]
    _, levels, cost = stored(random_logits(n, v, seed, spread), config, seed)
    check_levels(levels, n, v, config)
    assert math.isfinite(cost)
    signal = to_sparse(levels, config, v)
    assert signal.vocab_size == v
    check_signal(signal, levels)


def check_signal(signal: Sparse, levels: LogProbCodes) -> None:
    """Ids, numbers of entries, padding."""
    n = len(levels)
    assert signal.ids.shape == signal.log_probs.shape
    assert len(signal) == n
    assert signal.log_probs.dtype == torch.float32
    there = signal.log_probs > -torch.inf
    assert there.sum(1).tolist() == (levels.counts + levels.sample_counts).tolist()
    assert torch.equal(
        torch.where(there, signal.ids[:, :1], signal.ids)[~there], signal.ids[:, :1].expand_as(there)[~there]
    )
    entry = draw = 0
    for i in range(n):
        count, draws = int(levels.counts[i]), int(levels.sample_counts[i])
        wanted = [*levels.ids[entry : entry + count], *levels.sample_ids[draw : draw + draws]]
        assert signal.ids[i][there[i]].tolist() == [int(x) for x in wanted]
        entry, draw = entry + count, draw + draws


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
@pytest.mark.parametrize("step", [0.01, 0.1, 1.0])
def test_truncated_entries_are_read_within_half_a_step_in_their_order(kind, step):
    config = CONFIGS[kind].model_copy(update={"step": step})
    selection, levels, _ = stored(random_logits(50, 80), config)
    signal = to_sparse(levels, config)
    assert not signal.sampled
    there = selection.log_probs > -torch.inf
    width = signal.ids.shape[1]
    assert torch.equal(there[:, :width], signal.log_probs > -torch.inf)
    assert torch.equal(selection.ids[there], signal.ids[there[:, :width]])
    off = (signal.log_probs - selection.log_probs[:, :width])[there[:, :width]].abs()
    assert off.max() <= step / 2 + 1e-5
    falls = signal.log_probs.diff(dim=1)[there[:, 1:width]]
    assert (falls <= 0).all()


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_targets_read_back_sum_to_one_with_their_bucket(kind):
    for spread in (0.5, 3.0, 20.0):
        config = CONFIGS[kind]
        _, levels, _ = stored(random_logits(80, 60, spread=spread), config)
        signal = to_sparse(levels, config)
        for temperature in signal.log_rests:
            targets, rest = signal.log_targets(temperature)
            total = targets.double().exp().sum(1) + rest.double().exp()
            assert ((total - 1).abs() <= 1e-6).all()


def log_odds(log_rest: torch.Tensor) -> torch.Tensor:
    return log_rest.double() - (-log_rest.double().expm1()).log()


def test_the_rest_at_each_temperature_is_read_within_half_its_step():
    config = CONFIGS["top_k"]
    for spread in (1.0, 6.0):
        selection, levels, _ = stored(random_logits(50, 80, spread=spread), config)
        signal = to_sparse(levels, config)
        assert set(signal.log_rests) == {1.0, 2.0}
        for temperature, rest in signal.log_rests.items():
            wanted = log_odds(selection.log_rests[temperature]).clamp(MIN_RESIDUAL_LOG_ODDS, -MIN_RESIDUAL_LOG_ODDS)
            assert ((log_odds(rest) - wanted).abs() <= RESIDUAL_STEP / 2 + 1e-5).all()


@pytest.mark.parametrize("kept", [1e-2, 1e-4, 1e-6, 1e-7])
def test_what_is_kept_is_read_however_little_it_is(kept):
    """At a high temperature nearly all is left out, and what the entries hold there is what a student learns."""
    rests = {1.0: torch.tensor([0.1]).log(), 8.0: torch.tensor([-kept]).double().log1p()}
    selection = Selection(torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.3]]).log(), rests)
    config = TopK(kind="top_k", k=2, temperatures=(8.0,))
    levels, cost = quantize(selection, config, np.zeros((1, 0), np.float32))
    targets, rest = to_sparse(levels, config).log_targets(8.0)
    assert targets.double().exp().sum().item() == pytest.approx(kept, rel=RESIDUAL_STEP / 2 + 1e-4)
    assert -rest.double().expm1().item() == pytest.approx(kept, rel=RESIDUAL_STEP / 2 + 1e-4)
    assert cost < 1e-3


@pytest.mark.parametrize("rest", [1.0, 1 - 1e-7, 0.995, 1e-6, 1e-9, 1e-300])
def test_a_rest_is_not_taken_for_nothing_nor_nothing_for_a_rest(rest):
    """Level 0 means that nothing was left out, and of a position with entries something is kept."""
    config = TopK(kind="top_k", k=1)
    log_rests = {1.0: torch.tensor([math.log(rest), -math.inf], dtype=torch.float64)}
    selection = Selection(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[-2.0], [0.0]]), log_rests)
    levels, _ = quantize(selection, config, np.zeros((2, 0), np.float32))
    assert 1 <= levels.side[0, 0] <= MAX_RESIDUAL_LEVEL
    found = to_sparse(levels, config).log_rests[1.0]
    assert found[0].item() == pytest.approx(math.log(max(rest, 2.0**-24)), abs=0.01)
    assert found[0].item() <= -5e-8
    assert found[1].item() == -math.inf


def test_entropy_and_label_are_read_within_half_their_steps():
    for kind in ("top_k", "sampled"):
        selection, levels, _ = stored(random_logits(50, 80), CONFIGS[kind])
        signal = to_sparse(levels, CONFIGS[kind])
        assert ((signal.label_log_probs - selection.label_log_probs).abs() <= LABEL_STEP / 2 + 1e-5).all()
        if kind == "top_k":
            assert ((signal.entropy - selection.entropy).abs() <= ENTROPY_STEP / 2 + 1e-5).all()
    assert to_sparse(stored(random_logits(5, 80), CONFIGS["top_p"])[1], CONFIGS["top_p"]).label_log_probs is None


@pytest.mark.parametrize("kind", ["sampled", "head_and_sample", "all_head_and_sample"])
def test_the_entropy_of_a_sample_is_that_of_its_entries_with_the_weights_that_are_read(kind):
    """So a student equal to its teacher has a loss of 0 but for the entropy's step, however coarse the weights."""
    logits, config = random_logits(200, 60), CONFIGS[kind]
    signal = to_sparse(stored(logits, config)[1], config)
    logs = logits.double().log_softmax(-1).gather(1, signal.ids)
    wanted = -(signal.log_probs.double().exp() * logs).sum(1)
    assert ((signal.entropy - wanted).abs() <= ENTROPY_STEP + 1e-4).all()


@pytest.mark.parametrize("kind", ["sampled", "head_and_sample", "all_head_and_sample"])
def test_the_entropy_of_a_sample_is_right_on_average(kind):
    """Rounded to the nearest level it would be off by the same for all positions alike, and so would be the loss."""
    config, n = CONFIGS[kind], 20_000
    logits = torch.tensor([[0.4, 0.1]]) if kind == "sampled" else torch.tensor([[6.9, 0.1, 0.0]])
    signal = to_sparse(stored(logits.expand(n, -1), config)[1], config)
    logs = logits.double().log_softmax(-1).expand(n, -1).gather(1, signal.ids)
    off = signal.entropy.double() + (signal.log_probs.double().exp() * logs).sum(1)
    assert off.abs().mean() > ENTROPY_STEP / 50
    assert off.mean().abs() <= 4 * off.std() / n**0.5


def test_side_columns_are_named_in_their_order():
    assert side_columns(CONFIGS["top_k"]) == ["rest@1.0", "rest@2.0", "entropy", "label"]
    assert side_columns(CONFIGS["sampled"]) == ["unit", "entropy", "label"]
    assert side_columns(CONFIGS["head_and_sample"]) == ["unit", "entropy"]


def naive_cost(selection: Selection, signal: Sparse) -> float:
    """Σ t (log t − log t̂) − t + t̂ over kept ids and bucket, in float64, one after another, at the worst temperature."""
    total = 0.0
    for i in range(len(signal)):
        costs = []
        for temperature, log_rests in selection.log_rests.items():
            targets, rests = signal.log_targets(temperature)
            log_rest, log_probs = log_rests[i].item(), [x for x in selection.log_probs[i].tolist() if x > -math.inf]
            scale = (1 - math.exp(log_rest)) / sum(math.exp(x / temperature) for x in log_probs)
            log_ts = [x / temperature + math.log(scale) for x in log_probs] if scale else []
            pairs = [(log_rest, rests[i].item()), *zip(log_ts, targets[i].tolist(), strict=False)]
            there = [(math.exp(t), math.exp(read), t - read) for t, read in pairs if t > -math.inf]
            costs.append(sum(t * gap - t + read for t, read, gap in there))
        total += max(costs)
    return total


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
@pytest.mark.parametrize("step", [0.1, 0.5])
def test_the_cost_of_truncated_signals_is_that_of_the_naive_formula(kind, step):
    config = CONFIGS[kind].model_copy(update={"step": step})
    selection, levels, cost = stored(random_logits(40, 50), config)
    assert cost == pytest.approx(naive_cost(selection, to_sparse(levels, config)), rel=1e-4, abs=1e-7)
    assert cost > 0


def test_the_cost_is_that_of_the_temperature_where_it_is_the_most():
    """A teacher who is sure at T = 1 is not so at T = 8, and a student may learn from both."""
    logits = torch.arange(50).repeat(20, 1) * -7.0 + torch.rand(20, 50, generator=torch.Generator().manual_seed(0))
    config = TopK(kind="top_k", k=6, step=0.5)
    _, _, at_1 = stored(logits, config)
    _, _, at_both = stored(logits, config.model_copy(update={"temperatures": (8.0,)}))
    assert at_both > 2 * at_1


@pytest.mark.parametrize("kind", ["sampled", "head_and_sample", "all_head_and_sample"])
def test_the_cost_of_sampled_signals_is_that_of_the_naive_formula(kind):
    config = CONFIGS[kind]
    selection, levels, cost = stored(random_logits(40, 50), config)
    signal, total = to_sparse(levels, config), 0.0
    for i in range(40):
        count = int(levels.counts[i])
        exact = dict(zip(selection.ids[i].tolist(), selection.log_probs[i].tolist(), strict=True))
        for j in range(count):
            log_t, log_read = exact[int(signal.ids[i, j])], signal.log_probs[i, j].item()
            total += math.exp(log_t) * (log_t - log_read) - math.exp(log_t) + math.exp(log_read)
        times = selection.draws[i][selection.draws[i] >= 0].bincount(minlength=50)
        for j in range(count, count + int(levels.sample_counts[i])):
            drawn = times[signal.ids[i, j]].item()
            log_t = selection.log_unit[i].item()
            log_read = signal.log_probs[i, j].item() - math.log(drawn)
            total += drawn * (math.exp(log_t) * (log_t - log_read) - math.exp(log_t) + math.exp(log_read))
    assert cost == pytest.approx(total, rel=1e-3, abs=1e-5)
    assert (cost > 1e-6) == (kind != "sampled")


@pytest.mark.parametrize("step", [0.05, 0.1, 0.2])
def test_the_cost_is_about_step_squared_over_24(step):
    """Log-probabilities that lie anywhere between two levels are off by step / √12, which costs half its square."""
    config = TopK(kind="top_k", k=100, step=step)
    _, _, cost = stored(random_logits(500, 100, spread=1.5), config)
    assert cost / 500 == pytest.approx(step**2 / 24, rel=0.15)


UNBIASED = {
    "sampled": Sampled(kind="sampled", draws=4),
    "least": HeadAndSample(kind="head_and_sample", head=3, draws=3, step=0.5),
    "coarse": HeadAndSample(kind="head_and_sample", head=3, draws=2, step=1.0, least=0.05),
    "all": HeadAndSample(kind="head_and_sample", head=3, draws=2, step=0.7, least=0.0),
}


@pytest.mark.parametrize("kind", UNBIASED)
@pytest.mark.parametrize("spread", [0.7, 2.5])
def test_unbiased_after_quantising(kind, spread):
    """The mean of what is read back is within four standard errors of the teacher, for every token."""
    config, n, v = UNBIASED[kind], 40_000, 17
    logits = random_logits(1, v, seed=3, spread=spread)
    uniforms = random_uniforms(n, config, seed=9)
    levels, _ = quantize(select(logits.expand(n, -1), config, uniforms), config, uniforms)
    signal = to_sparse(levels, config)
    assert signal.sampled
    weights = torch.zeros(n, v, dtype=torch.float64)
    weights.scatter_add_(1, signal.ids, signal.log_probs.double().exp())
    wanted = logits.double().softmax(-1)[0]
    error = weights.std(0) / n**0.5
    assert ((weights.mean(0) - wanted).abs() <= 4 * error + 1e-6).all()
    assert (error > 0).all()


def test_positions_without_any_draw_are_stored_and_read():
    config = HeadAndSample(kind="head_and_sample", head=2, draws=3)
    logits = torch.full((4, 6), -math.inf)
    logits[:, 2] = 0.0
    selection, levels, _ = stored(logits, config)
    assert (selection.draws == -1).all()
    assert levels.sample_counts.tolist() == [0] * 4
    assert levels.counts.tolist() == [1] * 4
    signal = to_sparse(levels, config)
    assert signal.ids.tolist() == [[2]] * 4
    assert signal.log_probs.tolist() == [[0.0]] * 4


def test_repeated_draws_become_one_entry_with_their_number():
    draws = torch.tensor([[4, 1, 4, 4, -1], [-1, -1, -1, -1, -1], [0, 0, 0, 0, 0]])
    none = torch.zeros(3, 0)
    selection = Selection(
        none.long(), none, draws=draws, draw_log_probs=torch.zeros(3, 5), log_unit=torch.full((3,), -math.log(5))
    )
    config = Sampled(kind="sampled", draws=5)
    levels, _ = quantize(selection, config, np.zeros((3, 6), np.float32))
    assert levels.sample_counts.tolist() == [2, 0, 1]
    assert levels.sample_ids.tolist() == [1, 4, 0]
    assert levels.sample_repeats.tolist() == [1, 3, 5]
    signal = to_sparse(levels, config)
    torch.testing.assert_close(signal.log_probs.exp(), torch.tensor([[0.2, 0.6], [0.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("draws", [1, 8])
@pytest.mark.parametrize("least", [0.0, 0.002])
def test_a_head_wider_than_the_vocabulary(draws, least):
    config = HeadAndSample(kind="head_and_sample", head=12, draws=draws, least=least)
    _, levels, _ = stored(random_logits(5, 6, spread=1.0), config)
    check_levels(levels, 5, 6, config)


@pytest.mark.parametrize("log_prob", [0.0, -1e-9, -50.0, -103.0, -1000.0, -1e4])
def test_extreme_log_probabilities_are_read_as_they_were(log_prob):
    config = TopK(kind="top_k", k=2)
    rests = {1.0: torch.tensor([-math.inf])}
    selection = Selection(torch.tensor([[3, 1]]), torch.tensor([[0.0, log_prob]]), rests)
    levels, cost = quantize(selection, config, np.zeros((1, 0), np.float32))
    signal = to_sparse(levels, config)
    assert signal.log_probs[0, 1].item() == pytest.approx(log_prob, rel=1e-6, abs=0.05)
    assert math.isfinite(cost)


@pytest.mark.parametrize("step", [1e-9, 1e-6, 1e-5, 1e-3])
def test_a_fine_step_is_refused_or_right(step):
    """However fine the grid, a log-probability of −20 is not read as another."""
    try:
        config = TopK(kind="top_k", k=2, step=step)
    except ValueError:
        return
    selection = Selection(torch.tensor([[3, 1]]), torch.tensor([[0.0, -20.0]]), {1.0: torch.tensor([-math.inf])})
    levels, _ = quantize(selection, config, np.zeros((1, 0), np.float32))
    assert to_sparse(levels, config).log_probs[0, 1].item() == pytest.approx(-20.0, abs=0.05)


def test_a_label_that_cannot_be_is_stored_as_very_unlikely():
    config = TopK(kind="top_k", k=1, label=True)
    selection = Selection(
        torch.tensor([[3]]),
        torch.zeros(1, 1),
        {1.0: torch.tensor([-math.inf])},
        label_log_probs=torch.tensor([-math.inf]),
    )
    levels, _ = quantize(selection, config, np.zeros((1, 0), np.float32))
    label = to_sparse(levels, config).label_log_probs.item()
    assert math.isfinite(label)
    assert label < -1000


@every_kind
def test_a_document_by_itself_is_what_it_is_among_others(kind):
    config = CONFIGS[kind]
    uniforms = random_uniforms(9, config)
    logits = random_logits(9, 30)
    together, _ = quantize(select(logits, config, uniforms), config, uniforms)
    parts = [
        quantize(select(logits[rows], config, uniforms[rows]), config, uniforms[rows])[0]
        for rows in (slice(0, 2), slice(2, 2), slice(2, 9))
    ]
    joined = LogProbCodes.concatenate(parts)
    for name in LogProbCodes.__dataclass_fields__:
        assert np.array_equal(getattr(joined, name), getattr(together, name))
        assert np.array_equal(getattr(together.slice(2, 9), name), getattr(parts[2], name))

"""Selection: which entries of the teacher's distribution are kept, held against float64 and their own promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.kernels import selection as module
from stillroom.kernels.selection import (
    Selection,
    entropy,
    head_and_sample,
    sampled,
    subtracted_rests,
    top_indices,
    top_k,
    top_p,
)

NUM_DRAWS = 100_000


def random_logits(n: int, v: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


def reference(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax in float64."""
    return (logits.double() / temperature).log_softmax(-1)


def log_left_out(logits: torch.Tensor, selection: Selection, temperature: float = 1.0) -> torch.Tensor:
    """log of the mass beyond the exact entries, summed over it, in float64."""
    logs = reference(logits, temperature)
    for i in range(len(logs)):
        logs[i, selection.ids[i][selection.log_probs[i] > -torch.inf]] = -torch.inf
    return logs.logsumexp(-1)


@pytest.mark.parametrize("v", [1, 2, 3, 7, 64, 100, 1000, 1024, 4096, 5003, 16384])
@pytest.mark.parametrize("k", [1, 2, 5, 16, 50])
def test_likeliest_is_topk(v, k):
    values = random_logits(4, v, seed=v + k)
    found, ids = top_indices(values, k)
    wanted = values.topk(min(k, v))
    assert torch.equal(found, wanted.values)
    assert torch.equal(ids, wanted.indices)


@pytest.mark.parametrize("v", [50, 4096])
def test_likeliest_of_ties_gives_distinct_columns_with_the_right_values(v):
    values = torch.randint(0, 4, (20, v), generator=torch.Generator().manual_seed(0)).float()
    values[0] = 1.0
    values[1] = -torch.inf
    values[1, v - 1] = 0.0
    found, ids = top_indices(values, 9)
    assert torch.equal(found, values.topk(9).values)
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(set(row)) == 9 for row in ids.tolist())


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(v=st.integers(1, 600), k=st.integers(1, 30), levels=st.integers(1, 1000), seed=st.integers(0, 100))
def test_likeliest_is_topk_at_any_size(v, k, levels, seed):
    values = torch.randint(0, levels, (3, v), generator=torch.Generator().manual_seed(seed)).float()
    found, ids = top_indices(values, k)
    assert torch.equal(found, values.topk(min(k, v)).values)
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(set(row)) == min(k, v) for row in ids.tolist())


sizes = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 300, 1000, 4097])


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(v=sizes, head=st.integers(1, 20), draws=st.integers(1, 9), least=st.sampled_from([0.0, 0.002, 0.05]),
       spread=st.sampled_from([0.0, 0.1, 4.0, 20.0]), seed=st.integers(0, 100), threads=st.integers(1, 3))  # fmt: skip
def test_the_kernel_does_what_the_tensors_do(v, head, draws, least, spread, seed, threads):
    """float64 takes the tensor form. Equal entries have no order of their own, and a point at a border falls here or
    there by rounding, to the column beside."""
    logits = random_logits(7, v, seed, spread)
    uniforms = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    wanted = head_and_sample(logits.double(), head, draws, least, uniforms.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = head_and_sample(logits.clone(), head, draws, least, uniforms)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.log_probs.double(), wanted.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_rests[1.0].double().exp(), wanted.log_rests[1.0].exp(), rtol=1e-4, atol=1e-6)
    there = wanted.log_rests[1.0] > math.log(1e-6)
    torch.testing.assert_close(found.log_unit[there].double(), wanted.log_unit[there], rtol=1e-4, atol=1e-3)
    if spread:
        real = wanted.log_probs > -torch.inf
        assert torch.equal(found.ids[real], wanted.ids[real])
        differ = ((found.draws != wanted.draws) & there.unsqueeze(1)).sum()
        assert differ <= 1 + 0.02 * found.draws.numel()


def test_the_kernel_takes_the_largest_of_columns_of_any_number():
    for v in (1, 63, 64, 65, 1000, 151_665):
        values = random_logits(3, v) - 10
        values[1] = -torch.inf
        values[2, v // 2] = -torch.inf
        for k in (1, 5, 60):
            found, ids = top_indices(values, k)
            assert torch.equal(found, values.topk(min(k, v)).values)
            assert torch.equal(values.gather(1, ids), found)
            assert all(len(set(row)) == min(k, v) for row in ids.tolist())


@pytest.mark.parametrize("v", [50, 4096, 5003])
def test_likeliest_by_tensors_is_topk(v, monkeypatch):
    monkeypatch.setattr(module, "_on_cpu", lambda _: False)
    for k in (1, 5, 16, 50):
        values = random_logits(4, v, seed=k)
        found, ids = top_indices(values, k)
        assert torch.equal(found, values.topk(k).values)
        assert torch.equal(values.gather(1, ids), found)


@pytest.mark.parametrize("v", [5, 100, 4096])
def test_top_k_keeps_the_likeliest_and_knows_what_it_left(v):
    logits = random_logits(6, v)
    selection = top_k(logits.clone(), 8, (1.0, 2.0, 0.5))
    logs = reference(logits)
    wanted = logs.topk(min(8, v))
    assert torch.equal(selection.ids, wanted.indices)
    torch.testing.assert_close(selection.log_probs.double(), wanted.values, rtol=1e-6, atol=1e-6)
    assert set(selection.log_rests) == {1.0, 2.0, 0.5}
    for temperature, found in selection.log_rests.items():
        torch.testing.assert_close(found.double(), log_left_out(logits, selection, temperature), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mass", [1e-4, 1e-8, 1e-12, 1e-20, 1e-30])
def test_the_mass_left_out_is_right_however_small(mass):
    """1 − Σ kept would be rounding noise, or 0."""
    v = 1024
    spread = torch.rand(5, v, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread[:, :4] = 0
    probabilities = mass * spread / spread.sum(-1, keepdim=True)
    probabilities[:, :4] = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    logits = probabilities.log().float()
    for selection in (top_k(logits.clone(), 4, (1.0, 2.0)), top_p(logits.clone(), 0.999999, 4, (1.0, 2.0))):
        for temperature, found in selection.log_rests.items():
            wanted = log_left_out(logits, selection, temperature)
            assert ((found.double() - wanted).abs() <= 1e-5).all()
            assert found.isfinite().all()


def test_the_mass_that_is_kept_is_right_however_small():
    """At a high temperature nearly all is left out: log(mass left out) is as near 0 as the kept mass is."""
    logits = random_logits(5, 4096) * 0.01 + 30
    for temperature, found in top_k(logits.clone(), 1, (1.0, 8.0, 100.0)).log_rests.items():
        kept = (logits.double() / temperature).softmax(-1).amax(-1)
        torch.testing.assert_close(-found.double().expm1(), kept, rtol=1e-5, atol=0)


def test_nothing_is_left_out_where_all_are_kept():
    for found in (
        top_k(random_logits(3, 6), 6),
        top_k(random_logits(3, 6), 50),
        top_p(random_logits(3, 6), 0.9999999, 6),
    ):
        assert found.log_rests[1.0].tolist() == [-math.inf] * 3
        assert found.ids.shape == (3, 6)


def test_impossible_columns_are_no_entries():
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf, -math.inf]])
    for found in (top_k(logits.clone(), 4), top_p(logits.clone(), 0.99, 4)):
        assert found.ids[0, :2].tolist() == [2, 0]
        assert (found.log_probs[0] > -math.inf).tolist() == [True, True, False, False]
        assert found.log_rests[1.0].item() == -math.inf


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("most", [1, 7, 40])
def test_top_p_keeps_the_fewest_that_hold_the_mass(mass, most):
    logits = random_logits(20, 300)
    selection = top_p(logits.clone(), mass, most, (1.0, 2.0))
    logs = reference(logits)
    for i in range(20):
        probabilities = logs[i].exp().sort(descending=True).values
        held = probabilities.cumsum(0)
        wanted = min(most, int((held < mass).sum()) + 1)
        there = selection.log_probs[i] > -math.inf
        assert there.tolist() == [j < wanted for j in range(selection.ids.shape[1])]
        assert selection.ids[i, :wanted].tolist() == logs[i].topk(wanted).indices.tolist()
    there = selection.log_probs > -math.inf
    wanted = logs.gather(1, selection.ids)[there]
    torch.testing.assert_close(selection.log_probs[there].double(), wanted, rtol=1e-6, atol=1e-6)
    for temperature, found in selection.log_rests.items():
        torch.testing.assert_close(found.double(), log_left_out(logits, selection, temperature), rtol=1e-6, atol=1e-5)


SHAPES = {
    "spread": random_logits(1, 60, spread=1.5),
    "confident": torch.cat([torch.tensor([[12.0]]), random_logits(1, 40)], 1),
    "uniform": torch.zeros(1, 33),
    "two": torch.tensor([[0.0, 1.0]]),
    "one": torch.tensor([[3.0]]),
    "impossible": random_logits(1, 20).masked_fill(torch.arange(20) % 3 == 0, -math.inf),
    "blocks": random_logits(1, 256, seed=5, spread=2.0),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def weights(selection: Selection, v: int) -> torch.Tensor:
    """What each column weighs in each selection, float64 [n, v]."""
    out = torch.zeros(len(selection.ids), v, dtype=torch.float64)
    out.scatter_add_(1, selection.ids, selection.log_probs.double().exp())
    there = selection.draws >= 0
    unit = selection.log_unit.double().exp().unsqueeze(1) * there
    return out.scatter_add_(1, selection.draws.clamp(min=0), unit)


def check_unbiased(selection: Selection, logits: torch.Tensor) -> None:
    """The mean weight of every id within four standard errors of its probability."""
    p = reference(logits)[0].exp()
    mean = weights(selection, logits.shape[1]).mean(0)
    error = (p * selection.log_unit.double().exp().max() / len(selection.ids)).sqrt()
    assert ((mean - p).abs() <= 4 * error + 1e-6 * p).all()
    assert (mean[p == 0] == 0).all()


@every_shape
@pytest.mark.parametrize("least", [0.0, 0.002, 0.05])
def test_head_and_sample_is_unbiased(shape, least):
    logits = SHAPES[shape]
    uniforms = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(7))
    check_unbiased(head_and_sample(logits.repeat(NUM_DRAWS, 1), 4, 3, least, uniforms), logits)


@every_shape
def test_sampled_is_unbiased(shape):
    logits = SHAPES[shape]
    uniforms = torch.rand(NUM_DRAWS // 4, 4, generator=torch.Generator().manual_seed(8))
    selection = sampled(logits.repeat(len(uniforms), 1), uniforms)
    assert (selection.draws >= 0).all()
    assert selection.draws.max() < logits.shape[1]
    assert selection.ids.shape[1] == 0
    torch.testing.assert_close(selection.log_unit, torch.full_like(selection.log_unit, -math.log(4)))
    check_unbiased(selection, logits)


@every_shape
@pytest.mark.parametrize("least", [0.0, 0.002, 0.05])
@pytest.mark.parametrize("draws", [1, 8])
def test_draws_are_systematic(shape, least, draws):
    """Over evenly spaced uniform numbers the mean is the probability itself, not only near it.

    Each id is drawn p / unit times but for less than one, and all together rest / unit times; none is of the head, and
    none is impossible.
    """
    logits, n = SHAPES[shape], 20_000
    v = logits.shape[1]
    uniforms = ((torch.arange(n).double() + 0.5) / n).float()
    selection = head_and_sample(logits.repeat(n, 1), 4, draws, least, uniforms)
    p = reference(logits)[0].exp()
    head = selection.ids[0][selection.log_probs[0] > -math.inf]
    wanted_head = [
        i for j, i in enumerate(p.topk(min(4, v)).indices.tolist()) if j == 0 or (p[i] >= least and p[i] > 0)
    ]
    if shape != "uniform":
        assert head.tolist() == wanted_head
    assert len(head) == len(wanted_head)
    tail = p.clone()
    tail[head] = 0
    rest = tail.sum().item()
    unit = selection.log_unit.double().exp()
    assert unit.unique().numel() == 1
    unit = unit[0].item()
    if rest > 1e-30:
        assert unit == pytest.approx(max(least, rest / draws), rel=1e-5)

    times = torch.zeros(n, v).scatter_add_(1, selection.draws.clamp(min=0), (selection.draws >= 0).float())
    number, exact = times.sum(1), rest / unit
    slack = 1e-4 * (exact + 1)
    assert number.min() >= math.floor(exact - slack)
    assert number.max() <= math.ceil(exact + slack)
    assert (times[:, head] == 0).all()
    assert (times[:, p == 0] == 0).all()
    assert ((times - tail / unit).abs() < 1 + 1e-4).all()
    assert ((times.double().mean(0) - tail / unit).abs() <= 3 / n + 1e-5).all()


@pytest.mark.parametrize("v", [1, 5, 64, 100])
@pytest.mark.parametrize("column", [0, -1])
@pytest.mark.parametrize("least", [0.0, 0.002])
def test_a_distribution_on_one_column_has_no_tail(v, column, least):
    logits = torch.full((3, v), -math.inf)
    logits[:, column] = 2.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-24])
    selection = head_and_sample(logits.clone(), 4, 8, least, uniforms)
    assert (selection.draws == -1).all()
    assert selection.ids[:, 0].tolist() == [column % v] * 3
    assert selection.log_probs[:, 0].tolist() == [0.0] * 3
    assert (selection.log_probs[:, 1:] == -math.inf).all()
    assert selection.log_unit.isfinite().all()
    assert entropy(logits).tolist() == [0.0] * 3
    drawn = sampled(logits.clone(), uniforms.unsqueeze(0).expand(3, -1))
    assert (drawn.draws == column % v).all()


@every_shape
def test_the_ends_of_the_uniform_interval_draw_what_is_possible(shape):
    logits = SHAPES[shape]
    possible = (logits[0] > -math.inf).nonzero().flatten()
    uniforms = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-23, 2**-24, 1e-38])
    draws = sampled(logits.repeat(1, 1), uniforms.unsqueeze(0)).draws[0]
    p = reference(logits)[0].exp()
    assert draws[0] == possible[0]
    assert (p[draws] > 0).all()
    assert p[draws[1] + 1 :].sum() <= 1e-6
    for least in (0.0, 0.002):
        selection = head_and_sample(logits.repeat(5, 1), 2, 5, least, uniforms)
        there = selection.draws >= 0
        assert (selection.draws < logits.shape[1]).all()
        assert (p[selection.draws[there]] > 0).all()


@pytest.mark.parametrize("least", [0.0, 0.002, 0.05])
def test_the_likeliest_is_kept_exactly_however_unlikely(least):
    selection = head_and_sample(torch.zeros(1, 1000), 4, 8, least, torch.tensor([0.3]))
    assert (selection.log_probs[0] > -math.inf).sum() == (4 if least == 0 else 1)
    assert selection.log_probs[0, 0].item() == pytest.approx(-math.log(1000), abs=1e-5)


@every_shape
def test_entropy_is_that_of_the_whole_distribution(shape):
    logits = SHAPES[shape]
    wanted = torch.special.entr(reference(logits).exp()).sum().item()
    for shift in (0, 500):
        assert entropy(logits + shift).item() == pytest.approx(wanted, abs=2e-4)
        assert entropy(logits + shift).item() >= 0


@every_shape
def test_drawn_ids_come_with_their_own_log_probabilities(shape):
    logits, uniforms = SHAPES[shape].expand(50, -1), torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    for selection in (
        sampled(logits.clone(), uniforms),
        head_and_sample(logits.clone(), 2, 6, 0.0, uniforms[:, 0]),
        head_and_sample(logits.clone(), 2, 6, 0.01, uniforms[:, 0]),
    ):
        there = selection.draws >= 0
        wanted = reference(logits).gather(1, selection.draws.clamp(min=0))
        torch.testing.assert_close(selection.draw_log_probs[there].double(), wanted[there], rtol=1e-5, atol=1e-5)
        assert (selection.draw_log_probs[~there] == 0).all()


def test_exact_entries_of_the_head_are_right():
    logits = random_logits(30, 500)
    selection = head_and_sample(logits.clone(), 12, 8, 0.0, torch.full((30,), 0.5))
    wanted = reference(logits).topk(12)
    assert torch.equal(selection.ids, wanted.indices)
    torch.testing.assert_close(selection.log_probs.double(), wanted.values, rtol=1e-5, atol=1e-5)


def test_rows_do_not_touch_each_other():
    """A row by itself is what it is among others."""
    logits, uniforms = random_logits(9, 130), torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
    together = [
        top_k(logits.clone(), 5),
        top_p(logits.clone(), 0.9, 5),
        sampled(logits.clone(), uniforms),
        head_and_sample(logits.clone(), 4, 5, 0.002, uniforms[:, 0]),
    ]
    for i in range(9):
        row, u = logits[i : i + 1], uniforms[i : i + 1]
        alone = [
            top_k(row.clone(), 5),
            top_p(row.clone(), 0.9, 5),
            sampled(row.clone(), u),
            head_and_sample(row.clone(), 4, 5, 0.002, u[:, 0]),
        ]
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.ids[0], b.ids[i])
            assert (a.draws is None) == (b.draws is None)
            if a.draws is not None and b.draws is not None:
                assert torch.equal(a.draws[0], b.draws[i])


@pytest.mark.parametrize("v", [1, 5, 64])
def test_no_positions_give_an_empty_selection(v):
    """A document of which nothing is learned."""
    logits = torch.zeros(0, v)
    for selection in (
        top_k(logits.clone(), 3, (1.0, 2.0)),
        top_p(logits.clone(), 0.9, 3),
        sampled(logits.clone(), torch.zeros(0, 4)),
        head_and_sample(logits.clone(), 3, 4, 0.002, torch.zeros(0)),
    ):
        assert len(selection.ids) == len(selection.log_probs) == 0
        assert all(len(rest) == 0 for rest in selection.log_rests.values())


def test_a_subtracted_rest_is_the_mass_left_out_but_never_less_than_the_noise_of_float32():
    logits = random_logits(4, 50, spread=2.0)
    logits[2:, 3] += 25  # beyond which float32 tells no mass
    kept, ids = reference(logits).float().topk(5)
    exact = reference(logits).scatter(1, ids, -torch.inf).logsumexp(-1)
    found = subtracted_rests(kept, 50)
    torch.testing.assert_close(found[:2], exact[:2], rtol=0, atol=1e-5)
    assert (exact[2:] < -18).all()
    assert found[2:].tolist() == [math.log(5 * 2**-24)] * 2
    assert subtracted_rests(kept, 5).tolist() == [-math.inf] * 4
    kept[:, 3:] = -torch.inf
    assert subtracted_rests(kept, 50)[2].item() == pytest.approx(math.log(3 * 2**-24))


def test_none_at_all_can_be_asked_for():
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(0))
    assert top_indices(logits, 0)[1].shape == (40, 0)

"""What is measured equals naive loops in float64, and the layers that are chosen are those of brute force."""

import itertools

import pytest
import torch
from torch.nn import functional

from conftest import build_documents, build_model
from stillroom.errors import NonFiniteError
from stillroom.pruning.config import BestLayers, PruningConfig, Width
from stillroom.pruning.importance import activations, block_influence, loss_nats, only, text_batches
from stillroom.pruning.plan import describe, plan_pruning
from stillroom.pruning.prune import choose_mask, prune_model

DOCUMENTS = build_documents([20, 9, 30, 4, 33, 12, 27], seed=3)
BATCHES = list(text_batches(DOCUMENTS, length=32, pack=True, batch_tokens=64))
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def alone(number: int) -> torch.Tensor:
    """What the model reads of one document."""
    return torch.from_numpy(DOCUMENTS.tokens(number).copy()).long()[None, :-1]


@torch.no_grad()
def naive_states(model) -> list[torch.Tensor]:
    """What enters each layer, and last what leaves the last, over all positions of all documents, float64."""
    taken: dict[int, list[torch.Tensor]] = {n: [] for n in range(5)}

    def take(number: int):
        def hook(_, args, out) -> None:
            taken[number].append(args[0][0])
            if number == 3:
                taken[4].append(out[0])

        return hook

    handles = [layer.register_forward_hook(take(n)) for n, layer in enumerate(model.model.layers)]
    for number in range(len(DOCUMENTS)):
        model(input_ids=alone(number), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(taken[n]).double() for n in range(5)]


@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_block_influence(family, span):
    model = build_model(family, **SHAPE)
    states = naive_states(model)
    wanted = [
        (1 - functional.cosine_similarity(states[n], states[n + span], dim=-1)).mean().item() for n in range(5 - span)
    ]
    assert block_influence(model, BATCHES, span) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_activations(family):
    model = build_model(family, head_dim=4, **SHAPE)
    used = activations(model, describe(model.config), BATCHES)
    names = ["input_layernorm", "post_attention_layernorm" if family == "llama" else "pre_feedforward_layernorm"]
    norms = [getattr(layer, name) for layer in model.model.layers for name in names] + [model.model.norm]
    heads = [layer.self_attn.o_proj for layer in model.model.layers]
    mlp = [layer.mlp.down_proj for layer in model.model.layers]
    squares: dict[torch.nn.Module, torch.Tensor | float] = {}
    current: dict[torch.nn.Module, torch.Tensor] = {}
    for module in (*norms, *heads, *mlp):
        module.register_forward_hook(lambda m, args, out: current.update({m: (out if m in norms else args[0])[0]}))
    for number in range(len(DOCUMENTS)):
        with torch.no_grad():
            model(input_ids=alone(number), use_cache=False)
        for module, values in current.items():
            size = values.double().abs()
            if module in heads:
                size = torch.stack([size[:, 4 * h : 4 * h + 4].square().sum(-1).sqrt() for h in range(4)], -1)
            squares[module] = squares.get(module, 0) + size.mean(0).square()
    hidden = sum(squares[m].sqrt() for m in norms)
    torch.testing.assert_close(used.hidden, hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(used.heads, torch.stack([squares[m].sqrt() for m in heads]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(used.mlp, torch.stack([squares[m].sqrt() for m in mlp]), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def naive_loss(model) -> float:
    total, number = 0.0, 0
    for document in range(len(DOCUMENTS)):
        loss_mask = torch.from_numpy(DOCUMENTS.target_mask(document))[1:]
        targets = torch.from_numpy(DOCUMENTS.tokens(document).copy()).long()[1:]
        logits = model(input_ids=alone(document), use_cache=False).logits[0].double()
        total += functional.cross_entropy(logits[loss_mask], targets[loss_mask], reduction="sum").item()
        number += int(loss_mask.sum())
    return total / number


def test_the_loss_is_the_mean_over_the_kept_positions():
    model = build_model("gemma2", **SHAPE)
    loss, number = loss_nats(model, BATCHES)
    assert loss == pytest.approx(naive_loss(model), rel=1e-5)
    assert number == sum(batch.num_kept for batch in BATCHES)


@pytest.fixture(scope="module")
def brute() -> tuple:
    """A model, and the naive loss with each set of its layers."""
    model = build_model("qwen3", **SHAPE)
    losses = {}
    for count in range(1, 5):
        for layers in itertools.combinations(range(4), count):
            with only(model, layers):
                losses[layers] = naive_loss(model)
    return model, losses


def best(model, **settings) -> tuple:
    plan = plan_pruning(PruningConfig(layers=BestLayers(kind="best", **settings)), model.config)
    cut = choose_mask(plan, model, BATCHES, teacher="it")
    return cut.layers, cut.scores["layers"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_layers_by_loss_are_dropped_one_by_one(brute, count):
    model, losses = brute
    left, dropped, values = (0, 1, 2, 3), [], {}
    while len(left) > count:
        tried = {layer: losses[tuple(n for n in left if n != layer)] - losses[0, 1, 2, 3] for layer in left}
        values |= tried
        dropped.append(min(tried, key=tried.__getitem__))
        left = tuple(n for n in left if n != dropped[-1])
    layers, scores = best(model, count=count, by="loss_increase")
    assert (layers, scores["dropped"]) == (left, dropped)
    assert scores["values"] == pytest.approx([values[n] for n in range(4)], abs=1e-4)
    assert scores["loss_nats"] == pytest.approx(losses[0, 1, 2, 3], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_stretch_that_costs_least_is_dropped(brute, count):
    model, losses = brute
    span = 4 - count
    tried = [losses[tuple(n for n in range(4) if not first <= n < first + span)] for first in range(count + 1)]
    first = tried.index(min(tried))
    layers, scores = best(model, count=count, by="loss_increase", contiguous=True)
    assert layers == tuple(n for n in range(4) if not first <= n < first + span)
    assert scores["values"] == pytest.approx([loss - losses[0, 1, 2, 3] for loss in tried], abs=1e-4)


def test_layers_by_block_influence(brute):
    model, _ = brute
    values = block_influence(model, BATCHES)
    layers, scores = best(model, count=2)
    assert layers == tuple(sorted(sorted(range(4), key=values.__getitem__)[2:]))
    assert scores["values"] == values
    stretches = block_influence(model, BATCHES, 2)
    first = stretches.index(min(stretches))
    layers, scores = best(model, count=2, contiguous=True)
    assert layers == tuple(n for n in range(4) if n not in (first, first + 1))
    assert scores["values"] == stretches


def test_widths_are_measured_while_the_kept_layers_alone_run():
    model = build_model("llama", **SHAPE)
    width = Width(hidden_size=12, num_attention_heads=2, intermediate_size=10)
    both = plan_pruning(PruningConfig(layers=(0, 2), width=width), model.config)
    cut = choose_mask(both, model, BATCHES, teacher="it")
    depth = plan_pruning(PruningConfig(layers=(0, 2)), model.config)
    shallow = prune_model(model, choose_mask(depth, model, (), teacher="it"), depth)
    then = choose_mask(plan_pruning(PruningConfig(width=width), shallow.config), shallow, BATCHES, teacher="it")
    assert (cut.channels, cut.groups, cut.mlp, cut.scores) == (then.channels, then.groups, then.mlp, then.scores)


@pytest.mark.parametrize("rule", [{"by": "block_influence"}, {"by": "loss_increase"}])
def test_a_model_whose_states_are_not_numbers_is_refused(rule):
    model = build_model("llama", **SHAPE)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="is not finite"):
        best(model, count=2, **rule)
    plan = plan_pruning(PruningConfig(width=Width(hidden_size=12)), model.config)
    with pytest.raises(NonFiniteError, match="importance of hidden"):
        choose_mask(plan, model, BATCHES, teacher="it")


def test_batches_hold_the_first_documents_and_no_more_than_asked():
    (batch,) = text_batches(DOCUMENTS, number=3, length=32, pack=True, batch_tokens=256)
    assert set(batch.documents.unique().tolist()) - {-1} == {0, 1, 2}
    assert all(b.tokens.numel() <= 64 for b in BATCHES)

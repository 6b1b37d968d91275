"""Cut: what of a bigger model was kept, how it is chosen, and the smaller model itself."""

import copy
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stillroom.batch import Batch
from stillroom.errors import DataError, MismatchError
from stillroom.layers import evenly
from stillroom.pruning.config import BestLayers, LayerList
from stillroom.pruning.importance import Say, activations, best_layers, only
from stillroom.pruning.plan import Axis, PruningPlan, described, head_dim, pruned_config, widths_of
from stillroom.recipe import plain

CUT_FILE = "cut.json"
"""Lies beside the config.json of a model that was cut out of another."""

FORMAT = 1

Indices = tuple[int, ...]


PerLayer = Annotated[tuple[LayerList, ...], Field(strict=False, min_length=1)]
"""As many numbers of each kept layer, from 0 and rising."""


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class PruneMask:
    """The parts that were kept, by the numbers that they had in the bigger model, from 0 and rising."""

    layers: LayerList
    channels: LayerList | None
    """Hidden channels; None where all were kept."""
    groups: PerLayer | None
    """Key and value heads of each kept layer; None where all were kept."""
    heads: PerLayer | None
    """Query heads of each kept layer; None where all were kept."""
    mlp: PerLayer | None
    """MLP channels of each kept layer; None where all were kept."""
    scores: dict[str, Any]
    """The measured numbers by which it was chosen, as JSON values."""
    teacher: str
    """The fingerprint of the bigger model."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **plain(asdict(self))}

    @classmethod
    def from_json(cls, values: Any, where: str = CUT_FILE) -> "PruneMask":
        """Returns what ``to_json`` was made of. Raises DataError where it is something else."""
        version = values.get("format") if isinstance(values, dict) else type(values).__name__
        if version != FORMAT or isinstance(version, bool):
            raise _damaged(where, f"format {FORMAT}", f"format {version!r}")
        try:
            cut = cls(**{key: values[key] for key in values if key != "format"})
        except ValidationError as error:
            first = error.errors()[0]
            found = f"{first['msg']}: {first['input']!r:.60}"
            raise _damaged(where, f"{'.'.join(map(str, first['loc']))} as a cut has it", found) from None
        for name in ("groups", "heads", "mlp"):
            sizes = [len(of_layer) for of_layer in getattr(cut, name) or ()]
            if sizes and (len(sizes) != len(cut.layers) or len(set(sizes)) != 1):
                raise _damaged(where, f"{name}: as many in each of {len(cut.layers)} layers", str(sizes)[:60])
        return cut


def _damaged(where: str, expected: str, found: str) -> DataError:
    return DataError(
        f"{where} does not tell what was kept of a model",
        {"expected": expected, "found": found},
        why="Nobody can tell which layer of the teacher each of the model's layers was.",
        fix="Restore the file, or cut the model again; without the file it is an ordinary model.",
    )


# --- its file --------------------------------------------------------------------------------------------------------
def write_mask(folder: Path, cut: PruneMask) -> None:
    """Writes cut.json into a model's folder, which is not yet under its name."""
    (folder / CUT_FILE).write_text(json.dumps(cut.to_json()) + "\n", encoding="utf-8")


def read_mask(folder: str | Path) -> PruneMask | None:
    """Returns what a model's folder says of how it was cut out of another; None where it says nothing. Raises
    DataError where its cut.json is damaged."""
    path = Path(folder) / CUT_FILE
    if not path.is_file():
        return None

    def refuse(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        values = json.loads(path.read_bytes(), parse_constant=refuse)  # noqa: TID251
    except (ValueError, RecursionError) as error:
        raise _damaged(str(path), "JSON", f"{type(error).__name__}: {error}"[:100]) from None
    return PruneMask.from_json(values, str(path))


# --- choosing --------------------------------------------------------------------------------------------------------
def choose_mask(
    plan: PruningPlan,
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    teacher: str,
    say: Say = lambda _: None,
) -> PruneMask:
    """Measures what a plan leaves open, and chooses what is kept.

    Widths are measured while the kept layers alone run.

    Args:
        batches: the text; none is needed where ``plan.measured`` is False.
        teacher: the model's fingerprint.
        say: is told what was found, step by step.

    Raises NonFiniteError where what is measured is infinite or not a number.
    """
    scores: dict[str, Any] = {}
    layers = plan.layers
    if layers is None:
        assert isinstance(plan.cut.layers, BestLayers)
        layers, scores["layers"] = best_layers(plan.cut.layers, model, batches, say)
    before, after = widths_of(plan.teacher), widths_of(plan.config)
    channels, groups, heads, mlp = None, None, None, None
    if before != after:
        every_layer = len(layers) == plan.teacher.num_hidden_layers
        with nullcontext() if every_layer else only(model, layers):
            used = activations(model, plan.family, batches)
        say("measured heads and channels")
        if after.hidden_size < before.hidden_size:
            channels = _largest(used.hidden, after.hidden_size)
            scores["channels"] = {"kept_share": _share(used.hidden, channels), "values": used.hidden.tolist()}
        if after.num_attention_heads < before.num_attention_heads:
            groups, heads = zip(*(_kept_heads(values, plan) for values in used.heads), strict=True)
            scores["heads"] = {"kept_share": _shares(used.heads, heads), "values": used.heads.tolist()}
        if after.intermediate_size < before.intermediate_size:
            mlp = tuple(_largest(values, after.intermediate_size) for values in used.mlp)
            scores["mlp"] = {"kept_share": _shares(used.mlp, mlp)}
    return PruneMask(layers, channels, groups, heads, mlp, scores, teacher)


def promised_mask(plan: PruningPlan, teacher: str) -> PruneMask:
    """Returns a mask of the planned size before anything is measured: layers evenly spaced, and of all else the first.

    Args:
        teacher: the model's fingerprint.
    """
    before, after = widths_of(plan.teacher), widths_of(plan.config)
    layers = plan.layers or evenly(plan.config.num_hidden_layers, plan.teacher.num_hidden_layers)

    def first(name: str) -> Indices | None:
        count = getattr(after, name)
        return None if count == getattr(before, name) else tuple(range(count))

    def each(kept: Indices | None) -> tuple[Indices, ...] | None:
        return None if kept is None else (kept,) * len(layers)

    heads = after.num_attention_heads < before.num_attention_heads
    share, size = (widths.num_attention_heads // widths.num_key_value_heads for widths in (after, before))
    groups = tuple(range(after.num_key_value_heads)) if heads else None
    queries = tuple(group * size + head for group in groups or () for head in range(share)) if heads else None
    kept = first("intermediate_size")
    return PruneMask(tuple(layers), first("hidden_size"), each(groups), each(queries), each(kept), {}, teacher)


def _kept_heads(values: Tensor, plan: PruningPlan) -> tuple[Indices, Indices]:  # kept: a test speaks of it
    """Returns a layer's key and value heads whose kept query heads are used most, and these query heads."""
    config = plan.config
    by_group = values.unflatten(0, (plan.teacher.num_key_value_heads, -1))
    share, size = config.num_attention_heads // config.num_key_value_heads, by_group.shape[1]
    groups = _largest(by_group.topk(share).values.sum(-1), config.num_key_value_heads)
    return groups, tuple(group * size + head for group in groups for head in _largest(by_group[group], share))


def _largest(values: Tensor, count: int) -> Indices:
    """The places of the ``count`` largest, in rising order; of equal ones the first."""
    return tuple(sorted(values.argsort(descending=True, stable=True)[:count].tolist()))


def _share(values: Tensor, kept: Indices) -> float:
    return (values[list(kept)].sum() / values.sum()).item() if values.sum() else 1.0


def _shares(values: Tensor, kept: Sequence[Indices]) -> list[float]:
    return [_share(of_layer, of_kept) for of_layer, of_kept in zip(values, kept, strict=True)]


# --- cutting ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def prune_model(model: PreTrainedModel, cut: PruneMask, plan: PruningPlan) -> PreTrainedModel:
    """A new model of what is kept, of the same type and on the same device; ``model`` stays as it is.

    Where nothing is removed, its weights and its logits are bitwise those of ``model``.

    Raises MismatchError where the cut is not one of this plan, or a tensor of the model is not described.
    """
    _check_fits(cut, plan)
    config = pruned_config(plan.teacher, plan.family, cut.layers, widths_of(plan.config))
    with torch.random.fork_rng(devices=[]):
        attention = model.config._attn_implementation
        smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    there = {name: (parameter, axes) for name, parameter, axes in described(model, plan.family)}
    for name, parameter in smaller.named_parameters():
        number = re.search(r"(?<=\.layers\.)\d+(?=\.)", name)
        layer, before = None, name
        if number is not None:
            layer = int(number[0])
            before = f"{name[: number.start()]}{cut.layers[layer]}{name[number.end() :]}"
        source, axes = there[before]
        for dim, axis in enumerate(axes):
            if (index := _places(cut, axis, layer, head_dim(plan.teacher))) is not None:
                source = source.index_select(dim, torch.tensor(index, device=source.device))
        parameter.copy_(source)
    _keep_scale(smaller, plan)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).eval()  # pyright: ignore[reportArgumentType]


def _places(cut: PruneMask, axis: Axis, layer: int | None, head_dim: int) -> Sequence[int] | None:
    """Returns the places that a cut keeps along an axis in a kept layer; None for all of them."""
    if axis == "hidden" or layer is None:
        return cut.channels if axis == "hidden" else None
    if axis == "mlp":
        return None if cut.mlp is None else cut.mlp[layer]
    heads = {"heads": cut.heads, "groups": cut.groups}.get(axis)
    if heads is None:
        return None
    return [head * head_dim + place for head in heads[layer] for place in range(head_dim)]


def _keep_scale(smaller: PreTrainedModel, plan: PruningPlan) -> None:
    """Undoes that a family which multiplies embeddings by √hidden_size does so by less in the smaller model.

    Embeddings grow by the ratio; a head that shares them reads a final norm that is smaller by it.
    """
    family, sizes = plan.family, (plan.teacher.hidden_size, plan.config.hidden_size)
    if not family.scaled_embeddings or sizes[0] == sizes[1]:
        return
    before, after = (torch.tensor(size**0.5, dtype=smaller.dtype).double().item() for size in sizes)  # as it rounds
    embeddings, head = smaller.get_input_embeddings(), smaller.get_output_embeddings()
    embeddings.weight.mul_(before / after)  # pyright: ignore[reportCallIssue]
    if head is not None and head.weight is embeddings.weight:
        norm = smaller.get_parameter(family.final_norm)
        norm.copy_((norm.double() + family.norm_offset) * (after / before) - family.norm_offset)


def _check_fits(cut: PruneMask, plan: PruningPlan) -> None:
    """Returns where a cut is of the plan's numbers, and its model has all that it keeps."""
    teacher, config = plan.teacher, plan.config
    for name, setting, kept in (
        ("layers", "num_hidden_layers", (cut.layers,)),
        ("channels", "hidden_size", None if cut.channels is None else (cut.channels,)),
        ("groups", "num_key_value_heads", cut.groups),
        ("heads", "num_attention_heads", cut.heads),
        ("mlp", "intermediate_size", cut.mlp),
    ):
        number, there = getattr(config, setting), getattr(teacher, setting)
        found = kept or (range(there),)
        if any(len(places) != number or places[-1] >= there for places in found):
            raise MismatchError(
                f"the cut's {name} are not those of the plan",
                {"plan": f"{number} of {there}", "cut": f"{len(found[0])}, up to number {max(p[-1] for p in found)}"},
                why="The smaller model's tensors could not be filled from this model.",
                fix="Use the plan that the cut was chosen by.",
            )


# --- reporting -------------------------------------------------------------------------------------------------------
def report(cut: PruneMask, plan: PruningPlan, before: int, after: int) -> str:
    """Says what was kept and why, for people; ``before`` and ``after`` are numbers of parameters."""
    lines = _layer_lines(cut, plan)
    for name, kept, setting, what in (
        ("channels", cut.channels, "hidden_size", "hidden channels"),
        ("heads", cut.heads, "num_attention_heads", "heads"),
        ("mlp", cut.mlp, "intermediate_size", "MLP channels"),
    ):
        there = getattr(plan.teacher, setting)
        if kept is None:
            lines.append(f"{what:16}all {there:,}")
            continue
        share = cut.scores[name]["kept_share"]
        shares = share if isinstance(share, list) else [share]
        told = f"{min(shares):.1%}" if len(shares) == 1 else f"{min(shares):.1%} to {max(shares):.1%}"
        text = f"{what:16}{getattr(plan.config, setting):,} of {there:,}, which hold {told} of what was measured"
        lines.append(text + (" in a layer" if len(shares) > 1 else ""))
        if name == "heads":
            lines.append(f"{'':16}of each layer {'; '.join(' '.join(map(str, heads)) for heads in cut.heads or ())}")
    lines.append(f"{'parameters':16}{after:,} of {before:,} ({after / before:.1%})")
    return "\n".join(lines)


def _layer_lines(cut: PruneMask, plan: PruningPlan) -> list[str]:
    there = plan.teacher.num_hidden_layers
    if len(cut.layers) == there:
        return [f"{'layers':16}all {there}"]
    lines = [f"{'layers':16}{len(cut.layers)} of {there}: {', '.join(map(str, cut.layers))}"]
    if (scores := cut.scores.get("layers")) is None:
        return lines
    unit = "block influence" if scores["by"] == "block_influence" else "loss increase, nats"
    fates = dict.fromkeys(cut.layers, "kept")
    for place, layer in enumerate(scores["dropped"], start=1):
        ending = "th" if 10 <= place % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
        fates[layer] = f"dropped {place}{ending}"
    if scores["contiguous"]:
        fates = {scores["dropped"][0]: "dropped"}
    what = f"{there - len(cut.layers)} layers from" if scores["contiguous"] else "layer"
    lines.append(f"{'':16}{what:>14}  {unit}")
    for number, value in enumerate(scores["values"]):
        lines.append(f"{'':16}{number:>14}  {value:{len(unit)}.4f}  {fates.get(number, '')}".rstrip())
    return lines

"""Cut: what of a bigger model was kept, how it is chosen, and the smaller model itself."""

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stillroom.batch import Batch
from stillroom.errors import DataError, MismatchError
from stillroom.layers import evenly
from stillroom.pruning.config import BestLayers
from stillroom.pruning.families import Axis, described, head_dim
from stillroom.pruning.importance import Say, activations, best_layers, only
from stillroom.pruning.plan import PruningPlan, pruned_config, widths_of

CUT_FILE = "cut.json"
"""Lies beside the config.json of a model that was cut out of another."""

FORMAT = 1

Indices = tuple[int, ...]


@dataclass(frozen=True)
class PruneMask:
    """What was kept, by the numbers that it had in the bigger model, from 0 and rising."""

    layers: Indices
    channels: Indices | None
    """Hidden channels; None where all were kept."""
    groups: tuple[Indices, ...] | None
    """Of each kept layer its key and value heads; None where all were kept."""
    heads: tuple[Indices, ...] | None
    """Of each kept layer its query heads; None where all were kept."""
    mlp: tuple[Indices, ...] | None
    """Of each kept layer its MLP channels; None where all were kept."""
    scores: Mapping[str, Any]
    """The measured numbers by which it was chosen, as JSON values."""
    teacher: str
    """The fingerprint of the bigger model."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, values: Any, where: str = CUT_FILE) -> "PruneMask":
        """What ``to_json`` gave.

        Raises:
            DataError: it is something else.
        """
        names = ["format", *cls.__dataclass_fields__]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise _damaged(where, ", ".join(names), found)
        if values["format"] != FORMAT or isinstance(values["format"], bool):
            raise _damaged(where, f"format {FORMAT}", f"format {values['format']!r}")
        layers = _indices(values["layers"], where, "layers")
        channels = values["channels"]
        if channels is not None:
            channels = _indices(channels, where, "channels")
        groups, heads, mlp = (_by_layer(values[name], len(layers), where, name) for name in ("groups", "heads", "mlp"))
        for name, kind in (("scores", dict), ("teacher", str)):
            if not isinstance(values[name], kind):
                raise _damaged(where, f"{name}: {kind.__name__}", f"{type(values[name]).__name__}")
        return cls(layers, channels, groups, heads, mlp, values["scores"], values["teacher"])


def _indices(values: Any, where: str, name: str) -> Indices:
    whole = isinstance(values, list) and values and all(type(value) is int and value >= 0 for value in values)
    if not whole or any(a >= b for a, b in itertools.pairwise(values)):
        raise _damaged(where, f"{name}: numbers from 0 in rising order", json.dumps(values)[:60])
    return tuple(values)


def _by_layer(values: Any, num_layers: int, where: str, name: str) -> tuple[Indices, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != num_layers:
        raise _damaged(where, f"{name}: a list for each of {num_layers} layers", json.dumps(values)[:60])
    found = tuple(_indices(of_layer, where, name) for of_layer in values)
    if len({len(of_layer) for of_layer in found}) != 1:
        raise _damaged(where, f"{name}: as many in each layer", ", ".join(str(len(of_layer)) for of_layer in found))
    return found


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
    """What a model's folder says of how it was cut out of another; None where it says nothing.

    Raises:
        DataError: its cut.json is damaged.
    """
    path = Path(folder) / CUT_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _damaged(str(path), "JSON", f"{type(error).__name__}: {error}"[:100]) from None
    return PruneMask.from_json(values, str(path))


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


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

    Raises:
        NonFiniteError: what is measured is infinite or not a number.
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


def _kept_heads(values: Tensor, plan: PruningPlan) -> tuple[Indices, Indices]:
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

    Raises:
        MismatchError: the cut is not one of this plan, or a tensor of the model is not described.
    """
    _check_fits(cut, plan)
    config = pruned_config(plan.teacher, plan.family, cut.layers, widths_of(plan.config))
    with torch.random.fork_rng(devices=[]):
        smaller = AutoModelForCausalLM.from_config(
            config,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    there = {name: (parameter, axes) for name, parameter, axes in described(model, plan.family)}
    kept = _Kept(cut, plan)
    for name, parameter in smaller.named_parameters():
        layer, before = _renumbered(name, cut.layers)
        source, axes = there[before]
        for dim, axis in enumerate(axes):
            if (index := kept.along(axis, layer)) is not None:
                source = source.index_select(dim, torch.tensor(index, device=source.device))
        parameter.copy_(source)
    _keep_scale(smaller, plan)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).eval()  # pyright: ignore[reportArgumentType]


def _renumbered(name: str, layers: Indices) -> tuple[int | None, str]:
    """Which of the kept layers a parameter is in, and the name that it has in the bigger model."""
    found = re.search(r"(?<=\.layers\.)\d+(?=\.)", name)
    if found is None:
        return None, name
    return int(found[0]), f"{name[: found.start()]}{layers[int(found[0])]}{name[found.end() :]}"


class _Kept:
    """What a cut keeps along each axis."""

    def __init__(self, cut: PruneMask, plan: PruningPlan) -> None:
        self.cut, self.head_dim = cut, head_dim(plan.teacher)

    def along(self, axis: Axis, layer: int | None) -> list[int] | None:
        """Places along an axis in a kept layer; None for all of them."""
        if axis == "hidden" and self.cut.channels is not None:
            return list(self.cut.channels)
        if layer is None:
            return None
        if axis == "mlp" and self.cut.mlp is not None:
            return list(self.cut.mlp[layer])
        heads = {"heads": self.cut.heads, "groups": self.cut.groups}.get(axis)
        if heads is None:
            return None
        return [head * self.head_dim + place for head in heads[layer] for place in range(self.head_dim)]


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
    """What was kept and why, for people; ``before`` and ``after`` are numbers of parameters."""
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
    span = there - len(cut.layers)
    lines.append(f"{'':16}{f'{span} layers from' if scores['contiguous'] else 'layer':>14}  {unit}")
    for number, value in enumerate(scores["values"]):
        fate = "kept" if number in cut.layers else f"dropped {_ordinal(scores['dropped'].index(number) + 1)}"
        if scores["contiguous"]:
            fate = "dropped" if number == scores["dropped"][0] else ""
        lines.append(f"{'':16}{number:>14}  {value:{len(unit)}.4f}  {fate}".rstrip())
    return lines


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"

"""Scoring: a model's numbers of every predicted token of a text, alone or beside its teacher; its speed and memory."""

import ctypes
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.data.dataloader import in_batches
from stillroom.data.dataset import CountedDocuments
from stillroom.errors import NonFiniteError, OutOfMemoryError
from stillroom.losses.divergences import forward_kl, reverse_kl
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.logits import (
    accepted_mass,
    confidence,
    correct,
    cross_entropy,
    student_entropy,
    top1_agreement,
    top10_overlap,
)
from stillroom.losses.objective import Measure, Objective
from stillroom.models.hidden_states import last_hidden_states, lm_head
from stillroom.signals import Dense

Scores = Mapping[str, np.ndarray]
"""A number of every predicted token by name, float32 [n], document after document."""
Passes = tuple[tuple[tuple[Objective, ...], dict[str, Measure]], ...]

ALONE = Objective("cross_entropy", cross_entropy)
PASSES: dict[bool, Passes] = {
    False: (
        ((ALONE,), {"entropy": student_entropy}),
        ((), {"confidence": confidence, "correct": correct}),
    ),
    True: (
        (
            tuple(Objective(loss.__name__, loss) for loss in (cross_entropy, forward_kl, reverse_kl)),
            {"entropy": student_entropy, "top1_agreement": top1_agreement, "accepted_mass": accepted_mass},
        ),
        ((), {"top10_overlap": top10_overlap, "confidence": confidence, "correct": correct}),
    ),
}
"""The numbers of each pass over the hidden states, by whether there is a teacher. The first pass holds those that have
kernels, which are so much faster that the second product of states and heads costs less than they save."""
MOST_S = 5.0
"""The seconds after which the measuring of speed begins no further batch."""


@dataclass(frozen=True)
class Limits:
    """The most that is held at a time. It changes no score, but for rounding."""

    batch_tokens: int
    """Positions of a batch, padding counted; at least one row."""
    logits_bytes: int
    device: str


class Predicted:
    """The predicted tokens of a text, document after document."""

    def __init__(self, documents: CountedDocuments) -> None:
        self.documents = documents
        target_masks = [documents.target_mask(i)[1:] for i in range(len(documents))]
        self._starts = np.cumsum([0, *map(len, target_masks)])
        self._places = np.cumsum(np.concatenate(target_masks)) - 1
        self.document = np.repeat(np.arange(len(documents)), [int(mask.sum()) for mask in target_masks])
        """int64 [n]: the document of each."""
        self.position = np.concatenate([np.flatnonzero(mask) for mask in target_masks])
        """int64 [n]: the place in its document of the token that is read when it is predicted."""
        self.tokens = np.concatenate([documents.tokens(i)[1:][mask] for i, mask in enumerate(target_masks)])
        """int32 [n]: the ids."""

    def __len__(self) -> int:
        return len(self.document)

    def num_bytes(self) -> np.ndarray | None:
        """The bytes of the text that each stands for, int32 [n]; None where the tokenizer drops some of the text."""
        counts = [self.documents.num_bytes(i) for i in range(len(self.documents))]
        kept = [c[1:][self.documents.target_mask(i)[1:]] for i, c in enumerate(counts) if c is not None]
        return np.concatenate(kept) if len(kept) == len(counts) else None

    def places(self, batch: Batch) -> np.ndarray:
        """The places of the kept positions of a batch among the predicted tokens, int64 [kept]."""
        documents, positions = (x.flatten()[batch.kept].numpy() for x in (batch.documents, batch.positions))
        return self._places[self._starts[documents] + positions]


def batches(
    documents: CountedDocuments, *, length: int, pack: bool, most: int, pad_token: int, borders: Collection[int] = ()
) -> Iterator[Batch]:
    """All documents in batches of at most ``most`` positions, longest rows first.

    Args:
        borders: numbers of positions; no batch holds documents of either side of one (see `models.rope_border`).
    """
    side = np.digitize(documents.lengths - 1, sorted(borders), right=True)
    for i in reversed(range(len(borders) + 1)):
        numbers = np.flatnonzero(side == i)
        yield from in_batches(
            documents, documents.lengths, numbers, length=length, pack=pack, most=most, pad_token=pad_token
        )


@torch.no_grad()
def score(
    model: PreTrainedModel,
    name: str,
    predicted: Predicted,
    text: Iterable[Batch],
    limits: Limits,
    *,
    vocab_size: int,
    teacher: PreTrainedModel | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Scores:
    """One pass over the text: cross_entropy, entropy (nats), confidence, correct; and with a teacher forward_kl,
    reverse_kl (nats), top1_agreement, top10_overlap and accepted_mass. No ``[tokens, vocab_size]`` tensor is ever held.

    Args:
        name: the model's name in an error.
        text: all documents of ``predicted`` in batches.
        vocab_size: the ids that make up the distributions; heads may be wider.
        teacher: a model that reads the same tokens.
        report: is called with the number of predicted tokens of each batch.

    Raises:
        NonFiniteError: the model, or its teacher, gives something that is no distribution.
        OutOfMemoryError: the device has too little memory.
    """
    passes = PASSES[teacher is not None]
    names = [[*(o.name for o in objectives), *measures] for objectives, measures in passes]
    scores = {key: np.full(len(predicted), np.nan, dtype=np.float32) for keys in names for key in keys}
    buffers = Buffers()
    for batch in text:
        places = predicted.places(batch)
        with enough_memory(limits):
            values = _score_batch(model, teacher, batch.to(limits.device), passes, vocab_size, limits, buffers)
        for keys, rows in zip(names, values, strict=True):
            for key, row in zip(keys, rows.cpu().float().numpy(), strict=True):
                scores[key][places] = row
                if not np.isfinite(row).all():
                    place = int(places[np.flatnonzero(~np.isfinite(row))[0]])
                    document, token = (
                        predicted.documents.name(int(predicted.document[place])),
                        predicted.position[place],
                    )
                    raise NonFiniteError(
                        f"what {name} says is not finite",
                        {
                            key.replace("_", " "): "not a number, or infinite",
                            "at": f"{document}, token {token} (from 0)",
                        },
                        why="It, or the teacher beside it, gives no distribution, so no score would mean anything.",
                        fix=f"Check its weights. Where they are good, models.{name}.dtype=float32 or another "
                        f"models.{name}.attention may mend it.",
                    )
        report(len(places))
    return scores


def _score_batch(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Batch,
    passes: Passes,
    vocab_size: int,
    limits: Limits,
    buffers: Buffers,
) -> list[Tensor]:
    """The values of each pass at the kept positions, [values, kept]."""
    kept = batch.kept
    hidden, labels = last_hidden_states(model, batch).flatten(0, 1)[kept], batch.labels.flatten()[kept]
    signal = None
    if teacher is not None:
        signal = Dense(last_hidden_states(teacher, batch).flatten(0, 1)[kept], lm_head(teacher))
    values = []
    for objectives, measures in passes:
        losses = linear_losses(
            hidden,
            lm_head(model),
            objectives,
            labels,
            hidden.new_zeros(len(hidden)),
            signal,
            vocab_size=vocab_size,
            measures=[*measures.values()],
            chunk_bytes=limits.logits_bytes,
            buffers=buffers,
        )
        values.append(torch.cat([losses.nats, losses.measures]))
    return values


@contextmanager
def enough_memory(limits: Limits) -> Iterator[None]:
    """Turns a device's running out of memory into an error of the user's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "the device has too little memory for a batch",
            {"batch_tokens": limits.batch_tokens, "device": str(error).split(". ")[0][:160]},
            why="A model and its teacher are held together, and a batch's hidden states of both.",
            fix="Lower batch_tokens or logits_bytes, and start again with --resume.",
        ) from error


# --- speed -----------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    tokens_per_s: float
    """Positions that were read, padding not counted."""
    peak_memory_bytes: int | None
    """The model's weights, and the most that was held besides while it scored; None where the system does not tell."""


@torch.no_grad()
def measure_speed(model: PreTrainedModel, text: Iterator[Batch], limits: Limits, *, vocab_size: int) -> Speed:
    """Cross-entropy of a text by the model alone: of its first batch once to warm up, then of every batch until five
    seconds have passed. Weights are counted as they lie in memory. It is measured, so never twice the same."""

    def cross_entropies(batch: Batch, buffers: Buffers) -> None:
        _score_batch(model, None, batch.to(limits.device), (((ALONE,), {}),), vocab_size, limits, buffers)

    first = next(text)
    cross_entropies(first, Buffers())
    growth = _memory_growth(limits.device)
    num_tokens, start, buffers = 0, time.perf_counter(), Buffers()
    for batch in chain([first], text):
        cross_entropies(batch, buffers)
        if limits.device.startswith("cuda"):
            torch.cuda.synchronize(limits.device)
        num_tokens += int((batch.documents >= 0).sum())
        if time.perf_counter() - start > MOST_S:
            break
    seconds = time.perf_counter() - start
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    grown = growth()
    return Speed(num_tokens / seconds, None if grown is None else weights + grown)


def _memory_growth(device: str) -> Callable[[], int | None]:
    """Gives the most memory that was held from now on besides what is held now, in bytes: of a CUDA device, or of the
    process, whose high-water mark only Linux lets be set back."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    with suppress(OSError, AttributeError):  # memory that was freed and not given back would count as held
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except OSError:
        return lambda: None
    return lambda: max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    """A size that /proc/self/status gives, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

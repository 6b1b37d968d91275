"""Scoring: what a model makes of every predicted token of a text, alone or beside its teacher."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
from stillroom.losses.logits import cross_entropy
from stillroom.losses.metrics import accepted_mass, confidence, correct, student_entropy, top1_agreement, top10_overlap
from stillroom.losses.objective import Measure, Objective
from stillroom.models.hidden_states import last_hidden_states, lm_head
from stillroom.signals import Dense

Scores = Mapping[str, np.ndarray]
"""By name, a number of every predicted token, float32 [n], document after document."""

PASSES: dict[bool, tuple[tuple[tuple[Objective, ...], dict[str, Measure]], ...]] = {
    False: (
        ((Objective("cross_entropy", cross_entropy),), {"entropy": student_entropy}),
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
"""By whether there is a teacher, what is taken in each pass over the hidden states: first what kernels can do, which
are so much faster that the second product of states and heads costs less than they save."""


@dataclass(frozen=True)
class Limits:
    """How much is held at a time. It changes no score, but for rounding."""

    batch_tokens: int
    """Positions of a batch, padding counted; at least one row."""
    logits_bytes: int
    device: str


class Predicted:
    """The predicted tokens of a text, document after document."""

    def __init__(self, documents: CountedDocuments) -> None:
        self.documents = documents
        keeps = [documents.target_mask(i)[1:] for i in range(len(documents))]
        loss_mask = np.concatenate(keeps)
        self._starts = np.cumsum([0, *map(len, keeps)])
        self._places = np.cumsum(loss_mask) - 1
        self.document = np.repeat(np.arange(len(documents)), [int(k.sum()) for k in keeps])
        """int64 [n]: the document of each."""
        self.position = np.concatenate([np.flatnonzero(k) for k in keeps])
        """int64 [n]: the place in its document of the token that is read when it is predicted."""
        self.tokens = np.concatenate([documents.tokens(i)[1:][k] for i, k in enumerate(keeps)])
        """int32 [n]: they themselves."""

    def __len__(self) -> int:
        return len(self.document)

    def num_bytes(self) -> np.ndarray | None:
        """The bytes of the text that each stands for, int32 [n]; None where the tokenizer drops some of the text."""
        counts = [self.documents.num_bytes(i) for i in range(len(self.documents))]
        found = [c[1:][self.documents.target_mask(i)[1:]] for i, c in enumerate(counts) if c is not None]
        return np.concatenate(found) if len(found) == len(counts) else None

    def places(self, batch: Batch) -> np.ndarray:
        """Where the kept positions of a batch stand among the predicted tokens, int64 [kept]."""
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
    for of in reversed(range(len(borders) + 1)):
        yield from in_batches(
            documents,
            documents.lengths,
            np.flatnonzero(side == of),
            length=length,
            pack=pack,
            most=most,
            pad_token=pad_token,
        )


@torch.no_grad()
def score(
    model: PreTrainedModel,
    name: str,
    predicted: Predicted,
    some: Iterator[Batch],
    limits: Limits,
    *,
    columns: int,
    teacher: PreTrainedModel | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Scores:
    """One pass over the text: cross_entropy, entropy (nats), confidence, correct; and with a teacher forward_kl,
    reverse_kl (nats), top1_agreement, top10_overlap and accepted_mass. No ``[tokens, columns]`` tensor is ever held.

    Args:
        name: what an error calls the model.
        some: all documents of ``predicted`` in batches.
        columns: how many columns of the heads make up the distributions.
        teacher: a model that reads the same tokens.
        report: is called with the number of predicted tokens of each batch.

    Raises:
        NonFiniteError: the model, or its teacher, says something that is no distribution.
        OutOfMemoryError: the device has too little memory.
    """
    passes = PASSES[teacher is not None]
    names = [[*(o.name for o in objectives), *measures] for objectives, measures in passes]
    found = {one: np.full(len(predicted), np.nan, dtype=np.float32) for part in names for one in part}
    buffers = Buffers()
    for batch in some:
        places = predicted.places(batch)
        with enough_memory(limits):
            values = _score_batch(model, teacher, batch.to(limits.device), passes, columns, limits, buffers)
        for part, rows in zip(names, values, strict=True):
            for one, row in zip(part, rows.cpu().float().numpy(), strict=True):
                found[one][places] = row
                if not np.isfinite(row).all():
                    raise _not_finite(name, one, predicted, int(places[np.flatnonzero(~np.isfinite(row))[0]]))
        report(len(places))
    return found


def _score_batch(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Batch,
    passes: tuple[tuple[tuple[Objective, ...], dict[str, Measure]], ...],
    columns: int,
    limits: Limits,
    buffers: Buffers,
) -> list[Tensor]:
    """What each pass gives of the kept positions, [values, kept]."""
    hidden, labels = _kept(model, batch), batch.labels.flatten()[batch.kept]
    signal = None if teacher is None else Dense(_kept(teacher, batch), lm_head(teacher))
    given = []
    for objectives, measures in passes:
        losses = linear_losses(
            hidden,
            lm_head(model),
            objectives,
            labels,
            hidden.new_zeros(len(hidden)),
            signal,
            vocab_size=columns,
            measures=[*measures.values()],
            chunk_bytes=limits.logits_bytes,
            buffers=buffers,
        )
        given.append(torch.cat([losses.nats, losses.measures]))
    return given


def _kept(model: PreTrainedModel, batch: Batch) -> Tensor:
    return last_hidden_states(model, batch).flatten(0, 1)[batch.kept]


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


def _not_finite(name: str, what: str, predicted: Predicted, place: int) -> NonFiniteError:
    document = int(predicted.document[place])
    return NonFiniteError(
        f"what {name} says is not finite",
        {
            what.replace("_", " "): "not a number, or infinite",
            "at": f"{predicted.documents.name(document)}, token {int(predicted.position[place])} (from 0)",
        },
        why="It, or the teacher beside it, says something that is no distribution, so no score would mean anything.",
        fix=f"Check its weights. Where they are good, models.{name}.dtype=float32 or another models.{name}.attention "
        "may mend it.",
    )

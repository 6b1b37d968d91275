"""Teachers that run a model: in this process; or on processes of its own, to which those that train send batches ahead.

From there hidden states, not logits, are sent (d numbers a position in the place of a whole vocabulary's): each trainer
holds the teacher's head. They go through the CPU's memory, by process groups that carry nothing else, so that outputs
that come ahead never mix with what the student's processes send each other.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.distributed.init import DistContext
from stillroom.errors import NonFiniteError
from stillroom.layers import Layer
from stillroom.lm_head import LMHead
from stillroom.models import hidden_states
from stillroom.models.generation import Sampling, Stops, derived_seed, generate, groups
from stillroom.models.hidden_states import lm_head
from stillroom.runs import StopRequests
from stillroom.signals import Attention, Dense, HiddenStates, TeacherOutput
from stillroom.teachers.base import PrefetchedTeacher


class LiveTeacher:
    """A model that never trains: in evaluation mode, without gradients, apart from the student's parameters.

    Args:
        layers: those whose states it gives too.
        attention: the blocks whose queries, keys and values it gives too.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer] = (), attention: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers, self.attention = layers, attention

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        self.layers, self.attention = layers, attention

    def prefetch(self, batch: Batch) -> None:  # noqa: ARG002
        return None

    @torch.no_grad()
    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:  # noqa: ARG002
        """Returns its last hidden states with its head, and the states that are set."""
        last, inner = hidden_states.all_hidden_states(self.model, batch, self.layers, self.attention)
        return TeacherOutput(Dense(last, lm_head(self.model)), inner)

    def answer(
        self,
        prompts: Sequence[tuple[int, np.ndarray]],
        sampling: Sampling,
        *,
        seed: int,
        vocab_size: int,
        pad_token: int,
        batch_tokens: int,
        ends: Sequence[int],
        stops: Stops | None = None,
    ) -> list[list[np.ndarray]]:
        """Returns its answers to each prompt as tokens, int32, with the end where they came to one.

        Args:
            prompts: each with the number of its document.
            vocab_size: no token from here on is drawn.
            batch_tokens: the most positions of prompts and answers that are generated together, or one prompt's.
            ends, stops: the tokens and the texts that end an answer.

        Raises NonFiniteError where the logits at a position are no distribution.
        """
        answers: dict[int, list[np.ndarray]] = {}
        num_answers = sampling.num_answers
        for order in groups(self.model, [len(tokens) for _, tokens in prompts], sampling.max_tokens):
            while order:
                longest = len(prompts[order[0]][1]) + sampling.max_tokens
                places = order[: max(1, batch_tokens // (longest * num_answers))]
                order = order[len(places) :]
                some = [prompts[i] for i in places for _ in range(num_answers)]  # of each row that is generated

                def check(logits: Tensor, num_written: int, some: Sequence = some) -> None:
                    check_finite(logits, lambda row: (some[row][0], len(some[row][1]) + num_written - 1))

                found = generate(
                    self.model,
                    [prompts[i][1] for i in places],
                    sampling,
                    seeds=[derived_seed(seed, "answers", prompts[i][0]) for i in places],
                    vocab_size=vocab_size,
                    pad_token=pad_token,
                    ends=ends,
                    stops=stops,
                    check=check,
                )
                answers |= dict(zip(places, found, strict=True))
        return [answers[i] for i in range(len(prompts))]


def check_finite(logits: Tensor, where: Callable[[int], tuple[int, int]]) -> None:
    """Returns where each row of logits is a distribution: no logit is not a number or +∞, and not all are −∞.

    Args:
        where: gives the document and the position of a row.

    Raises:
        NonFiniteError: a row is none; it names the document.
    """
    rows = (~logits.amax(-1).isfinite()).nonzero()
    if not len(rows):
        return
    row = logits[rows[0, 0]]
    number, position = where(int(rows[0, 0]))
    wrong = row.isnan() | (row == torch.inf)
    kind = "not a number" if row.isnan().any() else "infinite" if wrong.any() else "-infinity"
    raise NonFiniteError(
        f"the teacher's logits are not finite in document {number}",
        {
            "position": f"{position} (from 0)",
            "columns": f"{int(wrong.sum()) or len(row)} of {len(row)} are {kind}",
        },
        why="It says nothing there that a student could learn. What is in whole shards is kept.",
        fix="Check its weights. Where they are good, teacher.engine.dtype=float32 or another teacher.engine.attention "
        "may mend it, with --overwrite; so may leaving out that document, or one that shares its row. --resume goes on "
        "with the same settings, if the fault was the machine's.",
    )


REQUEST, LEAVE = 1, 0


class RemoteTeacher(PrefetchedTeacher):
    """The teacher as a training process sees it.

    Args:
        head: the teacher's, in this process.
        dtype: the type of the teacher's hidden states.
    """

    def __init__(self, context: DistContext, head: LMHead, dtype: torch.dtype) -> None:
        self.head, self.dtype, self.context = head, dtype, context
        trainers, teachers = context.num_trainers, context.num_teachers
        self.ranks = [trainers + rank for rank in _share(teachers, trainers, context.group.rank)]
        """One rank, or where there are more of them than trainers, several that share a batch."""
        self.layers: Sequence[Layer] = ()
        self.attention: Sequence[int] = ()
        self.signal = 0
        """The signal by which one of its processes was told to end, or 0."""
        self._one_at_a_time = threading.Lock()

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Sets the hidden states that it receives; the teacher's own processes must have set the same."""
        self.layers, self.attention = layers, attention

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Sends a batch, and returns the teacher's hidden states at the kept positions, on the CPU."""
        pieces = list(zip(self.ranks, _split(batch, len(self.ranks)), strict=True))
        with self._one_at_a_time:
            for rank, piece in pieces:
                self._send(torch.tensor([REQUEST, *piece.tokens.shape]), rank)
                self._send(torch.stack([piece.tokens, piece.positions, piece.loss_mask.long()]), rank)
            responses = []
            for rank, piece in pieces:
                header = torch.empty(2 + len(self.layers) + 3 * len(self.attention), dtype=torch.long)
                dist.recv(header, rank, group=self.context.responses)
                signal, *widths = header.tolist()
                self.signal = self.signal or signal
                responses.append([torch.empty(piece.num_kept, width, dtype=self.dtype) for width in widths])
                for state in filter(torch.numel, responses[-1]):
                    dist.recv(state.view(torch.uint8), rank, group=self.context.responses)
        last, *inner = (torch.cat(parts) for parts in zip(*responses, strict=True))
        states = dict(zip(self.layers, inner, strict=False))
        rest = iter(inner[len(self.layers) :])
        attention = {layer: Attention(next(rest), next(rest), next(rest)) for layer in self.attention}
        return TeacherOutput(Dense(last, self.head), HiddenStates(states, attention))

    def leave(self) -> None:
        """Tells the teacher's processes that nothing more will be sent."""
        with self._one_at_a_time:
            for rank in self.ranks:
                self._send(torch.tensor([LEAVE, 0, 0]), rank)

    def _send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor.contiguous(), rank, group=self.context.requests)


def _share(theirs: int, ours: int, rank: int) -> list[int]:
    """Returns which of ``theirs`` the process ``rank`` of ``ours`` exchanges with: those of its own number, going
    round."""
    return [other for other in range(theirs) if other % ours == rank] if theirs > ours else [rank % theirs]


def _split(batch: Batch, number: int) -> list[Batch]:
    """Returns a batch's rows in so many pieces, of which some may be one position of padding."""
    if number == 1:
        return [batch]
    none = torch.zeros(1, 1, dtype=torch.long)
    tensors = batch.tokens, batch.labels, batch.loss_mask, batch.positions, batch.documents
    size = -(-len(batch.tokens) // number)
    return [
        Batch(*(tensor[start : start + size] for tensor in tensors))
        if start < len(batch.tokens)
        else Batch(none, none, none.bool(), none, none - 1)
        for start in range(0, size * number, size)
    ]


def serve(teacher: LiveTeacher, context: DistContext, device: str, stop: StopRequests, *, together: bool) -> int:
    """Answers until all trainers have left; returns how many batches were answered.

    Args:
        stop: whether this process was told to end, which its responses carry.
        together: the teacher is sharded over its processes, which must run it at the same times: each then answers in
            rounds, one batch of each trainer, all of whom send equally often.
    """
    trainers = _share(context.num_trainers, context.num_teachers, context.group.rank)
    nothing, answered = torch.zeros(1, 1, dtype=torch.long, device=device), 0
    most = -(-context.num_trainers // context.group.world_size) if together else 0
    while trainers or together:
        requests = []
        for sender in list(trainers) if together else [None]:
            trainer, batch = _receive_batch(context, device, sender)
            if batch is None:
                trainers.remove(trainer)
            else:
                requests.append((trainer, batch))
        if together and not context.group.any_rank(bool(requests)):
            break
        for trainer, batch in requests:
            _answer(teacher, context, stop.number, trainer, batch)
        for _ in range(most - len(requests)):  # for nobody, as its other processes run it for somebody
            teacher.forward(Batch(nothing, nothing, nothing.bool(), nothing, nothing))
        answered += len(requests)
    return answered


def _receive_batch(context: DistContext, device: str, trainer: int | None) -> tuple[int, Batch | None]:
    """Returns who sends next, or ``trainer`` alone; and its batch, or None where it leaves."""
    header = torch.empty(3, dtype=torch.long)
    trainer = dist.recv(header, trainer, group=context.requests)
    kind, rows, length = header.tolist()
    if kind == LEAVE:
        return trainer, None
    sent = torch.empty(3, rows, length, dtype=torch.long)
    dist.recv(sent, trainer, group=context.requests)
    tokens, positions, loss_mask = sent.to(device)
    return trainer, Batch(tokens, torch.zeros_like(tokens), loss_mask.bool(), positions, torch.zeros_like(tokens))


def _answer(teacher: LiveTeacher, context: DistContext, signal: int, trainer: int, batch: Batch) -> None:
    output = teacher.forward(batch)
    assert isinstance(output.signal, Dense)
    assert output.hidden is not None
    tensors = [output.signal.hidden, *(output.hidden.states[layer] for layer in teacher.layers)]
    for layer in teacher.attention:
        tensors += output.hidden.attention[layer]
    header = torch.tensor([signal, *(tensor.shape[-1] for tensor in tensors)])
    dist.send(header, trainer, group=context.responses)
    for tensor in filter(torch.numel, tensors):
        dist.send(
            tensor.to("cpu", teacher.model.dtype).contiguous().view(torch.uint8), trainer, group=context.responses
        )

"""A teacher on processes of its own: those that train ask it ahead of need, and it answers with hidden states.

Hidden states, not logits, are sent (d numbers a position in the place of a whole vocabulary's): each asker holds the
teacher's head. They go through the CPU's memory, by a group that carries nothing else, so that answers that come ahead
never mix with what the student's processes tell each other.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stillroom.batch import Batch
from stillroom.distributed.init import DistContext
from stillroom.layers import Layer
from stillroom.lm_head import LMHead
from stillroom.runs import StopRequests
from stillroom.signals import Attention, Dense, HiddenStates, TeacherOutput
from stillroom.teachers.live import LiveTeacher

ASK, LEAVE = 1, 0


class RemoteTeacher:
    """As one of the processes that train sees a teacher on others.

    Args:
        head: the teacher's, here.
        dtype: of the teacher's hidden states.
    """

    def __init__(self, context: DistContext, head: LMHead, dtype: torch.dtype) -> None:
        self.head, self.dtype = head, dtype
        self.context, self.ranks = context, teachers_of(context)
        self.layers: Sequence[Layer] = ()
        self.attention: Sequence[int] = ()
        self.signal = 0
        """The signal that asked one of its processes to end, or 0."""
        self._one_at_a_time = threading.Lock()

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Has it tell these inner states; its own processes must have been told so too."""
        self.layers, self.attention = layers, attention

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Asks it; its hidden states of the kept positions, on the CPU."""
        pieces = _split(batch, len(self.ranks))
        with self._one_at_a_time:
            for rank, piece in zip(self.ranks, pieces, strict=True):
                self._send(torch.tensor([ASK, *piece.tokens.shape]), rank)
                self._send(torch.stack([piece.tokens, piece.positions, piece.loss_mask.long()]), rank)
            responses = [
                list(self._receive(rank, piece.num_kept)) for rank, piece in zip(self.ranks, pieces, strict=True)
            ]
        last, *inner = (torch.cat(parts) for parts in zip(*responses, strict=True))
        states = dict(zip(self.layers, inner, strict=False))
        rest = iter(inner[len(self.layers) :])
        attention = {layer: Attention(next(rest), next(rest), next(rest)) for layer in self.attention}
        return TeacherOutput(Dense(last, self.head), HiddenStates(states, attention))

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        prefetch = self.prefetch(batch) if prefetch is None else prefetch
        return prefetch.to(batch.tokens.device)

    def leave(self) -> None:
        """Says that nothing will be asked any more."""
        with self._one_at_a_time:
            for rank in self.ranks:
                self._send(torch.tensor([LEAVE, 0, 0]), rank)

    def _send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor.contiguous(), rank, group=self.context.requests)

    def _receive(self, rank: int, num_kept: int) -> Iterator[Tensor]:
        header = torch.empty(2 + len(self.layers) + 3 * len(self.attention), dtype=torch.long)
        dist.recv(header, rank, group=self.context.responses)
        signal, *widths = header.tolist()
        self.signal = self.signal or signal
        for width in widths:
            state = torch.empty(num_kept, width, dtype=self.dtype)
            if state.numel():
                dist.recv(state.view(torch.uint8), rank, group=self.context.responses)
            yield state


def teachers_of(context: DistContext) -> list[int]:
    """The ranks that answer this process: one, or where there are more of them than askers, several that share."""
    num_trainers, num_teachers = context.num_trainers, context.num_teachers
    return [num_trainers + t for t in _share(num_teachers, num_trainers, context.group.rank)]


def students_of(context: DistContext) -> list[int]:
    """The ranks that this teaching process answers."""
    return _share(context.num_trainers, context.num_teachers, context.group.rank)


def _share(theirs: int, ours: int, rank: int) -> list[int]:
    """Which of ``theirs`` the process ``rank`` of ``ours`` talks to: those of its own number, going round."""
    return [other for other in range(theirs) if other % ours == rank] if theirs > ours else [rank % theirs]


def _split(batch: Batch, number: int) -> list[Batch]:
    """A batch's rows in so many pieces, of which some may be one position of padding."""
    if number == 1:
        return [batch]
    size = -(-len(batch.tokens) // number)
    pieces = []
    for start in range(0, size * number, size):
        rows = slice(start, start + size)
        if start < len(batch.tokens):
            pieces.append(
                Batch(
                    *(x[rows] for x in (batch.tokens, batch.labels, batch.loss_mask, batch.positions, batch.documents))
                )
            )
        else:
            nothing = torch.zeros(1, 1, dtype=torch.long)
            pieces.append(Batch(nothing, nothing, nothing.bool(), nothing, nothing - 1))
    return pieces


def serve(teacher: LiveTeacher, context: DistContext, device: str, asked: StopRequests, *, together: bool) -> int:
    """Answers until all askers have left; how many questions were answered.

    Args:
        asked: whether this process was asked to end, which its answers tell.
        together: the teacher is sharded over its processes, which must run it at the same times: each then answers in
            rounds, one question of each asker, all of whom ask equally often.
    """
    askers = students_of(context)
    server = _Server(teacher, context, device, asked)
    return _in_rounds(server, askers) if together else _as_they_come(server, askers)


@dataclass(frozen=True)
class _Server:
    """What answers: a process of the teacher."""

    teacher: LiveTeacher
    context: DistContext
    device: str
    asked: StopRequests

    def next(self, asker: int | None = None) -> tuple[int, Batch | None]:
        """Who asks next, or only ``asker``; and its question, or None where it leaves."""
        header = torch.empty(3, dtype=torch.long)
        asker = dist.recv(header, asker, group=self.context.requests)
        kind, rows, length = header.tolist()
        if kind == LEAVE:
            return asker, None
        sent = torch.empty(3, rows, length, dtype=torch.long)
        dist.recv(sent, asker, group=self.context.requests)
        tokens, positions, loss_mask = sent.to(self.device)
        return asker, Batch(tokens, torch.zeros_like(tokens), loss_mask.bool(), positions, torch.zeros_like(tokens))

    def answer(self, asker: int, question: Batch) -> None:
        teacher_output = self.teacher.forward(question)
        assert isinstance(teacher_output.signal, Dense)
        assert teacher_output.hidden is not None
        tensors = [
            teacher_output.signal.hidden,
            *(teacher_output.hidden.states[layer] for layer in self.teacher.layers),
        ]
        for layer in self.teacher.attention:
            tensors += teacher_output.hidden.attention[layer]
        header = torch.tensor([self.asked.number, *(tensor.shape[-1] for tensor in tensors)])
        dist.send(header, asker, group=self.context.responses)
        for tensor in tensors:
            if tensor.numel():
                sent = tensor.to("cpu", self.teacher.model.dtype).contiguous().view(torch.uint8)
                dist.send(sent, asker, group=self.context.responses)

    def idle(self) -> None:
        """Runs the teacher for nobody, as its other processes do for somebody."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.teacher.forward(Batch(nothing, nothing, nothing.bool(), nothing, nothing))


def _as_they_come(server: _Server, askers: list[int]) -> int:
    there, answered = set(askers), 0
    while there:
        asker, question = server.next()
        if question is None:
            there.discard(asker)
        else:
            server.answer(asker, question)
            answered += 1
    return answered


def _in_rounds(server: _Server, askers: list[int]) -> int:
    there, answered, others = list(askers), 0, server.context.group
    most = -(-server.context.num_trainers // others.world_size)
    while True:
        requests = []
        for asker in list(there):
            _, question = server.next(asker)
            if question is None:
                there.remove(asker)
            else:
                requests.append((asker, question))
        if not others.any_rank(bool(requests)):
            return answered
        for number in range(most):
            if number < len(requests):
                server.answer(*requests[number])
                answered += 1
            else:
                server.idle()

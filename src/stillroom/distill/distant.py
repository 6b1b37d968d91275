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
from stillroom.distill.meeting import Meeting
from stillroom.distill.teacher import LiveTeacher
from stillroom.head import Head
from stillroom.interrupt import Requests
from stillroom.layers import Layer
from stillroom.signals import Attention, Dense, Hidden, Told

ASK, LEAVE = 1, 0


class DistantTeacher:
    """As one of the processes that train sees a teacher on others.

    Args:
        head: the teacher's, here.
        dtype: of the teacher's hidden states.
    """

    def __init__(self, meeting: Meeting, head: Head, dtype: torch.dtype) -> None:
        self.head, self.dtype = head, dtype
        self.meeting, self.ranks = meeting, teachers_of(meeting)
        self.layers: Sequence[Layer] = ()
        self.attention: Sequence[int] = ()
        self.signal = 0
        """The signal that asked one of its processes to end, or 0."""
        self._one_at_a_time = threading.Lock()

    def ask_for(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Has it tell these inner states; its own processes must have been told so too."""
        self.layers, self.attention = layers, attention

    def read(self, batch: Batch) -> Told:
        """Asks it; its hidden states of the kept positions, on the CPU."""
        pieces = _split(batch, len(self.ranks))
        with self._one_at_a_time:
            for rank, piece in zip(self.ranks, pieces, strict=True):
                self._send(torch.tensor([ASK, *piece.tokens.shape]), rank)
                self._send(torch.stack([piece.tokens, piece.positions, piece.keep.long()]), rank)
            answers = [
                list(self._receive(rank, piece.num_kept)) for rank, piece in zip(self.ranks, pieces, strict=True)
            ]
        last, *inner = (torch.cat(parts) for parts in zip(*answers, strict=True))
        states = dict(zip(self.layers, inner, strict=False))
        rest = iter(inner[len(self.layers) :])
        attention = {layer: Attention(next(rest), next(rest), next(rest)) for layer in self.attention}
        return Told(Dense(last, self.head), Hidden(states, attention))

    def tell(self, batch: Batch, read: Told | None = None) -> Told:
        read = self.read(batch) if read is None else read
        return read.to(batch.tokens.device)

    def leave(self) -> None:
        """Says that nothing will be asked any more."""
        with self._one_at_a_time:
            for rank in self.ranks:
                self._send(torch.tensor([LEAVE, 0, 0]), rank)

    def _send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor.contiguous(), rank, group=self.meeting.questions)

    def _receive(self, rank: int, num_kept: int) -> Iterator[Tensor]:
        header = torch.empty(2 + len(self.layers) + 3 * len(self.attention), dtype=torch.long)
        dist.recv(header, rank, group=self.meeting.answers)
        signal, *widths = header.tolist()
        self.signal = self.signal or signal
        for width in widths:
            state = torch.empty(num_kept, width, dtype=self.dtype)
            if state.numel():
                dist.recv(state.view(torch.uint8), rank, group=self.meeting.answers)
            yield state


def teachers_of(meeting: Meeting) -> list[int]:
    """The ranks that answer this process: one, or where there are more of them than askers, several that share."""
    num_students, num_teachers = meeting.num_students, meeting.num_teachers
    return [num_students + t for t in _share(num_teachers, num_students, meeting.mine.rank)]


def students_of(meeting: Meeting) -> list[int]:
    """The ranks that this teaching process answers."""
    return _share(meeting.num_students, meeting.num_teachers, meeting.mine.rank)


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
                    *(x[rows] for x in (batch.tokens, batch.next_tokens, batch.keep, batch.positions, batch.documents))
                )
            )
        else:
            nothing = torch.zeros(1, 1, dtype=torch.long)
            pieces.append(Batch(nothing, nothing, nothing.bool(), nothing, nothing - 1))
    return pieces


def serve(teacher: LiveTeacher, meeting: Meeting, device: str, asked: Requests, *, together: bool) -> int:
    """Answers until all askers have left; how many questions were answered.

    Args:
        asked: whether this process was asked to end, which its answers tell.
        together: the teacher is sharded over its processes, which must run it at the same times: each then answers in
            rounds, one question of each asker, all of whom ask equally often.
    """
    askers = students_of(meeting)
    server = _Server(teacher, meeting, device, asked)
    return _in_rounds(server, askers) if together else _as_they_come(server, askers)


@dataclass(frozen=True)
class _Server:
    """What answers: a process of the teacher."""

    teacher: LiveTeacher
    meeting: Meeting
    device: str
    asked: Requests

    def next(self, asker: int | None = None) -> tuple[int, Batch | None]:
        """Who asks next, or only ``asker``; and its question, or None where it leaves."""
        header = torch.empty(3, dtype=torch.long)
        asker = dist.recv(header, asker, group=self.meeting.questions)
        kind, rows, length = header.tolist()
        if kind == LEAVE:
            return asker, None
        sent = torch.empty(3, rows, length, dtype=torch.long)
        dist.recv(sent, asker, group=self.meeting.questions)
        tokens, positions, keep = sent.to(self.device)
        return asker, Batch(tokens, torch.zeros_like(tokens), keep.bool(), positions, torch.zeros_like(tokens))

    def answer(self, asker: int, question: Batch) -> None:
        told = self.teacher.tell(question)
        assert isinstance(told.signal, Dense)
        assert told.hidden is not None
        tensors = [told.signal.hidden, *(told.hidden.states[layer] for layer in self.teacher.layers)]
        for layer in self.teacher.attention:
            tensors += told.hidden.attention[layer]
        header = torch.tensor([self.asked.number, *(tensor.shape[-1] for tensor in tensors)])
        dist.send(header, asker, group=self.meeting.answers)
        for tensor in tensors:
            if tensor.numel():
                sent = tensor.to("cpu", self.teacher.model.dtype).contiguous().view(torch.uint8)
                dist.send(sent, asker, group=self.meeting.answers)

    def idle(self) -> None:
        """Runs the teacher for nobody, as its other processes do for somebody."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.teacher.tell(Batch(nothing, nothing, nothing.bool(), nothing, nothing))


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
    there, answered, others = list(askers), 0, server.meeting.mine
    most = -(-server.meeting.num_students // others.size)
    while True:
        questions = []
        for asker in list(there):
            _, question = server.next(asker)
            if question is None:
                there.remove(asker)
            else:
                questions.append((asker, question))
        if not others.any(bool(questions)):
            return answered
        for number in range(most):
            if number < len(questions):
                server.answer(*questions[number])
                answered += 1
            else:
                server.idle()

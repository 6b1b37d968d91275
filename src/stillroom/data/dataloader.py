"""BatchStream: documents to the batches of each optimizer step, from a state that can be saved and resumed."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from stillroom.batch import Batch
from stillroom.errors import DataError, MismatchError
from stillroom.models.generation import derived_seed

OPEN_ROWS = 64
"""The most rows that wait for a document that fits, at any one time."""


@dataclass(frozen=True)
class Rows:
    """The documents of each row. Row r holds ``documents[offsets[r]:offsets[r + 1]]``, in that order."""

    offsets: np.ndarray
    """int64, shape [rows + 1]."""
    documents: np.ndarray
    """int64, shape [documents]: the number of each document."""
    num_positions: np.ndarray
    """int64, shape [rows]: the input positions of each row, padding not counted."""

    def __len__(self) -> int:
        return len(self.num_positions)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.offsets[row] : self.offsets[row + 1]]


def epoch_order(num: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order of ``num`` documents in an epoch, int64 [num]: as they come, or a permutation by (seed, epoch)."""
    if not shuffle:
        return np.arange(num, dtype=np.int64)
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(num, generator=generator).numpy()


def plan_rows(lengths: np.ndarray, length: int, pack: bool, order: np.ndarray) -> Rows:
    """Puts each document of ``order`` into exactly one row of at most ``length`` input positions.

    A document of n tokens takes n - 1 positions, since its last token is only predicted. With ``pack``, each goes
    into the fullest open row that has room for it (best fit), else into a new row; at most 64 rows stay open, and the
    fullest is closed when there are more. Without, each has a row of its own. Rows come in the order of their begin.

    Raises ValueError where a document has no position, or more than ``length``.
    """
    needs = np.asarray(lengths, dtype=np.int64)[order] - 1
    if len(needs) and (needs.min() < 1 or needs.max() > length):
        raise ValueError(f"documents take {needs.min()} to {needs.max()} positions; a row holds 1 to {length}")
    if not pack:
        return Rows(np.arange(len(order) + 1), np.asarray(order, dtype=np.int64), needs)
    row_of = _best_fit(needs.tolist(), length)
    by_row = np.argsort(row_of, kind="stable")
    num_rows = int(row_of.max(initial=-1)) + 1
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=num_rows)))).astype(np.int64)
    num_positions = np.bincount(row_of, weights=needs, minlength=num_rows).astype(np.int64)
    return Rows(offsets, np.asarray(order, dtype=np.int64)[by_row], num_positions)


def _best_fit(needs: list[int], length: int) -> np.ndarray:
    """The row of each document, int64. ``waiting`` is sorted: (room left, row), fullest first."""
    waiting: list[tuple[int, int]] = []
    row_of = np.empty(len(needs), dtype=np.int64)
    num_rows = 0
    for index, need in enumerate(needs):
        at = bisect_left(waiting, (need, -1))
        if at < len(waiting):
            room, row = waiting.pop(at)
        else:
            room, row = length, num_rows
            num_rows += 1
        row_of[index] = row
        if room > need:
            insort(waiting, (room - need, row))
            if len(waiting) > OPEN_ROWS:
                waiting.pop(0)
    return row_of


class RankSlice(NamedTuple):
    """One of the processes that share each step: the rows of process ``rank`` of ``size``, from 0."""

    rank: int
    size: int


WHOLE = RankSlice(0, 1)


class Totals(NamedTuple):
    """All that the processes have of a step together."""

    num_kept: int
    """Kept positions."""
    num_positions: int
    """Input positions, padding not counted."""


def totals(batches: Sequence[Batch]) -> Totals:
    """Those of a step that lies in one process."""
    return Totals(sum(b.num_kept for b in batches), sum(int((b.documents >= 0).sum()) for b in batches))


class Step(list[Batch]):
    """The micro-batches that one process has of an optimizer step, and the totals of all processes."""

    def __init__(self, batches: Iterable[Batch], totals: Totals) -> None:
        super().__init__(batches)
        self.totals = totals


class BatchStream(Iterator[Step]):
    """Gives, for each optimizer step, its micro-batches.

    A step takes consecutive rows as long as their input positions, padding not counted, come to at most ``tokens``,
    and at least one row; it may reach over the end of an epoch. Which rows a step takes does not depend on
    ``micro_tokens``. The rows of a step, longest first, are grouped into micro-batches of at most ``micro_tokens``
    positions, padding counted, and at least one row.

    Several processes share a step: each takes some of its rows, and as many micro-batches as every other, of which some
    may be empty. What a step holds does not depend on how many they are.

    Args:
        documents: what to read, none longer than ``length`` + 1 tokens.
        length: the most input positions of a row.
        pack: put several documents into a row.
        shuffle: take the documents in a new order each epoch, by ``seed``.
        tokens: the most input positions of a step.
        micro_tokens: the most positions of a micro-batch.
        epochs: how often to read all documents; None is without end. The last step may be short.
        pad_token: what the model reads on padding.
        part: which of the processes this is.
    """

    def __init__(
        self,
        documents: "DocumentSet",
        *,
        length: int,
        pack: bool,
        shuffle: bool,
        tokens: int,
        micro_tokens: int,
        seed: int,
        epochs: int | None,
        pad_token: int = 0,
        part: RankSlice = WHOLE,
    ) -> None:
        if not len(documents):
            raise ValueError("a stream needs at least one document")
        self.documents, self.epochs, self.micro_tokens, self.pad_token = documents, epochs, micro_tokens, pad_token
        self.length, self.pack, self.shuffle, self.tokens, self.seed = length, pack, shuffle, tokens, seed
        self.epoch, self.row, self.step, self.part = 0, 0, 0, part
        self._planned: tuple[int, Rows] | None = None

    def __next__(self) -> Step:
        self.epoch, self.row, rows = self._take(self.epoch, self.row)
        if not rows:
            raise StopIteration
        self.step += 1
        lengths = self.documents.lengths
        groups = [group(some, lengths, self.micro_tokens) for some in shares(rows, lengths, self.part.size)]
        mine = [collate(self.documents, some, self.pad_token) for some in groups[self.part.rank]]
        empty = [nothing(self.documents, self.pad_token)] * (max(map(len, groups)) - len(mine))
        if self.part.size == 1:
            return Step(mine + empty, totals(mine))  # this process's batches are all of the step
        mask = getattr(self.documents, "unchecked_mask", self.documents.target_mask)
        num_kept = sum(int(mask(d)[1:].sum()) for row in rows for d in row.tolist())
        return Step(mine + empty, Totals(num_kept, sum(int((lengths[row] - 1).sum()) for row in rows)))

    def num_steps(self) -> int | None:
        """The steps from the first to the end of the last epoch; None without end."""
        if self.epochs is None:
            return None
        epoch, row, steps = 0, 0, 0
        while True:
            epoch, row, rows = self._take(epoch, row)
            if not rows:
                return steps
            steps += 1

    def state(self) -> dict[str, Any]:
        """Returns where the stream stands, as JSON values: after the last step that it gave."""
        return {"epoch": self.epoch, "row": self.row, "step": self.step, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken, so that the next step is the one that would have come then.

        Raises DataError where the state lacks something; MismatchError where it was taken over other documents, or with
        other settings that choose the rows of a step.
        """
        for key, value in self._identity().items():
            if key in state and state[key] != value:
                raise MismatchError(
                    f"the saved data stream differs in its {key}",
                    {"saved": state[key], "now": value},
                    why="The steps to come would not hold the documents that an uninterrupted run would have seen.",
                    fix="Resume with the data and the settings that the run was begun with, or begin a new run.",
                )
        missing = [key for key in self.state() if key not in state]
        places = [state.get(key) for key in ("epoch", "row", "step")]
        if missing or not all(isinstance(place, int) and place >= 0 for place in places):
            raise DataError(
                "the saved state of the data stream is not whole",
                {"missing": ", ".join(missing) or "nothing", "epoch, row, step": places},
                why="Without it, nobody knows which documents come next.",
                fix="Resume from an earlier checkpoint.",
            )
        self.epoch, self.row, self.step = state["epoch"], state["row"], state["step"]

    def _identity(self) -> dict[str, Any]:
        """All that decides which documents a step holds."""
        names = ("length", "pack", "shuffle", "tokens", "seed")
        return {"documents": self.documents.fingerprint, **{name: getattr(self, name) for name in names}}

    def _take(self, epoch: int, row: int) -> tuple[int, int, list[np.ndarray]]:
        """The next step's rows, each as its documents, and the epoch and row after them."""
        taken: list[np.ndarray] = []
        total = 0
        while self.epochs is None or epoch < self.epochs:
            key = epoch if self.shuffle else 0
            if self._planned is None or self._planned[0] != key:
                order = epoch_order(len(self.documents), self.shuffle, self.seed, epoch)
                self._planned = key, plan_rows(self.documents.lengths, self.length, self.pack, order)
            rows = self._planned[1]
            if row >= len(rows):
                epoch, row = epoch + 1, 0
                continue
            total += int(rows.num_positions[row])
            if taken and total > self.tokens:
                break
            taken.append(rows[row])
            row += 1
        return epoch, row, taken


class Sequences(Protocol):
    """Documents to read from: those of a data set, of a store, or any others."""

    def tokens(self, index: int) -> np.ndarray: ...

    def target_mask(self, index: int) -> np.ndarray: ...


class DocumentSet(Sequences, Protocol):
    """Sequences that make up a whole, and can be told from another whole."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def fingerprint(self) -> str: ...

    def name(self, index: int) -> str: ...

    def __len__(self) -> int: ...


def collate(documents: Sequences, rows: Sequence[np.ndarray], pad_token: int) -> Batch:
    """Rows to a batch. The shift is made here and nowhere else: n tokens are n - 1 inputs and next tokens.

    Args:
        documents: where they have a method ``weight`` too, it says what each token of a document counts.
        rows: the documents of each row, by number.
        pad_token: what the model reads on padding.
    """
    taken = [[(d, documents.tokens(d), documents.target_mask(d)) for d in row.tolist()] for row in rows]
    shape = len(rows), max(sum(len(ids) - 1 for _, ids, _ in row) for row in taken)
    tokens, numbers = np.full(shape, pad_token, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    labels, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    loss_mask, weigh = np.zeros(shape, dtype=bool), getattr(documents, "weight", None)
    weights = [] if weigh is None else [np.ones(shape, dtype=np.float32)]
    for r, row in enumerate(taken):
        start = 0
        for document, ids, target_mask in row:
            end = start + len(ids) - 1
            tokens[r, start:end], labels[r, start:end] = ids[:-1], ids[1:]
            loss_mask[r, start:end] = target_mask[1:]
            positions[r, start:end] = np.arange(end - start)
            numbers[r, start:end] = document
            if weigh is not None:
                weights[0][r, start:end] = weigh(document)
            start = end
        positions[r, start:] = np.arange(shape[1] - start)
    return Batch(*map(torch.from_numpy, (tokens, labels, loss_mask, positions, numbers, *weights)))


def nothing(documents: Sequences, pad_token: int) -> Batch:
    """A batch of one position of padding, for a process that has nothing left to read while others have."""
    shape = 1, 1
    zeros = torch.zeros(shape, dtype=torch.long)
    weights = [] if getattr(documents, "weight", None) is None else [torch.ones(shape)]
    return Batch(zeros + pad_token, zeros, zeros.bool(), zeros.clone(), zeros - 1, *weights)


def shares(rows: Sequence[np.ndarray], lengths: np.ndarray, of: int) -> list[list[np.ndarray]]:
    """A step's rows for each of so many processes, as evenly as dealing them out from the longest allows."""
    if of == 1:
        return [list(rows)]
    dealt: list[list[np.ndarray]] = [[] for _ in range(of)]
    for number, row in enumerate(sorted(rows, key=lambda row: int((lengths[row] - 1).sum()), reverse=True)):
        turn, place = divmod(number, of)
        dealt[place if turn % 2 == 0 else of - 1 - place].append(row)
    return dealt


def group(rows: Iterable[np.ndarray], lengths: np.ndarray, most: int) -> list[list[np.ndarray]]:
    """Rows, longest first, in groups of at most ``most`` positions, padding counted, and at least one row."""

    def num_positions(row: np.ndarray) -> int:
        return int((lengths[row] - 1).sum())

    groups: list[list[np.ndarray]] = []
    widest = 0
    for row in sorted(rows, key=num_positions, reverse=True):
        if groups and (len(groups[-1]) + 1) * widest <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
            widest = num_positions(row)
    return groups


def in_batches(
    documents: Sequences, lengths: np.ndarray, order: np.ndarray, *, length: int, pack: bool, most: int, pad_token: int
) -> Iterator[Batch]:
    """The documents of ``order`` once, in batches of at most ``most`` positions, longest rows first.

    Args:
        lengths: the tokens of every document, int64 [documents].
        length, pack: of a row (see `plan_rows`).
    """
    rows = plan_rows(lengths, length, pack, order)
    for some in group((rows[row] for row in range(len(rows))), lengths, most):
        yield collate(documents, some, pad_token)

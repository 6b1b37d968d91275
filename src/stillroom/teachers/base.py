"""The interface of every teacher, and the teachers whose output the CPU gets whole: from a store or from a server."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stillroom.batch import Batch
from stillroom.data.dataloader import DocumentSet
from stillroom.kernels.selection import subtracted_rests
from stillroom.layers import Layer
from stillroom.models.generation import Sampling
from stillroom.signals import HiddenStates, Logits, Sparse, TeacherOutput
from stillroom.store.config import Full
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store
from stillroom.teachers.answers import TopLogProbs
from stillroom.teachers.config import ServerTeacherConfig
from stillroom.teachers.engine import Request, ServerEngine


class Teacher(Protocol):
    """Gives its output for a batch in two steps, so that another thread can make the first one ahead of need."""

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Sets the layers whose states, and the blocks whose queries, keys and values, are given from now on."""

    def prefetch(self, batch: Batch) -> TeacherOutput | None:
        """Returns what can be had without the device, on the CPU."""

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        """Returns the output at the batch's kept positions, on the batch's device."""
        ...


class PrefetchedTeacher(ABC):
    """A teacher whose output is read or received into the CPU's memory whole."""

    @abstractmethod
    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Returns the output at the batch's kept positions, on the CPU."""

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        prefetch = self.prefetch(batch) if prefetch is None else prefetch
        return prefetch.to(batch.tokens.device)


def documents_in(batch: Batch) -> list[int]:
    """Returns the documents of a batch in the order of its positions."""
    return [number for row in batch.documents for number in row.unique_consecutive().tolist() if number >= 0]


def prompt_length(target_mask: np.ndarray) -> int:
    """Returns how many tokens stand before the last span of targets; 0 where no span comes after other tokens.

    Args:
        target_mask: bool [n], whether each token is a target.
    """
    starts = np.flatnonzero(np.diff(target_mask.astype(np.int8)) == 1)
    return int(starts[-1]) + 1 if len(starts) else 0


class StoredTeacher(PrefetchedTeacher):
    """Reads signals from a store whose documents the batches hold.

    Args:
        layers: those whose stored states it gives too.
        signals: whether its signals are needed at all.
    """

    def __init__(self, store: Store, layers: Sequence[Layer] = (), *, signals: bool = True) -> None:
        self.store, self.layers, self.signals = store, layers, signals

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        assert not attention  # no store holds queries, keys and values
        self.layers = layers

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Returns what is stored for the batch's documents. Raises DataError where a row is damaged."""
        # A process that has nothing to read while others have gets the types and widths of any document.
        documents = documents_in(batch)
        store, signal, hidden = self.store, None, None
        config, read = store.signal_config, documents or [0]
        if self.signals and isinstance(config, Full):
            signal = Logits(torch.from_numpy(store.logits(read).copy()))
        elif self.signals and not isinstance(config, Full):
            signal = to_sparse(store.levels(read), config, store.manifest.num_columns)
        if self.layers:
            states = store.hidden(read, self.layers)
            hidden = HiddenStates({layer: torch.from_numpy(states[layer]) for layer in self.layers})
        if documents:
            return TeacherOutput(signal, hidden)
        if hidden is not None:
            hidden = HiddenStates({layer: state[:0] for layer, state in hidden.states.items()})
        return TeacherOutput(None if signal is None else signal.at(torch.empty(0, dtype=torch.long)), hidden)


class ServerTeacher(PrefetchedTeacher):
    """Sends documents and prompts to a server, several at a time, and gets the log-probabilities of its top tokens.

    Args:
        documents: those that the batches hold; None where it is given no batches.
        vocab_size: the number of tokens that make up its distribution.
    """

    def __init__(
        self,
        config: ServerTeacherConfig,
        tokenizer: PreTrainedTokenizerBase,
        documents: DocumentSet | None,
        vocab_size: int,
    ) -> None:
        self.config, self.tokenizer, self.documents, self.vocab_size = config, tokenizer, documents, vocab_size
        self.engine = ServerEngine(tokenizer=tokenizer, **config.model_dump(exclude={"kind", "tokenizer"}))
        self._of_answers: dict[int, TopLogProbs] = {}

    def of(self, documents: DocumentSet) -> "ServerTeacher":
        """Returns the same teacher for other documents."""
        return ServerTeacher(self.config, self.tokenizer, documents, self.vocab_size)

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Takes none: a server gives no hidden states."""
        assert not layers
        assert not attention

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Returns its output for the batch's documents.

        Raises:
            StillroomError: the server gave up, or its answer does not fit the request; the error names the document.
        """
        documents, numbers = self.documents, documents_in(batch)
        assert documents is not None
        requests = ((d, documents.tokens(d), documents.target_mask(d)[1:]) for d in dict.fromkeys(numbers))
        found = self.top_log_probs(requests)
        top = TopLogProbs.concatenate([found[number] for number in numbers])
        ids, log_probs = top.padded(np.float32)
        kept, labels = torch.from_numpy(log_probs), torch.from_numpy(top.label_log_probs)
        rests = {1.0: subtracted_rests(kept, self.vocab_size).float()}
        signal = Sparse(torch.from_numpy(ids), kept, rests, label_log_probs=labels, vocab_size=self.vocab_size)
        return TeacherOutput(signal)

    def top_log_probs(self, requests: Iterable[Request]) -> dict[int, TopLogProbs]:
        """Returns the top log-probabilities at the kept positions of each document, by its number.

        Those of its last answers it gave while it wrote them, so these are not sent again. Raises as `prefetch` does.
        """
        known, self._of_answers = self._of_answers, {}
        return known | dict(self.engine.score(request for request in requests if request[0] not in known))

    def answer(
        self, prompts: Sequence[tuple[int, np.ndarray]], sampling: Sampling, *, seed: int
    ) -> list[list[np.ndarray]]:
        """Returns its answers to each prompt as tokens, int32, and keeps their log-probabilities for `top_log_probs`.

        There, the j-th answer to document ``number`` is document ``number · num_answers + j``. Raises as `prefetch`.

        Args:
            prompts: each with the number of its document.
        """
        answers = dict(self.engine.generate(prompts, **sampling._asdict(), seed=seed))
        for number, several in answers.items():
            for j, answer in enumerate(several):
                if answer.log_probs is not None:
                    self._of_answers[number * sampling.num_answers + j] = answer.log_probs
        return [[answer.tokens for answer in answers[number]] for number, _ in prompts]

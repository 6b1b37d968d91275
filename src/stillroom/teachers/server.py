"""A teacher behind an address, asked while the student trains: its likeliest tokens at each position."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stillroom.batch import Batch
from stillroom.data.dataloader import DocumentSet
from stillroom.errors import DataError
from stillroom.kernels.selection import subtracted_rests
from stillroom.layers import Layer
from stillroom.signals import Sparse, TeacherOutput
from stillroom.teachers.config import ServerTeacherConfig
from stillroom.teachers.http.answers import TopLogProbs
from stillroom.teachers.http.engine import ServerEngine


class ServerTeacher:
    """Asks a server about the documents of each batch, steps ahead, several at a time.

    Args:
        documents: those that the batches hold.
        columns: the tokens that make up its distribution.
    """

    def __init__(
        self, config: ServerTeacherConfig, tokenizer: PreTrainedTokenizerBase, documents: DocumentSet, columns: int
    ) -> None:
        self.config, self.tokenizer, self.documents, self.columns = config, tokenizer, documents, columns
        self.engine = ServerEngine(
            url=config.url,
            model=config.model,
            dialect=config.dialect,
            tokenizer=tokenizer,
            top=config.top,
            concurrency=config.concurrency,
            retries=config.retries,
            timeout_s=config.timeout_s,
            key_variable=config.key_variable,
        )

    def of(self, documents: DocumentSet) -> "ServerTeacher":
        """The same teacher of other documents."""
        return ServerTeacher(self.config, self.tokenizer, documents, self.columns)

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """It tells no inner states."""
        assert not layers
        assert not attention

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """What it says of the batch's documents.

        Raises:
            StillroomError: it gave up, or what it said does not fit what it was asked; it names the document.
        """
        numbers = [d for row in batch.documents for d in row.unique_consecutive().tolist() if d >= 0]
        asked = ((d, self.documents.tokens(d), self.documents.target_mask(d)[1:]) for d in dict.fromkeys(numbers))
        told = dict(self.engine.score(asked))
        return TeacherOutput(self._signal([told[number] for number in numbers]))

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        prefetch = self.prefetch(batch) if prefetch is None else prefetch
        return prefetch.to(batch.tokens.device)

    def _signal(self, told: Sequence[TopLogProbs]) -> Sparse:
        counts = np.concatenate([one.counts for one in told]) if told else np.zeros(0, np.int32)
        if len(counts) and not counts.min():
            raise DataError(
                "the server tells nothing of a position",
                {"asked for": f"{self.config.top} tokens", "told": 0},
                why="There is nothing to learn from there.",
                fix="Look at the server's limit of log-probabilities (vLLM: --max-logprobs), or lower teacher.top.",
            )
        there = np.arange(max(1, int(counts.max(initial=1)))) < counts[:, None]
        ids, log_probs = np.zeros(there.shape, np.int64), np.full(there.shape, -np.inf, np.float32)
        for name, filled in (("ids", ids), ("log_probs", log_probs)):
            filled[there] = np.concatenate([getattr(one, name) for one in told]) if told else []
        ids = np.where(there, ids, ids[:, :1])  # a position with fewer repeats its first
        kept = torch.from_numpy(log_probs)
        labels = np.concatenate([one.label_log_probs for one in told]) if told else np.zeros(0)
        return Sparse(
            torch.from_numpy(ids),
            kept,
            {1.0: subtracted_rests(kept, self.columns).float()},
            label_log_probs=torch.from_numpy(labels.astype(np.float32)),
            vocab_size=self.columns,
        )

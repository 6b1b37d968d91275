"""A teacher behind an address: the log-probabilities of its top tokens at each position, and its answers."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stillroom.batch import Batch
from stillroom.data.dataloader import DocumentSet
from stillroom.errors import DataError
from stillroom.kernels.selection import subtracted_rests
from stillroom.layers import Layer
from stillroom.models.generation import Sampling
from stillroom.signals import Sparse, TeacherOutput
from stillroom.teachers.base import PrefetchedTeacher, documents_in
from stillroom.teachers.config import ServerTeacherConfig
from stillroom.teachers.http.answers import TopLogProbs
from stillroom.teachers.http.engine import Request, ServerEngine


class ServerTeacher(PrefetchedTeacher):
    """Sends documents and prompts to a server, several at a time.

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
        if len(top.counts) and not top.counts.min():
            raise DataError(
                "the server tells nothing of a position",
                {"asked for": f"{self.config.top} tokens", "told": 0},
                why="There is nothing to learn from there.",
                fix="Look at the server's limit of log-probabilities (vLLM: --max-logprobs), or lower teacher.top.",
            )
        ids, log_probs = top.padded(np.float32)
        ids = np.where(np.isfinite(log_probs), ids, ids[:, :1])  # a position with fewer repeats its first
        kept = torch.from_numpy(log_probs)
        signal = Sparse(
            torch.from_numpy(ids),
            kept,
            {1.0: subtracted_rests(kept, self.vocab_size).float()},
            label_log_probs=torch.from_numpy(top.label_log_probs),
            vocab_size=self.vocab_size,
        )
        return TeacherOutput(signal)

    def top_log_probs(self, requests: Iterable[Request]) -> dict[int, TopLogProbs]:
        """Returns the top log-probabilities at the kept positions of each document, by its number.

        Those of its last answers it gave while it wrote them, so these are not sent again.

        Raises:
            StillroomError: the server gave up, or its answer does not fit the request; the error names the document.
        """
        known, self._of_answers = self._of_answers, {}
        return known | dict(self.engine.score(request for request in requests if request[0] not in known))

    def answer(
        self, prompts: Sequence[tuple[int, np.ndarray]], sampling: Sampling, *, seed: int
    ) -> list[list[np.ndarray]]:
        """Returns its answers to each prompt as tokens, int32, and keeps their log-probabilities for `top_log_probs`.

        There, the j-th answer to document ``number`` is document ``number · num_answers + j``.

        Args:
            prompts: each with the number of its document.

        Raises:
            StillroomError: as for `top_log_probs`.
        """
        answers = dict(self.engine.generate(prompts, **sampling._asdict(), seed=seed))
        for number, several in answers.items():
            for j, answer in enumerate(several):
                if answer.log_probs is not None:
                    self._of_answers[number * sampling.num_answers + j] = answer.log_probs
        return [[answer.tokens for answer in answers[number]] for number, _ in prompts]

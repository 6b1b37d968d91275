"""Counted documents: a text held in memory, tokenised, with the bytes of it that each token stands for."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.data.config import AnyData
from stillroom.data.documents import Counts, Origin, encode_all
from stillroom.data.formats import Encoded, encoder


class CountedDocuments:
    """The documents that ``prepare`` would give of the same settings, read and tokenised anew and kept in no cache.

    Args:
        template: the chat template, where rows go through one; the tokenizer's own by default.
        report: is called with the number of rows done so far.

    Raises:
        MissingError: the source, or a chat template that is needed, is not there.
        DataError: a row cannot be used, or nothing is left to learn.
    """

    def __init__(
        self,
        config: AnyData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        report: Callable[[int], None] = lambda _: None,
    ) -> None:
        origin, counts = Origin(config, tokenizer, template), Counts()
        encode = encoder(config, tokenizer, origin.template, count_bytes=True)
        kept: list[tuple[int, Encoded]] = []
        for some in encode_all(origin.source, config, encode, counts):
            kept += some
            report(counts.rows)
        self.counts, self.fingerprint, self._row_name = asdict(counts), origin.fingerprint, origin.source.name
        self._encoded = [document for _, document in kept]
        self.rows = np.array([row for row, _ in kept], dtype=np.int64)
        """int64 [documents]: the row of the source that each came from; a long row may have been split into several."""
        self.lengths = np.array([len(document.tokens) for document in self._encoded], dtype=np.int64)
        """int64 [documents]: the tokens of each."""

    def __len__(self) -> int:
        return len(self._encoded)

    def tokens(self, index: int) -> np.ndarray:
        """int32 [n]."""
        return self._encoded[index].tokens

    def learn(self, index: int) -> np.ndarray:
        """Which of its tokens are to be predicted, bool [n]; entry i speaks of token i itself."""
        return self._encoded[index].learn

    def weight(self, index: int) -> float:
        """What each of its tokens counts, for objectives that go by it; 1 unless the data say otherwise."""
        return self._encoded[index].weight

    def num_bytes(self, index: int) -> np.ndarray | None:
        """The bytes of the text that each of its tokens stands for, int32 [n]; None where the tokenizer drops some."""
        return self._encoded[index].num_bytes

    def first(self, index: int) -> int:
        """The place of its first token in its row."""
        before = index - 1
        while before >= 0 and self.rows[before] == self.rows[index]:
            before -= 1
        return int((self.lengths[before + 1 : index] - 1).sum())

    def name(self, index: int) -> str:
        """The row that it came from as a message calls it, such as "valid.jsonl line 12"."""
        return self._row_name(int(self.rows[index]))

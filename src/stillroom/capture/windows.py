"""Windows: the documents that the teacher reads, some at a time, and the batches that it reads them in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.batch import Batch
from stillroom.data.dataloader import in_batches
from stillroom.data.dataset import Documents

WINDOW_DOCUMENTS = 256
"""Documents that are batched together at most. Windows begin at multiples of their size, so a resumed capture makes
the same ones."""


@dataclass(frozen=True)
class Document:
    """One tokenised document, from the data or written by the teacher."""

    number: int
    """Its number in the store's data."""
    tokens: np.ndarray
    """int32 [n]."""
    target_mask: np.ndarray
    """bool [n]: entry i speaks of token i itself."""

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [n]: whether the token after each is to be learnt; False for the last."""
        return np.append(self.target_mask[1:], False)

    @property
    def num_kept(self) -> int:
        return int(self.target_mask[1:].sum())


def windows(documents: Documents, first: int, stop: int, size: int) -> Iterator[list[Document]]:
    """The documents ``first`` to ``stop`` (excluded), in lists of up to ``size``."""
    for start in range(first, stop, size):
        numbers = range(start, min(start + size, stop))
        yield [Document(i, documents.tokens(i), documents.target_mask(i)) for i in numbers]


class _Window:
    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents

    def tokens(self, index: int) -> np.ndarray:
        return self.documents[index].tokens

    def target_mask(self, index: int) -> np.ndarray:
        return self.documents[index].target_mask


def batches(documents: Sequence[Document], *, length: int, pack: bool, most: int, pad_token: int) -> Iterator[Batch]:
    """The documents in batches of at most ``most`` positions: packed into rows of ``length``, or sorted by length.

    ``Batch.documents`` holds each one's place in ``documents``.
    """
    lengths = np.array([len(document.tokens) for document in documents])
    order = np.arange(len(documents))
    return in_batches(_Window(documents), lengths, order, length=length, pack=pack, most=most, pad_token=pad_token)

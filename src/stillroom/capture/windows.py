"""Windows: the documents that the teacher reads some at a time, their batches, and the teacher's answers to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.batch import Batch
from stillroom.capture.config import Generate
from stillroom.data.dataloader import in_batches
from stillroom.data.dataset import Documents
from stillroom.errors import DataError
from stillroom.teachers.base import prompt_length

WINDOW_DOCUMENTS = 256
"""Documents that are batched together at most. Windows begin at multiples of their size, so a resumed capture makes
the same ones."""

WINDOW_BYTES = 2**28
"""The documents of a window have at most so many bytes of hidden states, or there is one of them."""


@dataclass(frozen=True)
class Document:
    """One tokenized document, from the data or written by the teacher."""

    number: int
    """Its number in the store's data."""
    tokens: np.ndarray
    """int32 [n]."""
    target_mask: np.ndarray
    """bool [n]: whether token i is a target."""

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [n]: whether the token after each is a target; False for the last."""
        return np.append(self.target_mask[1:], False)

    @property
    def num_kept(self) -> int:
        return int(self.target_mask[1:].sum())


def window_documents(length: int, generate: Generate | None, bytes_per_position: int) -> int:
    """Returns how many documents of up to ``length`` tokens make a window.

    Args:
        bytes_per_position: the size of a position's hidden states; 0 where none are kept.
    """
    positions = length * (1 if generate is None else generate.answers)
    return max(1, min(WINDOW_DOCUMENTS, WINDOW_BYTES // max(1, positions * bytes_per_position)))


def windows(documents: Documents, first: int, stop: int, size: int) -> Iterator[list[Document]]:
    """Yields the documents ``first`` to ``stop`` (excluded), in lists of up to ``size``."""
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
    """Yields the documents in batches of at most ``most`` positions: packed into rows of ``length``, or by length.

    ``Batch.documents`` holds the place of each in ``documents``.
    """
    lengths = np.array([len(document.tokens) for document in documents])
    order = np.arange(len(documents))
    return in_batches(_Window(documents), lengths, order, length=length, pack=pack, most=most, pad_token=pad_token)


# --- answers ---------------------------------------------------------------------------------------------------------


def prompts(documents: Sequence[Document], generate: Generate, length: int) -> list[tuple[int, np.ndarray]]:
    """Returns the prompt of each document, with the document's number: all that stands before its last targets.

    Raises:
        DataError: a document begins with its last targets, or its prompt leaves no room for an answer.
    """
    found = []
    for document in documents:
        if generate.prompt_tokens is not None:
            size = min(generate.prompt_tokens, len(document.tokens) - 1)
        else:
            size = prompt_length(document.target_mask)
        if not size:
            raise DataError(
                f"document {document.number} has no prompt",
                {"tokens": len(document.tokens), "before its last answer": 0},
                why="The teacher answers what stands before the last stretch to learn, and here nothing does.",
                fix="Use data.format=chat or prompt_completion, with data.keep at its default.",
            )
        if size + generate.max_tokens > length + 1:
            raise DataError(
                f"the prompt of document {document.number} leaves too little room for an answer",
                {"prompt": f"{size} tokens", "generate.max_tokens": generate.max_tokens, "data.length": length},
                why="Prompt and answer share a row.",
                fix="Raise data.length, lower generate.max_tokens, or leave out such rows.",
            )
        found.append((document.number, document.tokens[:size]))
    return found


def answered(
    asked: Sequence[tuple[int, np.ndarray]], answers: Sequence[Sequence[np.ndarray]], generate: Generate
) -> list[Document]:
    """Returns a document of each prompt with each of its answers; the answer's tokens are the targets.

    Document ``number · answers + j`` is the j-th answer to document ``number``.

    Raises:
        DataError: an answer is empty.
    """
    found = []
    for (number, prompt), several in zip(asked, answers, strict=True):
        for j, answer in enumerate(several):
            if not len(answer):
                raise DataError(
                    f"the teacher's answer to document {number} is empty",
                    {"prompt": f"{len(prompt)} tokens", "answer": "0 tokens"},
                    why="There is nothing in it to learn.",
                    fix="Leave that prompt out, or check the model's chat template.",
                )
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            found.append(Document(number * generate.answers + j, tokens, np.arange(len(tokens)) >= len(prompt)))
    return found

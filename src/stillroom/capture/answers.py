"""Answers: from documents to the prompts in them, and from the teacher's answers to documents again."""

from collections.abc import Sequence

import numpy as np

from stillroom.capture.config import Generate
from stillroom.capture.windows import Document
from stillroom.errors import DataError


def prompts(documents: Sequence[Document], generate: Generate, length: int) -> list[tuple[int, np.ndarray]]:
    """The prompt of each document, with the document's number: all that stands before its last stretch to learn.

    Raises:
        DataError: a document begins with what is to be learnt, or its prompt leaves no room for an answer.
    """
    found = []
    for document in documents:
        if generate.prompt_tokens is not None:
            size = min(generate.prompt_tokens, len(document.tokens) - 1)
        else:
            edges = np.flatnonzero(np.diff(document.target_mask.astype(np.int8)) == 1)
            size = int(edges[-1]) + 1 if len(edges) else 0
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
    """A document of each prompt with each of its answers; the answer is to be learnt.

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
            target_mask = np.arange(len(tokens)) >= len(prompt)
            found.append(Document(number * generate.answers + j, tokens, target_mask))
    return found

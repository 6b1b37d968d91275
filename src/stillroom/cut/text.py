"""The text on which a model is measured, in batches."""

from collections.abc import Iterator

import numpy as np

from stillroom.batch import Batch
from stillroom.data.rows import plan_rows
from stillroom.data.stream import DocumentSet, collate, group


def text_batches(
    documents: DocumentSet,
    *,
    number: int | None = None,
    length: int,
    pack: bool,
    batch_tokens: int,
    pad_token: int | None = 0,
) -> Iterator[Batch]:
    """The first ``number`` documents (all by default) as they come, in batches of at most ``batch_tokens`` positions,
    padding counted, and at least one row."""
    order = np.arange(len(documents) if number is None else min(number, len(documents)))
    rows = plan_rows(documents.lengths, length, pack, order)

    def num_positions(row: np.ndarray) -> int:
        return int((documents.lengths[row] - 1).sum())

    for some in group([rows[r] for r in range(len(rows))], num_positions, batch_tokens):
        yield collate(documents, some, pad_token if isinstance(pad_token, int) else 0)

"""The text on which a model is measured, in batches."""

from collections.abc import Iterator

import numpy as np

from stillroom.batch import Batch
from stillroom.data.stream import DocumentSet, in_batches


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
    pad = pad_token if isinstance(pad_token, int) else 0
    return in_batches(documents, documents.lengths, order, length=length, pack=pack, most=batch_tokens, pad_token=pad)

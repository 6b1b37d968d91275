"""Breakdowns: where a model differs from its teacher, by the kind of token and place; and its worst passages."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.evaluate.results import Breakdown, Passage
from stillroom.evaluate.scoring import Predicted

DECILES = 10
POSITIONS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where the bins of positions begin."""
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Where the bins of the teacher's entropy begin, in nats."""
NUM_PASSAGES = 10
PASSAGE_TOKENS = 64


def breakdowns(
    predicted: Predicted, teacher_entropy: np.ndarray, forward_kl: Mapping[str, np.ndarray]
) -> tuple[Breakdown, ...]:
    """The mean forward KL of each model by the frequency of the token that is predicted, by the number of tokens read
    before it (in its piece, where its document was split), and by the teacher's entropy."""
    frequency, frequency_labels = _by_frequency(predicted.tokens)
    position = np.digitize(predicted.position, POSITIONS) - 1
    entropy = np.clip(np.digitize(teacher_entropy, ENTROPIES) - 1, 0, None)
    return (
        _breakdown("token_frequency", frequency, frequency_labels, forward_kl),
        _breakdown("position", position, _position_labels(int(position.max()) + 1), forward_kl),
        _breakdown("teacher_entropy", entropy, _entropy_labels(), forward_kl),
    )


def _by_frequency(tokens: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The bin of each predicted token, rarest first, and the bins' labels.

    A bin holds a tenth of all predicted tokens, as nearly as may be: every token of one id, and all ids that come
    equally often, fall into the bin in which the middle of them lies.
    """
    counts = np.bincount(tokens)
    often, num_ids = np.unique(counts[counts > 0], return_counts=True)
    mass = often * num_ids
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    decile = np.minimum((middle * DECILES).astype(np.int64), DECILES - 1)
    _, bins = np.unique(decile, return_inverse=True)
    labels = []
    for b in range(int(bins.max()) + 1):
        least, most = int(often[bins == b].min()), int(often[bins == b].max())
        labels.append(f"{least:,}×" if least == most else f"{least:,}–{most:,}×")
    return bins[np.searchsorted(often, counts[tokens])], tuple(labels)


def _position_labels(number: int) -> tuple[str, ...]:
    return tuple(f"{a:,}–{b - 1:,}" for a, b in zip(POSITIONS[:number], [*POSITIONS[1:], 2**31][:number], strict=True))


def _entropy_labels() -> tuple[str, ...]:
    inner = [f"{a:g}–{b:g}" for a, b in pairwise(ENTROPIES[1:])]
    return (f"under {ENTROPIES[1]:g}", *inner, f"{ENTROPIES[-1]:g} and more")


def _breakdown(by, bins: np.ndarray, labels: tuple[str, ...], forward_kl: Mapping[str, np.ndarray]) -> Breakdown:
    counts = np.bincount(bins, minlength=len(labels)).tolist()
    means = {}
    for name, values in forward_kl.items():
        sums = np.bincount(bins, weights=values, minlength=len(labels)).tolist()
        means[name] = tuple(s / n if n else None for s, n in zip(sums, counts, strict=True))
    return Breakdown(by=by, labels=labels, num_tokens=tuple(counts), forward_kl_nats=means)


def worst_passages(
    predicted: Predicted, forward_kl: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> tuple[Passage, ...]:
    """The ten stretches of at most 64 predicted tokens of one document with the largest sum of forward KL, worst first;
    none overlaps another. A sum, so that no short document is among them for its shortness."""
    n = len(predicted)
    total = np.concatenate(([0.0], np.cumsum(forward_kl, dtype=np.float64)))
    ends_of_documents = np.searchsorted(predicted.document, predicted.document, side="right")
    starts = np.arange(n)
    ends = np.minimum(starts + PASSAGE_TOKENS, ends_of_documents)
    sums = total[ends] - total[starts]
    found = []
    while len(found) < NUM_PASSAGES and np.isfinite(best := sums.max()):
        start = int(np.flatnonzero(sums == best)[0])
        found.append(_passage(predicted, forward_kl, tokenizer, start, int(ends[start])))
        sums[(ends > start) & (starts < ends[start])] = -np.inf
    return tuple(found)


def _passage(
    predicted: Predicted, forward_kl: np.ndarray, tokenizer: PreTrainedTokenizerBase, start: int, end: int
) -> Passage:
    document, values = int(predicted.document[start]), forward_kl[start:end].astype(np.float64)
    return Passage(
        document=predicted.documents.name(document),
        first=predicted.documents.first(document) + int(predicted.position[start]) + 1,
        mean_kl_nats=float(values.mean()),
        tokens=token_texts(tokenizer, predicted.tokens[start:end].tolist()),
        kl_nats=tuple(values.tolist()),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> tuple[str, ...]:
    """Each token's own part of the text: what it adds to those before it. One that is no whole character, or adds
    nothing, is given by its name in the vocabulary."""

    def text(some: list[int]) -> str:
        found = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found if isinstance(found, str) else found[0]

    texts, before = [], ""
    names = tokenizer.convert_ids_to_tokens(tokens)
    for i in range(len(tokens)):
        now = text(tokens[: i + 1])
        added = now[len(before) :]
        whole = added and now.startswith(before) and not added.endswith("\ufffd")
        texts.append(added if whole else names[i])
        before = now
    return tuple(texts)

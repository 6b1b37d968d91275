"""BatchStream: every target exactly once and where it belongs, the same steps for every split, and exact resume."""

import json
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillroom.batch import Batch
from stillroom.data.dataloader import BatchStream
from stillroom.data.dataset import SCHEMA, Counts, Documents, _record_batch
from stillroom.data.formats import Encoded
from stillroom.errors import DataError, MismatchError

LENGTHS = st.lists(st.integers(2, 17), min_size=1, max_size=30)


def documents_of(lengths: list[int], fingerprint: str = "f") -> Documents:
    """Documents whose tokens are all different: document d holds 100 d + 1, 100 d + 2 …; every third is not learned."""
    encoded = []
    for document, length in enumerate(lengths):
        tokens = 100 * document + 1 + np.arange(length, dtype=np.int32)
        target_mask = np.arange(length) % 3 != 1
        encoded.append((document, Encoded(tokens, target_mask)))
    half = (len(encoded) + 1) // 2
    batches = [_record_batch(part) for part in (encoded[:half], encoded[half:])]
    return Documents(pa.Table.from_batches(batches, SCHEMA), Counts(), fingerprint, str)


def stream_of(documents: Documents, **settings: Any) -> BatchStream:
    given_settings = {
        "length": 16,
        "pack": True,
        "shuffle": True,
        "tokens": 40,
        "micro_tokens": 20,
        "seed": 3,
        "epochs": 1,
    }
    return BatchStream(documents, **(given_settings | settings))


def same(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    names = ("tokens", "labels", "loss_mask", "positions", "documents")
    return [len(step) for step in a] == [len(step) for step in b] and all(
        torch.equal(getattr(x, name), getattr(y, name))
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
        for name in names
    )


def pairs(step: list[Batch]) -> list[tuple[int, int, int, bool, int]]:
    """(document, position, token, keep, next token) of each real position, sorted."""
    found = []
    for batch in step:
        real = batch.documents >= 0
        columns = (batch.documents, batch.positions, batch.tokens, batch.loss_mask, batch.labels)
        found += list(zip(*(column[real].tolist() for column in columns), strict=True))
    return sorted(found)


def expected_pairs(lengths: list[int]) -> list[tuple[int, int, int, bool, int]]:
    return [
        (document, i, 100 * document + 1 + i, (i + 1) % 3 != 1, 100 * document + 2 + i)
        for document, length in enumerate(lengths)
        for i in range(length - 1)
    ]


@given(LENGTHS, st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 40))
def test_an_epoch_holds_every_target_once(
    lengths: list[int], pack: bool, shuffle: bool, tokens: int, micro_tokens: int
) -> None:
    """No target leaks over a border: each next token is the one that follows in its own document, position and all."""
    stream = stream_of(documents_of(lengths), pack=pack, shuffle=shuffle, tokens=tokens, micro_tokens=micro_tokens)
    steps = list(stream)
    assert sorted(pair for step in steps for pair in pairs(step)) == expected_pairs(lengths)
    assert stream.num_steps() == len(steps) == stream.step


@given(LENGTHS, st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_a_step_does_not_depend_on_micro_tokens(lengths: list[int], tokens: int, micro_a: int, micro_b: int) -> None:
    documents = documents_of(lengths)
    a, b = (
        stream_of(documents, tokens=tokens, micro_tokens=micro_batch, epochs=2) for micro_batch in (micro_a, micro_b)
    )
    assert [pairs(step) for step in a] == [pairs(step) for step in b]


@given(LENGTHS, st.integers(1, 60), st.integers(1, 40))
def test_budgets_hold(lengths: list[int], tokens: int, micro_tokens: int) -> None:
    for step in stream_of(documents_of(lengths), tokens=tokens, micro_tokens=micro_tokens, epochs=2):
        num_rows = sum(batch.tokens.shape[0] for batch in step)
        assert len(pairs(step)) <= tokens or num_rows == 1
        for batch in step:
            assert batch.tokens.numel() <= micro_tokens or batch.tokens.shape[0] == 1
            assert (batch.documents >= 0).any(dim=0).all(), "no wider than its longest row"
        widths = [int(count) for batch in step for count in (batch.documents >= 0).sum(dim=1)]
        assert widths == sorted(widths, reverse=True)


@given(LENGTHS, st.integers(1, 60))
def test_steps_are_as_full_as_the_budget_allows(lengths: list[int], tokens: int) -> None:
    steps = list(stream_of(documents_of(lengths), tokens=tokens, pack=False, shuffle=False))
    firsts = [min(pair[0] for pair in pairs(step)) for step in steps]
    for step, following in zip(steps[:-1], firsts[1:], strict=True):
        assert len(pairs(step)) + lengths[following] - 1 > tokens


def test_a_packed_row_in_full() -> None:
    [[batch]] = stream_of(documents_of([4, 3, 7]), length=6, shuffle=False, micro_tokens=100)
    assert batch.tokens.tolist() == [[201, 202, 203, 204, 205, 206], [1, 2, 3, 101, 102, 0]]
    assert batch.labels.tolist() == [[202, 203, 204, 205, 206, 207], [2, 3, 4, 102, 103, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, False, True, True], [False, True, True, False, True, False]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    assert batch.documents.tolist() == [[2, 2, 2, 2, 2, 2], [0, 0, 0, 1, 1, -1]]
    assert batch.tokens.dtype == batch.positions.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool


def test_padding_is_a_document_of_its_own_that_does_not_count() -> None:
    [[batch]] = stream_of(documents_of([5, 3]), pack=False, shuffle=False, micro_tokens=100, pad_token=7)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [101, 102, 7, 7]]
    assert batch.labels[1].tolist() == [102, 103, 0, 0]
    assert batch.loss_mask[1].tolist() == [False, True, False, False]
    assert batch.positions[1].tolist() == [0, 1, 0, 1]
    assert batch.documents[1].tolist() == [1, 1, -1, -1]


def test_steps_reach_over_the_end_of_an_epoch() -> None:
    steps = list(stream_of(documents_of([5, 5, 5]), shuffle=False, pack=False, tokens=8, epochs=2))
    assert [sorted({pair[0] for pair in pairs(step)}) for step in steps] == [[0, 1], [0, 2], [1, 2]]
    endless = stream_of(documents_of([5, 5, 5]), shuffle=False, pack=False, tokens=8, epochs=None)
    assert same(list(islice(endless, 3)), steps)
    assert endless.num_steps() is None
    assert len(list(islice(endless, 20))) == 20


def test_epochs_are_shuffled_anew() -> None:
    stream = stream_of(documents_of([3] * 40), pack=False, tokens=80, epochs=3, micro_tokens=80)
    orders = [tuple(batch.documents[:, 0].tolist()) for [batch] in stream]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(40)) for order in orders)


@given(LENGTHS, st.booleans(), st.integers(1, 60), st.data())
def test_resumed_is_uninterrupted(lengths: list[int], shuffle: bool, tokens: int, data: st.DataObject) -> None:
    documents = documents_of(lengths)
    whole = list(stream_of(documents, shuffle=shuffle, tokens=tokens, epochs=3))
    at = data.draw(st.integers(0, len(whole)))
    first = stream_of(documents, shuffle=shuffle, tokens=tokens, epochs=3)
    before = list(islice(first, at))
    state = json.loads(json.dumps(first.state()))
    resumed = stream_of(documents, shuffle=shuffle, tokens=tokens, epochs=3)
    resumed.restore(state)
    assert same(before + list(resumed), whole)
    assert resumed.step == len(whole)


def test_another_micro_budget_or_more_epochs_may_resume() -> None:
    documents = documents_of([5] * 9)
    first = stream_of(documents, tokens=8)
    next(first)
    resumed = stream_of(documents, tokens=8, micro_tokens=4, epochs=5)
    resumed.restore(first.state())
    assert pairs(next(resumed)) == pairs(next(first))


@pytest.mark.parametrize("setting", [{"seed": 4}, {"tokens": 41}, {"length": 17}, {"pack": False}, {"shuffle": False}])
def test_other_settings_do_not_resume(setting: dict) -> None:
    documents = documents_of([5, 6, 7])
    with pytest.raises(MismatchError, match=f"differs in its {next(iter(setting))}"):
        stream_of(documents, **setting).restore(stream_of(documents).state())


def test_other_documents_do_not_resume() -> None:
    with pytest.raises(MismatchError, match="differs in its documents"):
        stream_of(documents_of([5], "g")).restore(stream_of(documents_of([5], "f")).state())


@pytest.mark.parametrize("change", [{"epoch": None}, {"row": -1}, {"step": "3"}])
def test_a_state_that_is_not_whole(change: dict) -> None:
    stream = stream_of(documents_of([5]))
    state = {**stream.state(), **change}
    with pytest.raises(DataError, match="not whole"):
        stream.restore(state)
    del state["row"]
    with pytest.raises(DataError, match="missing: row"):
        stream.restore(state)


def test_nothing_to_stream() -> None:
    with pytest.raises(ValueError, match="at least one document"):
        stream_of(documents_of([]))

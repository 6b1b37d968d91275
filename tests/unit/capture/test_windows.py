"""Windows and the batches in them: every document once, whatever its place."""

import numpy as np
import pytest

from conftest import build_documents
from stillroom.capture.signals import Document, batches, windows

LENGTHS = [6, 33, 12, 7, 29, 31, 18, 33, 5, 24, 9, 2, 16, 28, 33, 11]


def documents(lengths: list[int] = LENGTHS) -> list[Document]:
    made = build_documents(lengths)
    return [Document(i, made.tokens(i), made.target_mask(i)) for i in range(len(made))]


# --- documents -------------------------------------------------------------------------------------------------------


def test_keep_speaks_of_the_token_after_each():
    document = Document(3, np.arange(5, dtype=np.int32), np.array([True, False, True, True, False]))
    assert document.loss_mask.tolist() == [False, True, True, False, False]
    assert document.loss_mask.sum() == 2


def test_the_first_token_is_never_predicted():
    document = Document(0, np.arange(3, dtype=np.int32), np.ones(3, bool))
    assert document.loss_mask.tolist() == [True, True, False]
    assert document.loss_mask.sum() == 2


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "stop", "sizes"), [(0, 16, [5, 5, 5, 1]), (3, 13, [5, 5]), (4, 5, [1]), (7, 7, [])])
def test_windows_hold_each_document_once_and_in_order(first, stop, sizes):
    source = build_documents(LENGTHS)
    found = list(windows(source, first, stop, 5))
    assert [len(window) for window in found] == sizes
    flat = [document for window in found for document in window]
    assert [document.number for document in flat] == list(range(first, stop))
    for document in flat:
        assert np.array_equal(document.tokens, source.tokens(document.number))
        assert np.array_equal(document.target_mask, source.target_mask(document.number))


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("most", [32, 40, 64, 1000])
def test_batches_hold_each_position_once(pack, most):
    asked = documents()
    found: dict[int, list[tuple[int, int, int, bool]]] = {}
    for batch in batches(asked, length=32, pack=pack, most=most, pad_token=299):
        assert batch.tokens.numel() <= most
        assert batch.tokens.shape[1] <= 32
        flat = [
            getattr(batch, name).flatten().tolist()
            for name in ("documents", "positions", "tokens", "labels", "loss_mask")
        ]
        for place, position, token, following, loss_mask in zip(*flat, strict=True):
            if place >= 0:
                found.setdefault(place, []).append((position, token, following, loss_mask))
            else:
                assert (token, loss_mask) == (299, False)
        if not pack:
            assert all(len(set(row.tolist()) - {-1}) == 1 for row in batch.documents)
    assert sorted(found) == list(range(len(asked)))
    for place, positions in found.items():
        document, n = asked[place], len(asked[place].tokens)
        tokens = document.tokens.tolist()
        assert positions == list(
            zip(range(n - 1), tokens[:-1], tokens[1:], document.loss_mask[:-1].tolist(), strict=True)
        )


def test_batches_speak_of_places_and_not_of_numbers():
    asked = [Document(1000 + i, d.tokens, d.target_mask) for i, d in enumerate(documents([6, 9]))]
    (batch,) = batches(asked, length=32, pack=True, most=32, pad_token=0)
    assert set(batch.documents.flatten().tolist()) - {-1} == {0, 1}


def test_packed_rows_are_fewer():
    asked = documents([9] * 12)
    packed, plain = (list(batches(asked, length=32, pack=pack, most=32, pad_token=0)) for pack in (True, False))
    assert sum(len(batch.tokens) for batch in packed) == 3
    assert sum(len(batch.tokens) for batch in plain) == 12


def test_the_longest_come_first_so_that_there_is_little_padding():
    found = list(batches(documents(), length=32, pack=False, most=64, pad_token=0))
    widths = [batch.tokens.shape[1] for batch in found]
    assert widths == sorted(widths, reverse=True)


def test_no_documents_make_no_batches():
    assert list(batches([], length=32, pack=True, most=32, pad_token=0)) == []


def test_a_document_that_is_too_long_is_not_cut():
    with pytest.raises(ValueError, match="a row holds 1 to 32"):
        list(batches(documents([34]), length=32, pack=True, most=64, pad_token=0))

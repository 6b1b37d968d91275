"""Show: what is in a store, in words that a terminal can show."""

import numpy as np
import pytest

from stillroom.store.reader import Store
from stillroom.store.show import COLUMNS, describe, histogram, show_row, token_texts
from stillroom.terminal import escaped, fitted, width

from .stores import EVERY
from .whole import make_store


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> dict[str, Store]:
    return {kind: Store(make_store(tmp_path_factory.mktemp(kind) / "s", tiny_tokenizer, kind)) for kind in EVERY}


@pytest.mark.parametrize("kind", EVERY)
def test_what_a_store_is(kind, made):
    store = made[kind]
    m = store.manifest
    text = describe(store)
    for part in (
        "a teacher",
        "304 columns",
        "tiny",
        "text.jsonl",
        m.signal.kind,
        "8 documents, 78 tokens, 46 positions",
    ):
        assert part in text
    assert f"{m.size_bytes / m.positions:.2f} in all" in text
    assert max(map(width, text.splitlines())) <= COLUMNS
    assert ("entries of a position, over all positions" in text) == (kind != "full")


@pytest.mark.parametrize("kind", EVERY)
def test_bytes_of_the_signal_are_those_of_its_column(kind, made):
    store = made[kind]
    column = sum(store.signal_bytes(i) for i in range(len(store)))
    tables = sum(shard.tables_bytes for shard in store.manifest.shards)
    assert f"{(column + tables) / store.manifest.positions:.2f} a position for the signal" in describe(store)


@pytest.mark.parametrize("kind", EVERY)
def test_a_row(kind, made, tiny_tokenizer):
    store = made[kind]
    text = show_row(store, 2)
    assert max(map(width, text.splitlines())) <= COLUMNS
    assert "document 16 of text.jsonl (row 2 of 8): 14 tokens, 9 positions" in text.splitlines()[0]
    texts = token_texts(tiny_tokenizer)
    positions = [line for line in text.splitlines() if line[:6].strip().isdecimal()]
    assert len(positions) == 14
    kept = [line for line in positions if "→" in line]
    assert [line.split()[0] for line in kept] == [str(i) for i in np.flatnonzero(store.loss_mask(2))]
    for line, i in zip(kept, np.flatnonzero(store.loss_mask(2)), strict=True):
        assert texts(int(store.tokens(2)[i])) in line
        assert texts(int(store.tokens(2)[i + 1])) in line.split("→")[1]


def test_the_candidates_of_a_row_are_the_stored_ones(made, tiny_tokenizer):
    store = made["top_k"]
    levels, texts = store.levels([2]), token_texts(tiny_tokenizer)
    text = show_row(store, 2)
    for token in levels.ids.tolist():
        assert texts(token) in text
    assert text.count("[rest ") == 9
    assert "rest at T=2" in text
    assert "entropy" in text


def test_draws_are_marked(made):
    assert "~" in show_row(made["head_and_sample"], 2)
    assert "a draw " in show_row(made["head_and_sample"], 2)


def test_a_document_without_a_signal(made):
    assert "→" not in show_row(made["top_k"], 1)


def test_a_store_of_nothing(tmp_path, tiny_tokenizer):
    store = Store(make_store(tmp_path / "s", tiny_tokenizer, lengths=()))
    assert "0 documents, 0 tokens" in describe(store)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\t\r", "\\t\\r"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("\u202eevil", "\\u202eevil"),
        ("\u2028\u200b\ufeff", "\\u2028\\u200b\\ufeff"),
        ("\u0301x", "\\u0301x"),
        ("\U000e0001", "\\U000e0001"),
        ("\\n", "\\\\n"),
        (" plain, 你好 é 🙂", " plain, 你好 é 🙂"),
        ("\ud800", "\\ud800"),
    ],
)
def test_nothing_that_a_terminal_would_obey_is_left(text, shown):
    assert escaped(text) == shown
    assert shown.isprintable()


def test_names_in_the_manifest_are_escaped_too(tmp_path, tiny_tokenizer):
    from stillroom.store.format import SourceInfo

    evil = SourceInfo(name="data\x1b[2J\n", fingerprint="1")
    store = Store(make_store(tmp_path / "s", tiny_tokenizer, data=evil))
    for text in (describe(store), show_row(store, 0)):
        assert "\x1b" not in text
        assert "data\\x1b[2J\\n" in text


@pytest.mark.parametrize("text", ["", "abc", "你好吗", "a" * 40, "好" * 40])
def test_fitted_takes_just_so_many_columns(text):
    assert width(fitted(text, 9)) == 9


def test_an_id_that_no_token_has_is_shown_by_its_number(tiny_tokenizer):
    assert token_texts(tiny_tokenizer)(303) == "<303>"


def test_a_token_keeps_its_space(tiny_tokenizer):
    (token,) = tiny_tokenizer.encode(" drops", add_special_tokens=False)
    assert token_texts(tiny_tokenizer)(token) == "' drops'"


def test_histogram_counts_every_position_once():
    lines = histogram(np.array([1, 1, 2, 5, 5, 5]), 100)
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert [line.split()[1] for line in lines] == ["33.33%", "16.67%", "0.00%", "0.00%", "50.00%"]
    wide = histogram(np.arange(1, 1001), 100)
    assert sum(float(line.split()[1].rstrip("%")) for line in wide) == pytest.approx(100, abs=0.1)
    assert max(map(len, wide)) <= 100

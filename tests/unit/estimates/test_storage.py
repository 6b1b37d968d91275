"""Storage: full logits by hand, those that were measured, and exact ones."""

import json
from pathlib import Path

import pytest

from stillroom.estimates import storage
from stillroom.store.config import HiddenStatesConfig
from stillroom.store.quantize import hidden_bytes_per_position

RESULTS = json.loads((Path(__file__).parents[3] / "benchmarks" / "store.json").read_text())


def test_full_logits_of_fifty_thousand_prompts():
    positions, columns = 50_000 * 512, 100_000
    assert positions * columns == 2.56e12
    assert positions * columns / 2**40 == pytest.approx(2.33, abs=0.005)
    assert positions * storage.full(columns).bytes_per_position / 2**40 == pytest.approx(4.66, abs=0.005)


def test_the_store_takes_what_was_measured():
    for name, kind in {"top_k 50": storage.stored(4096, "top_k"), "default": storage.stored(4096)}.items():
        assert kind.bytes_per_position == pytest.approx(RESULTS[name]["bytes_per_position"], rel=0.01)
        assert kind.source.startswith("measured")
    large = RESULTS["128,256 columns"]
    for name, kind in {"top_k 50": storage.stored(128_256, "top_k"), "default": storage.stored(128_256)}.items():
        without_tokens = kind.bytes_per_position - 4 - storage.KEEP_AND_ARROW
        tables = storage.TABLES["top_k" if name == "top_k 50" else "drawn"]
        assert without_tokens == pytest.approx(large[name]["bytes_per_position"] + tables, rel=0.01)


def test_plain_columns_have_ids_as_wide_as_they_need():
    assert storage.plain_top_k(65_536, 50).bytes_per_position == 50 * (2 + 2)
    assert storage.plain_top_k(128_256, 32).bytes_per_position == 192
    assert storage.plain_top_k(20, 50).bytes_per_position == 20 * (2 + 2)  # there are no more


def test_other_numbers_of_entries_are_said_to_be_extrapolated():
    assert "extrapolated" in storage.stored(4096, "top_k", 128).source
    assert storage.stored(4096, "top_p").name.startswith("store, at most")


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_hidden_states_are_what_the_store_writes(form):
    config = HiddenStatesConfig(layers=(0, 3, "final_norm"), format=form)
    assert storage.hidden_states(192, 3, form).bytes_per_position == hidden_bytes_per_position(config, 192)

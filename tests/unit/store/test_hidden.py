"""Stored hidden states: what is read is what was written, within the rounding of its format; or it is a clear error."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from stillroom.errors import DataError, MismatchError
from stillroom.store.check import check
from stillroom.store.concat import concat
from stillroom.store.config import Full, HiddenStatesConfig
from stillroom.store.format import hidden_crc32, row_crc32, schema
from stillroom.store.quantize import MAX_STATE, MIN_SCALE, decode_hidden, encode_hidden, hidden_bytes_per_position
from stillroom.store.reader import Store
from stillroom.store.show import describe, left_out, show_row, token_texts
from stillroom.store.writer import StoreWriter

from .stores import (
    BFLOAT16,
    EVERY,
    INT8,
    WIDTH,
    add,
    arrow_bytes,
    build_documents,
    build_manifest,
    build_states,
    change_manifest,
    files,
    hidden_changes,
    read_table,
    replace_file,
    says,
    verify,
    with_hidden,
    write,
)
from .test_damage import read_all
from .test_writer import capture, capture_killed
from .whole import make_store

FORMATS = [INT8, BFLOAT16]
SIGNAL = EVERY["top_k"]


def read(data: bytes, config: HiddenStatesConfig, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [layers, kept, width]."""
    states = {layer: np.empty(shape[1:], np.float32) for layer in config.layers}
    decode_hidden(data, config, shape[2], shape[1], states)
    return np.stack(list(states.values()))


def build(path: Path, config: HiddenStatesConfig = INT8, **settings) -> Path:
    return write(path, SIGNAL, with_hidden(build_documents(SIGNAL), config), **hidden_changes(config), **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    return make_store(tmp_path_factory.mktemp("hidden") / "store", tiny_tokenizer, "top_k", hidden=INT8)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


# --- a row's bytes ---------------------------------------------------------------------------------------------------


def test_a_position_takes_exactly_so_many_bytes():
    states = torch.randn(3, 5, WIDTH)
    assert len(encode_hidden(states, INT8)) == 5 * hidden_bytes_per_position(INT8, WIDTH) == 5 * 3 * (4 + WIDTH)
    assert (
        len(encode_hidden(states[:2], BFLOAT16)) == 5 * hidden_bytes_per_position(BFLOAT16, WIDTH) == 5 * 2 * 2 * WIDTH
    )


def test_int8_is_within_half_a_scale_and_keeps_the_largest_channel():
    states = torch.randn(3, 40, WIDTH) * torch.logspace(-30, 30, 40)[:, None]
    states[1, 3] = 0.0
    found = read(encode_hidden(states, INT8), INT8, (3, 40, WIDTH))
    largest = states.abs().amax(-1, keepdim=True).numpy()
    assert (np.abs(found - states.numpy()) <= largest / 127 / 2 * (1 + 1e-5)).all()
    assert np.abs(found).max(-1, keepdims=True) == pytest.approx(largest, rel=1e-6)
    assert not found[1, 3].any()


def test_bfloat16_rounds_to_the_nearest_even():
    states = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1e-30, MAX_STATE, 0.0]).expand(2, 1, WIDTH)
    found = read(encode_hidden(states, BFLOAT16), BFLOAT16, (2, 1, WIDTH))
    assert found[0, 0, :3].tolist() == [1.0, 1.0, 1 + 2**-6]
    assert np.array_equal(found, states.to(torch.bfloat16).float().numpy())


def test_states_of_any_size_that_bfloat16_holds_can_be_kept():
    for size in (MAX_STATE, 127 * MIN_SCALE, MIN_SCALE, 1e-45):
        states = torch.full((3, 1, WIDTH), size)
        found = read(encode_hidden(states, INT8), INT8, (3, 1, WIDTH))
        assert found == pytest.approx(states.numpy() if size > MIN_SCALE else np.zeros_like(states), rel=1e-6)


def test_the_format_is_what_it_was():
    """Byte by byte, as docs/formats/store.md tells it."""
    states = torch.tensor([[[127.0, -63.6, 0.0], [0.0, 0.0, 0.0]], [[-254.0, 3.0, 1.0], [1.27, 0.5, 0.0]]])
    two = HiddenStatesConfig(layers=(0, "final_norm"))
    golden = bytes.fromhex("0000803f 00000000 7fc000 000000 00000040 0ad7233c 810200 7f3200")
    assert encode_hidden(states, two) == golden
    half = HiddenStatesConfig(layers=(0, "final_norm"), format="bfloat16")
    golden = bytes.fromhex("fe427ec20000 000000000000 7ec34040803f a33f003f0000")
    assert encode_hidden(states, half) == golden
    document = 3, np.array([1, 65536]), np.array([True, False])
    of_document = bytes.fromhex("0300000000000000 01000000 00000100 01 00")
    assert hidden_crc32(*document, golden) == zlib.crc32(of_document + golden)
    assert row_crc32(*document, b"said", 258) == zlib.crc32(of_document + b"said" + bytes.fromhex("02010000"))


# --- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", FORMATS, ids=lambda config: config.format)
@pytest.mark.parametrize("kind", ["full", "top_k"])
def test_what_is_read_is_what_was_written_whatever_the_order(config, kind, tmp_path):
    documents = with_hidden(build_documents(EVERY[kind]), config)
    store = Store(write(tmp_path / "store", EVERY[kind], documents, **hidden_changes(config)))
    assert store.manifest.format == 2
    assert says(store, documents)
    assert store.layers == config.layers
    order = [6, 1, 0, 3]
    found = store.hidden(order)
    wanted = torch.cat([build_states(documents[i], config) for i in order], 1).numpy()
    for state, layer in zip(wanted, config.layers, strict=True):
        largest = np.abs(state).max(-1, keepdims=True)
        assert (np.abs(found[layer] - state) <= largest / (254 if config == INT8 else 256) * (1 + 1e-5)).all()
    alone = store.hidden(order, [config.layers[-1]])
    assert list(alone) == [config.layers[-1]]
    assert np.array_equal(alone[config.layers[-1]], found[config.layers[-1]])
    assert store.hidden([1])[config.layers[0]].shape == (0, WIDTH)  # a document of one token
    for number in range(len(store.shards)):
        verify(store, number)


def test_layers_are_stored_in_the_order_of_a_model():
    assert INT8.layers == ("embeddings", 1, "final_norm")
    with pytest.raises(ValueError, match="named twice"):
        HiddenStatesConfig(layers=(1, 1))


def test_a_layer_that_is_not_stored_is_refused_with_those_that_are(made, tmp_path):
    with pytest.raises(MismatchError, match="does not hold layer 2") as raised:
        Store(made).hidden([0], [1, 2])
    assert raised.value.values == {"asked for": 2, "stored": "embeddings, 1, final_norm"}
    plain = Store(write(tmp_path / "plain", SIGNAL, build_documents(SIGNAL)))
    assert (plain.layers, plain.hidden([0, 1])) == ((), {})
    with pytest.raises(MismatchError, match="does not hold layer 2") as raised:
        plain.hidden([0], [2])
    assert raised.value.values["stored"] == "no hidden states"


def test_signals_alone_are_read_without_the_hidden_states(copy, monkeypatch):
    """Damage there does not touch them, and the column is not opened."""
    data = bytearray((copy / "00000.arrow").read_bytes())
    hidden = bytes(Store(copy).hidden_bytes(0))
    data[data.index(hidden) + 3] ^= 1
    replace_file(copy, "00000.arrow", bytes(data))
    store = Store(copy)
    with monkeypatch.context() as patch:
        patch.setattr("stillroom.store.reader.StoredShard.hidden_bytes", None)
        assert says(store, build_documents(SIGNAL, columns=304))
    with pytest.raises(DataError, match=r"hidden states of 00000\.arrow row 0"):
        store.hidden([0])
    assert any("hidden states of 00000.arrow row 0" in str(problem) for problem in check(copy).problems)


def test_a_store_without_them_says_nothing_of_them(tmp_path):
    path = write(tmp_path / "store", SIGNAL, build_documents(SIGNAL))
    assert b"hidden" not in b"".join(files(path).values())
    assert b"num_layers" not in (path / "manifest.json").read_bytes()
    assert Store(path).manifest.format == 1


def test_a_shard_ends_also_when_it_has_many_bytes_of_them(tmp_path):
    documents = with_hidden(build_documents(SIGNAL, [9] * 6), INT8)
    each = 5 * hidden_bytes_per_position(INT8, WIDTH)
    manifest = build_manifest(SIGNAL, **hidden_changes(INT8))
    with StoreWriter(tmp_path / "store", manifest, shard_hidden_bytes=2 * each) as writer:
        add(writer, documents)
        writer.finish()
    assert [shard.documents for shard in Store(tmp_path / "store").manifest.shards] == [2, 2, 2]


def test_record_batches_hold_few_bytes_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("stillroom.store.writer.BATCH_HIDDEN_BYTES", 10 * hidden_bytes_per_position(INT8, WIDTH))
    store = Store(build(tmp_path / "store", shard_positions=10**6))
    assert [len(batch) for batch in store.shards[0].batches] == [3, 3, 1, 1]
    assert says(store, build_documents(SIGNAL))
    found = [store.hidden([i])[1] for i in (7, 0, 5)]
    assert np.array_equal(np.concatenate(found), store.hidden([7, 0, 5])[1])


def test_killed_at_a_shard_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    full = Full(kind="full")
    documents = with_hidden(build_documents(full, (9, 14, 20, 5)), INT8)
    changes = hidden_changes(INT8)
    wanted = files(write(tmp_path / "whole", full, documents, **changes))
    resumed = set()
    for at in range(4, 100, 5):
        path = tmp_path / str(at)
        if capture_killed(path, full, documents, at, after=False, **changes):
            break
        resumed.add(capture(path, full, documents, **changes))
        assert files(path) == wanted
    assert len(resumed) >= 3


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(hidden_width=WIDTH + 1),
        lambda m: m.update(hidden_width=2**20),
        lambda m: m.update(hidden_width=0),
        lambda m: m.update(num_layers=1),
        lambda m: m.pop("num_layers"),
        lambda m: m.pop("hidden"),
        lambda m: m.update(format=1),
        lambda m: m.update(format=3),
        lambda m: m.update(format=True),
        lambda m: m["hidden"].update(format="bfloat16"),
        lambda m: m["hidden"].update(layers=[0, 1]),
        lambda m: m["hidden"].update(layers=[]),
        lambda m: m["hidden"]["layers"].reverse(),
    ],
)
def test_a_hostile_manifest(change, copy):
    change_manifest(copy, change)
    with pytest.raises(DataError):
        read_all(copy)


def put(path: Path, states: bytes, *, row: int = 0) -> None:
    """Puts other bytes in the place of a row's hidden states, with checksums that fit."""
    rows = read_table(path).to_pylist()
    r = rows[row]
    document = r["document"], np.array(r["tokens"]), np.array(r["keep"], bool)
    r["hidden"], r["hidden_crc32"] = states, hidden_crc32(*document, states)
    r["crc32"] = row_crc32(*document, r["signal"], r["hidden_crc32"])
    replace_file(path, "00000.arrow", arrow_bytes(pa.Table.from_pylist(rows, schema(304, hidden=True))))


@pytest.mark.parametrize(
    "scale", [np.float32(x) for x in ("nan", "inf", -1.0, -0.0, 3e36)], ids=["nan", "inf", "-1", "-0", "3e36"]
)
def test_a_bad_scale_is_found(scale, copy):
    good = bytes(Store(copy).hidden_bytes(0))
    put(copy, scale.tobytes() + good[4:])
    with pytest.raises(DataError, match="a scale of hidden states"):
        Store(copy).hidden([0])
    assert any("a scale of hidden states" in str(problem) for problem in check(copy).problems)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda _: b"", lambda b: b[:-1] + b"\x80"])
def test_states_that_do_not_fit_though_their_checksum_is_right(change, copy):
    put(copy, change(bytes(Store(copy).hidden_bytes(0))))
    with pytest.raises(DataError):
        Store(copy).hidden([0])


def test_bfloat16_that_is_not_finite_is_found(tmp_path, tiny_tokenizer):
    path = make_store(tmp_path / "store", tiny_tokenizer, "top_k", hidden=BFLOAT16)
    put(path, bytes(Store(path).hidden_bytes(0))[:-2] + b"\x80\x7f")
    with pytest.raises(DataError, match="not finite"):
        Store(path).hidden([0])


def everything(path: Path) -> bytes:
    """All that a store says, its hidden states too."""
    read_all(path)
    store = Store(path)
    return b"".join(state.tobytes() for state in store.hidden(range(len(store))).values())


@pytest.mark.parametrize("name", ["00000.arrow", "manifest.json"])
def test_cut_or_flipped_it_is_refused_or_says_the_same(name, copy):
    """Also where size and checksum were made to fit."""
    wanted, whole = everything(copy), (copy / name).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
        refused(copy, name, bytes(data), wanted)
    for size in (1, len(whole) // 3, len(whole) // 2, len(whole) - 10):
        assert refused(copy, name, whole[:size], wanted)


def refused(path: Path, name: str, data: bytes, wanted: bytes) -> bool:
    """Whether such a file is refused; where it is not, the store says what it said."""
    manifest = (path / "manifest.json").read_bytes()
    try:
        replace_file(path, name, data) if name.endswith(".arrow") else (path / name).write_bytes(data)
        assert everything(path) == wanted
    except DataError:
        return True
    finally:
        (path / "manifest.json").write_bytes(manifest)
    return False


# --- tools -----------------------------------------------------------------------------------------------------------

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path, tiny_tokenizer) -> Make:
    return lambda name, **settings: make_store(tmp_path / name, tiny_tokenizer, "top_k", **settings)


@pytest.mark.parametrize("how", ["copied", "numbered anew", "put in order"])
def test_merged_stores_keep_them(how, make, tmp_path):
    if how == "numbered anew":
        other = {"name": "other", "fingerprint": "44"}
        paths = [make("a", hidden=INT8), make("b", hidden=INT8, said=1, data=other)]
    else:
        first = 100 if how == "copied" else 1
        paths = [make("ab"[i], hidden=INT8, said=i, first=first * i, part=(i, 2)) for i in range(2)]
    concat(paths, tmp_path / "out")
    assert check(tmp_path / "out").problems == []
    stores, out = [Store(path) for path in paths], Store(tmp_path / "out")
    order = [(i, row) for row in range(8) for i in range(2)] if how == "put in order" else [
        (i, row) for i in range(2) for row in range(8)]  # fmt: skip
    for place, (i, row) in enumerate(order):
        assert bytes(out.hidden_bytes(place)) == bytes(stores[i].hidden_bytes(row))


@pytest.mark.parametrize("other", [None, BFLOAT16, HiddenStatesConfig(layers=("embeddings", 1))])
def test_stores_of_other_hidden_states_are_not_merged(other, make, tmp_path):
    paths = [make(f"p{i}", hidden=config, first=100 * i, part=(i, 2)) for i, config in enumerate((INT8, other))]
    with pytest.raises(MismatchError, match="differ in their hidden"):
        concat(paths, tmp_path / "out")


def test_they_are_checked_and_shown_and_not_exported(made, tiny_tokenizer):
    assert check(made).problems == []
    store = Store(made)
    assert "6 channels of layers embeddings, 1, final_norm in int8: 30 bytes a position" in describe(store)
    text = show_row(store, 0, token_texts(tiny_tokenizer))
    rms = np.sqrt(np.square(store.hidden([0])["final_norm"]).mean())
    assert f"final_norm: {rms:.3g}" in text
    assert "hidden states of layers embeddings, 1, final_norm" in (left_out(store) or "")

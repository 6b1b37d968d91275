"""The codec gives back what it was given, survives what it was not, and writes the same bytes for ever."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.store.codec import Codec
from stillroom.store.quantize import LogProbCodes

MOST = (1 << 24) - 1
quick = settings(deadline=None, max_examples=60)
numbers = st.one_of(st.integers(0, 12), st.integers(0, MOST))


def int32(values) -> np.ndarray:
    return np.array(values, np.int32)


@st.composite
def signals(draw, max_columns: int = 12):
    """Tokens, levels, number of columns and offsets of rows: few positions, every kind of value."""
    num_columns = draw(st.integers(1, max_columns))
    num_side, size = draw(st.integers(0, 2)), draw(st.integers(0, 6))
    tokens, counts, ids, levels, sample_counts, sample_ids, sample_repeats, side = ([] for _ in range(8))
    for _ in range(size):
        order = draw(st.permutations(range(num_columns)))
        count = draw(st.integers(0, num_columns))
        drawn = draw(st.integers(0, num_columns - count))
        tokens.append(draw(st.integers(0, num_columns - 1)))
        counts.append(count)
        sample_counts.append(drawn)
        ids += order[:count]
        levels += sorted(draw(st.lists(numbers, min_size=count, max_size=count)))
        sample_ids += order[count : count + drawn]
        sample_repeats += [1 + draw(st.integers(0, MOST - 1)) for _ in range(drawn)]
        side.append([draw(numbers) for _ in range(num_side)])
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    table = int32(side).reshape(size, num_side)
    found = LogProbCodes(
        int32(counts), int32(ids), int32(levels), int32(sample_counts), int32(sample_ids), int32(sample_repeats), table
    )
    return int32(tokens), found, num_columns, np.array([0, *cuts, size], np.int64)


def made(seed: int, size: int = 200, num_columns: int = 300, exact: int = 6):
    """Signals with something to learn: the ids after a token lie near it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, num_columns, size)
    near = [(token + rng.permutation(40)[: exact + 3]) % num_columns for token in tokens]
    levels = LogProbCodes(
        counts=np.full(size, exact, np.int32),
        ids=int32(np.concatenate([row[:exact] for row in near])),
        levels=int32(np.sort(rng.integers(0, 60, (size, exact)), axis=1).ravel()),
        sample_counts=np.full(size, 3, np.int32),
        sample_ids=int32(np.concatenate([row[exact:] for row in near])),
        sample_repeats=int32(rng.integers(1, 4, 3 * size)),
        side=int32(rng.integers(0, 500, (size, 2))),
    )
    return int32(tokens), levels, num_columns, np.arange(0, size + 1, 20, dtype=np.int64)


def canonical(levels: LogProbCodes) -> list:
    """The numbers, the draws of each position sorted by id, for their order has no meaning."""
    order = np.lexsort((levels.sample_ids, np.repeat(np.arange(len(levels)), levels.sample_counts)))
    names = ("counts", "ids", "levels", "sample_counts", "side")
    kept = [getattr(levels, name).tolist() for name in names]
    return [*kept, levels.sample_ids[order].tolist(), levels.sample_repeats[order].tolist()]


def assert_valid(levels: LogProbCodes, num_columns: int) -> None:
    """What every decoded Levels must be, damaged or not."""
    assert levels.counts.sum() == len(levels.ids) == len(levels.levels)
    assert levels.sample_counts.sum() == len(levels.sample_ids) == len(levels.sample_repeats)
    entries, draws = np.cumsum([0, *levels.counts]), np.cumsum([0, *levels.sample_counts])
    for p in range(len(levels)):
        ids = [*levels.ids[entries[p] : entries[p + 1]], *levels.sample_ids[draws[p] : draws[p + 1]]]
        assert len(set(ids)) == len(ids)
        assert all(0 <= i < num_columns for i in ids)
        assert (np.diff(levels.levels[entries[p] : entries[p + 1]]) >= 0).all()
    for values in (levels.levels, levels.side, levels.sample_repeats - 1):
        assert values.size == 0 or (values.min() >= 0 and values.max() <= MOST)


@quick
@given(signals())
def test_rows_come_back_as_they_were(signal):
    tokens, levels, num_columns, offsets = signal
    codec = Codec.train(tokens, levels, num_columns)
    again = Codec.from_bytes(codec.to_bytes(), num_columns, levels.side.shape[1])
    rows = codec.encode(tokens, levels, offsets)
    assert rows == again.encode(tokens, levels, offsets)
    assert canonical(again.decode(rows, tokens, offsets)) == canonical(levels)


@quick
@given(signals(max_columns=5), st.integers(0, 9))
def test_tables_of_other_data_write_any_data(signal, seed):
    tokens, levels, num_columns, offsets = signal
    other = made(seed, 40, num_columns=41)
    codec = Codec.train(
        other[0], LogProbCodes(**{**other[1].__dict__, "side": np.zeros((40, levels.side.shape[1]), np.int32)}), 41
    )
    assert num_columns < 41
    assert canonical(codec.decode(codec.encode(tokens, levels, offsets), tokens, offsets)) == canonical(levels)


def test_any_row_is_read_by_itself():
    tokens, levels, num_columns, offsets = made(1)
    codec = Codec.train(tokens, levels, num_columns)
    rows = codec.encode(tokens, levels, offsets)
    first, stop = offsets[4], offsets[5]
    alone = codec.decode([rows[4]], tokens[first:stop], np.array([0, stop - first]))
    assert canonical(alone) == canonical(levels.slice(first, stop))


def test_learnt_tables_save_bytes():
    tokens, levels, num_columns, offsets = made(2, size=6000, num_columns=200)
    learnt = Codec.train(tokens, levels, num_columns)
    shuffled = Codec.train(np.random.default_rng(0).permutation(tokens), levels, num_columns)
    sizes = [sum(map(len, codec.encode(tokens, levels, offsets))) for codec in (learnt, shuffled)]
    assert sizes[0] < 0.95 * sizes[1]


def test_the_same_data_gives_the_same_bytes():
    tokens, levels, num_columns, offsets = made(3)
    found = [Codec.train(tokens, levels, num_columns) for _ in range(2)]
    assert found[0].to_bytes() == found[1].to_bytes()
    assert found[0].encode(tokens, levels, offsets) == found[1].encode(tokens, levels, offsets)


def test_encoding_leaves_its_input_alone():
    tokens, levels, num_columns, offsets = made(4)
    for array in levels.__dict__.values():
        array.flags.writeable = False
    Codec.train(tokens, levels, num_columns).encode(tokens, levels, offsets)


TRAINED = made(5, size=120)
NUM_COLUMNS = TRAINED[2]


def trained() -> Codec:
    return Codec.train(*TRAINED[:3])


def test_damaged_rows_give_an_error_or_valid_levels():
    tokens, levels, _, offsets = TRAINED
    codec = trained()
    row = codec.encode(tokens, levels, offsets)[0]
    rng, refused = np.random.default_rng(0), 0
    for bit in range(8 * len(row)):
        damaged = bytearray(row)
        damaged[bit // 8] ^= 1 << bit % 8
        refused += not survives(codec, bytes(damaged), tokens[:20])
    for size in range(len(row)):
        refused += not survives(codec, row[:size], tokens[:20])
        survives(codec, rng.bytes(size), tokens[:20])
    assert refused > 0


def survives(codec: Codec, row: bytes, tokens: np.ndarray) -> bool:
    try:
        found = codec.decode([row], tokens, np.array([0, len(tokens)]))
    except ValueError:
        return False
    assert_valid(found, NUM_COLUMNS)
    return True


@quick
@given(st.binary(max_size=200), st.integers(0, 5))
def test_random_rows_give_an_error_or_valid_levels(row, size):
    survives(trained(), row, TRAINED[0][:size])


def test_a_row_cut_short_by_more_than_the_coder_reads_ahead_is_refused():
    tokens, levels, _, offsets = TRAINED
    codec = trained()
    row = codec.encode(tokens, levels, offsets)[0]
    assert not survives(codec, row[:-8], tokens[:20])
    assert not survives(codec, row + bytes(8), tokens[:20])


def test_damaged_tables_give_an_error_or_tables_that_still_hold_their_bounds():
    tokens, levels, _, offsets = TRAINED
    data = trained().to_bytes()
    row = trained().encode(tokens, levels, offsets)[0]
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            codec = Codec.from_bytes(bytes(damaged), NUM_COLUMNS, 2)
        except ValueError:
            continue
        survives(codec, row, tokens[:20])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 40, -1])
def test_tables_cut_short_are_refused(size):
    with pytest.raises(ValueError, match="tables"):
        Codec.from_bytes(trained().to_bytes()[:size], NUM_COLUMNS, 2)


def test_tables_of_another_vocabulary_or_number_of_columns_are_refused():
    data = trained().to_bytes()
    for num_columns, num_side in ((NUM_COLUMNS + 1, 2), (NUM_COLUMNS, 1), (0, 2), (NUM_COLUMNS, -1)):
        with pytest.raises(ValueError, match="tables"):
            Codec.from_bytes(data, num_columns, num_side)


def test_a_claim_of_more_entries_than_the_bytes_can_hold_is_refused():
    data = trained().to_bytes()
    with pytest.raises(ValueError, match="claim"):
        Codec.from_bytes((1 << 31).to_bytes(4, "little") + data[4:], NUM_COLUMNS, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids", [0, 300, 2]),
        ("ids", [-1, 1, 2]),
        ("ids", [1, 1, 2]),
        ("sample_ids", [7]),
        ("levels", [3, 2, 9]),
        ("levels", [1, 2, 1 << 24]),
        ("sample_repeats", [0]),
        ("counts", [4]),
        ("side", [[-1]]),
    ],
)
def test_levels_that_are_not_levels_are_refused(name, value):
    good = {
        "counts": [3],
        "ids": [0, 7, 2],
        "levels": [1, 2, 3],
        "sample_counts": [1],
        "sample_ids": [9],
        "sample_repeats": [1],
    }
    arrays = {key: int32(values) for key, values in {**good, "side": [[0]], name: value}.items()}
    fine = LogProbCodes(**{key: int32(values) for key, values in {**good, "side": [[0]]}.items()})
    codec = Codec.train(int32([5]), fine, 300)
    with pytest.raises(ValueError, match=r"must be|fall|twice|fit|lengths"):
        codec.encode(int32([5]), LogProbCodes(**arrays), np.array([0, 1]))


def test_a_token_beyond_the_columns_is_refused():
    with pytest.raises(ValueError, match="token"):
        trained().decode([b""], int32([NUM_COLUMNS]), np.array([0, 1]))


def test_a_large_vocabulary_takes_no_square_of_it():
    tokens, levels, _, offsets = made(6, size=60, num_columns=128256)
    codec = Codec.train(tokens, levels, 128256)
    data = codec.to_bytes()
    rows = codec.encode(tokens, levels, offsets)
    assert len(data) < 20_000
    assert canonical(Codec.from_bytes(data, 128256, 2).decode(rows, tokens, offsets)) == canonical(levels)


def test_lists_that_cost_next_to_nothing_still_read(monkeypatch):
    tokens, levels, num_columns, offsets = made(7, size=4000, num_columns=400, exact=36)
    codec = Codec.train(tokens, levels, num_columns)
    plain = codec.to_bytes()
    monkeypatch.setattr("stillroom.store.codec.tables.ENTRIES_PER_BYTE", 1)
    padded = codec.to_bytes()
    assert len(plain) < len(padded) == int.from_bytes(plain[:4], "little")
    rows = codec.encode(tokens, levels, offsets)
    assert canonical(Codec.from_bytes(padded, num_columns, 2).decode(rows, tokens, offsets)) == canonical(levels)
    with pytest.raises(ValueError, match="cut short"):
        Codec.from_bytes(padded[:-1] + b"1", num_columns, 2)


GOLDEN_TABLES = bytes.fromhex(
    "03000000010000000200000002000000d878daeddc214f026118c0f187245fe0f2110cce190c6ec0e6e60502c160f03683c16030180c"
    "0683c16030b871c1603090fd920ac1c4a6125ee03d7eff8d02b7dfdef1deed19771bd1ed7663f61a4ddfdf9ad797e7a7c787fbbbdb9b"
    "ebabcb8bf3b3d3f1a83a1e1c1d1eecedf6c67f1d30fd68c3014df5fb014d447c45a23ac9e4395ed7753a3c244992244992b6b174b773"
    "3a897149922449922449adcc7d4549922967cc4992b4aa113a9ba16907b41fb9922449922449521bf3e04f9264ca19739224ad6e8c9a"
    "a192244992244992244992244992244992244992244992244992244992246925f92b7e6d41c3493fd3f37c328ce8275ff9e7e287b5cb"
    "5f922449922469e906113bc9f093942b2f8a22cfafbc82c3e170381c0e87c3e170381c0edf543ce9ed9ca4b80d85c3e170381c0e87c3"
    "e170381c0e87c35b88f7a28c2cb3a170381c0eff079ee9d3331b0a87c3e1f075e3694768cebab3050e87c3e170381c0e87c3e170381c"
    "0e5f0feec11f1c0e87c3db8be73ae56c281c0e87c33700cf738cda50381c0e87c3e170381c0e87c3e170381c0e87c3e170381c0e87c3"
    "e170381c0e87c3e170381c0e87c3e170381c0e87c3e170381c0e87c3e170381c0e87c3e170381c0e87c3e13fb8bfe2876f015e76ca4c"
    "cff3f9c2d3af7d7ff1adc2e50f87c3e170381c0e87c3e170381cbe34fe0d03860327"
)
GOLDEN_ROWS = [bytes.fromhex("1240"), bytes.fromhex("e636d2")]


def test_the_format_is_what_it_was():
    tokens, offsets = int32([1, 2, 1]), np.array([0, 2, 3])
    levels = LogProbCodes(
        counts=int32([2, 0, 1]),
        ids=int32([5, 3, 7]),
        levels=int32([1, 4, 0]),
        sample_counts=int32([0, 2, 1]),
        sample_ids=int32([6, 2, 1]),
        sample_repeats=int32([1, 3, 2]),
        side=int32([[10], [11], [300]]),
    )
    learnt = Codec.train(np.tile(tokens, 20), LogProbCodes.concatenate([levels] * 20), 8)
    golden = Codec.from_bytes(GOLDEN_TABLES, 8, 1)
    assert canonical(golden.decode(GOLDEN_ROWS, tokens, offsets)) == canonical(levels)
    assert golden.encode(tokens, levels, offsets) == GOLDEN_ROWS == learnt.encode(tokens, levels, offsets)
    for again in (learnt.to_bytes(), golden.to_bytes()):  # but for the zlib stream, of which there are several writers
        assert again[:17] == GOLDEN_TABLES[:17]
        assert zlib.decompress(again[17:]) == zlib.decompress(GOLDEN_TABLES[17:])

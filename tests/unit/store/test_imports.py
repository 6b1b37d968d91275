"""Import: what other layouts say becomes a store, and what they cannot mean is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, StillroomError, StorageError
from stillroom.recipe import to_yaml
from stillroom.store.check import check
from stillroom.store.config import ImportConfig
from stillroom.store.imports import Imported, import_files
from stillroom.store.layouts import Compression, LegacyCompression, id_bits, read_compression, unpack
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store
from stillroom.store.show import export

from .whole import make_store

V, K = 300, 10
GOLDEN_IDS = [[59, 69, 89, 45, 271, 134, 122, 254, 23, 62], [93, 37, 152, 238, 273, 132, 114, 287, 253, 257]]
GOLDEN_PACKED = ("1d914b22d87a18f4fe0b8f80", "2e89530ee88a10e51f7ec040")
GOLDEN = {
    "fit": (
        {"exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "residual_bins": [],
         "delta_encoding": False},
        ("89bebc3930c080b388bb840954bf", "22bf0ff25abf3064a4bc967f12c0"),
        [[-0.2676, -2.7535, -3.586, -3.9332, -4.2006, -4.4268, -4.6265, -4.8074, -4.9741, -5.1296],
         [-0.6328, -0.8553, -3.1644, -4.1326, -4.8802, -5.5136, -6.074, -6.5826, -7.0519, -7.4902]],
    ),
    "differences": (
        {"exact_k": 3, "residual_bins": [{"scale_dtype": "float32", "element_bits": 5, "num_elements": 7}]},
        ("db2189be68e821c0584d4bbf44ca353d8010e7b5c0", "a54022bf2fb403bfa86fcabf7db74d3e801ef73de0"),
        [[-0.2678, -2.7976, -3.5918, -3.5918, -4.3019, -4.657, -4.7457, -4.7901, -4.9233, -5.012],
         [-0.6338, -1.1483, -2.7298, -2.7298, -5.9441, -6.145, -6.3459, -6.7477, -6.9486, -7.1495]],
    ),
    "bins": (
        {"exact_k": 2, "exact_dtype": "float16", "polynomial_terms": [0, 1, "exp"], "term_dtype": "float64",
         "normalize_t": True, "delta_encoding": False,
         "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 3},
                           {"scale_dtype": "float16", "element_bits": 12, "num_elements": 4}]},
        ("49b498c1000000c0952115c000000040015f12c0000000e0f9c0fc3f8c3e40f504000788d3fa4b",
         "12b998bc00000060545c24c0000000a09f8031c000000000b1bb1e40883f408b08000f20f58ceb"),
        [[-0.2678, -2.7969, -3.7591, -3.5924, -4.477, -4.6474, -4.734, -4.7908, -4.9403, -4.9905],
         [-0.6338, -1.1484, -3.5595, -2.755, -6.0193, -6.171, -6.3233, -6.7265, -6.9028, -6.7974]],
    ),
}  # fmt: skip
"""What DistillKit wrote of two distributions over 300 columns, and what it reads back: settings, bytes, values."""
GOLDEN_BEFORE = (
    {"packed_indices": [[2202489953058064955, 16264958], [2058304559597505117, 67500831]],
     "exact_values": [[-0.267822265625, -2.796875, -3.591796875, -3.591796875],
                      [-0.6337890625, -1.1484375, -2.73046875, -2.755859375]],
     "coeffs": [[-5.228103160858154, 1.6088284254074097, -0.6896272897720337],
                [-7.701115608215332, 4.719167232513428, -2.995117664337158]]},
    [[-0.2678, -2.7969, -3.5918, -3.5918, -4.3089, -4.5961, -4.7685, -4.869, -4.9339, -4.9791],
     [-0.6338, -1.1484, -2.7305, -2.7559, -5.9771, -6.0903, -6.4609, -6.7085, -6.8771, -6.9978]],
)  # fmt: skip
EXACT = {"d": V, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False}


def matrix(rows: tuple[str, ...]) -> np.ndarray:
    return np.array([list(bytes.fromhex(row)) for row in rows], np.uint8)


# --- DistillKit's codec ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_bytes_are_read_as_their_writer_reads_them(name):
    settings, values, wanted = GOLDEN[name]
    columns = {"bytepacked_indices": matrix(GOLDEN_PACKED), "compressed_logprobs": matrix(values)}
    ids, log_probs = Compression(d=V, k=K, **settings).decode(columns, "a row")
    assert ids.tolist() == GOLDEN_IDS
    np.testing.assert_allclose(log_probs, wanted, atol=3e-4)


def test_the_golden_words_of_the_older_layout():
    columns, wanted = GOLDEN_BEFORE
    settings = LegacyCompression(vocab_size=V, k=K, exact_k=4, polynomial_degree=2)
    arrays = {name: np.array(values) for name, values in columns.items()}
    ids, log_probs = settings.decode(arrays, "a row")
    assert ids.tolist() == GOLDEN_IDS
    np.testing.assert_allclose(log_probs, wanted, atol=3e-4)
    with pytest.raises((DataError, MismatchError)):
        settings.model_copy(update={"vocab_size": 513}).decode(arrays, "a row")
    with pytest.raises((DataError, MismatchError)):
        settings.model_copy(update={"vocab_size": 256}).decode(arrays, "a row")


def pack(ids: np.ndarray, bits: int) -> np.ndarray:
    """Ids of a few bits each, highest bit first, one string of bytes a row."""
    digits = (ids[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(len(ids), -1).astype(np.uint8), axis=1)


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 17, 18, 25, 32])
@pytest.mark.parametrize("number", [1, 2, 7, 50])
def test_unpack_is_the_inverse_of_packing(bits, number):
    values = np.random.default_rng(0).integers(0, 1 << bits, (5, number))
    assert np.array_equal(unpack(pack(values, bits), bits, number), values)


@pytest.mark.parametrize(("d", "bits"), [(2, 1), (128, 7), (129, 8), (2**17, 17), (2**17 + 1, 18), (151936, 18)])
def test_bits_of_an_id(d, bits):
    assert id_bits(d) == bits


# --- files -----------------------------------------------------------------------------------------------------------


def teacher(lengths: tuple[int, ...] = (9, 14, 2), k: int = K, seed: int = 0) -> list[dict[str, Any]]:
    """Documents with the k likeliest tokens of random distributions, of all positions with a next token."""
    generator, rows = np.random.default_rng(seed), []
    for length in lengths:
        logits = generator.normal(0, 3, (length - 1, V))
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-log_probs, -1)[:, :k]
        rows.append(
            {
                "tokens": generator.integers(0, V, length).tolist(),
                "ids": ids.tolist(),
                "log_probs": np.take_along_axis(log_probs, ids, -1).astype(np.float32).tolist(),
            }
        )
    return rows


def plain(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path / "data.parquet")
    return str(path / "data.parquet")


def packed(path: Path, rows: list[dict[str, Any]], d: int = V, **settings: Any) -> str:
    """The rows as DistillKit writes them, all values exact, with its settings beside them."""
    out = []
    for row in rows:
        ids, values = np.array(row["ids"]), np.array(row["log_probs"], "<f4")
        as_bytes = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        out.append(
            {
                "input_ids": row["tokens"],
                "compressed_logprobs": as_bytes.tolist(),
                "bytepacked_indices": pack(ids, id_bits(d)).tolist(),
            }
        )
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    types = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": byte_lists, "bytepacked_indices": byte_lists}
    pq.write_table(pa.Table.from_pylist(out, pa.schema(types.items())), path / "data_0.parquet")
    k = len(rows[0]["ids"][0])
    configure(path, **{**EXACT, "d": d, "k": k, "exact_k": k, **settings})
    return str(path / "data_0.parquet")


def configure(path: Path, **settings: Any) -> None:
    (path / "compression_config.yaml").write_text(to_yaml(settings))


@pytest.fixture
def take(tmp_path, tokenizer_folder):
    """Imports a file into a new folder."""

    def run(*files: str, out: str = "out", overwrite: bool = False, **settings: Any) -> Imported:
        config = ImportConfig(out=tmp_path / out, tokenizer=tokenizer_folder, **settings)
        return import_files(files, config, overwrite=overwrite)

    return run


def refused(take, tmp_path: Path, file: str, kind: type[StillroomError], what: str, **settings: Any) -> None:
    """Fails unless an import is refused, and leaves nothing behind."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=what):
        take(file, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def says(path: Path, rows: list[dict[str, Any]], step: float) -> None:
    """Fails unless a store says what the rows do, to half a step, and the rest is what they leave out."""
    store = Store(path)
    assert len(store) == len(rows)
    for i, row in enumerate(rows):
        levels = store.levels([i])
        sparse = to_sparse(levels, store.signal_config)
        assert store.tokens(i).tolist() == row["tokens"]
        assert sparse.ids.tolist() == row["ids"]
        np.testing.assert_allclose(sparse.log_probs.numpy(), row["log_probs"], atol=step / 2 + 1e-6)
        rest = 1 - np.exp(np.array(row["log_probs"], np.float64)).sum(-1)
        np.testing.assert_allclose(np.exp(sparse.log_rests[1.0].numpy()), rest, rtol=0.006)


def test_plain_columns(take, tmp_path):
    rows = teacher()
    imported = take(plain(tmp_path, rows), step=0.01)
    says(tmp_path / "out", rows, 0.01)
    assert check(tmp_path / "out").problems == []
    assert imported.manifest.positions == 22
    assert imported.manifest.signal.k == K
    assert imported.manifest.engine == "import"
    assert imported.notes == {}


def test_distillkit(take, tmp_path):
    rows = teacher()
    imported = take(packed(tmp_path, rows), step=0.01)
    says(tmp_path / "out", rows, 0.01)
    assert check(tmp_path / "out").problems == []
    assert imported.notes == {}


def test_a_folder_of_files_and_settings_as_a_recipe_has_them(take, tmp_path):
    rows, folder = teacher(), tmp_path / "files"
    folder.mkdir()
    packed(folder, rows)
    (folder / "compression_config.yaml").unlink()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml({"logprob_compressor": EXACT}))
    take(str(folder), compression=recipe, layout="distillkit", step=0.01)
    says(tmp_path / "out", rows, 0.01)


@pytest.mark.parametrize("kind", ["top_k", "top_p", "full"])
def test_what_was_exported_comes_back(kind, take, tmp_path, tiny_tokenizer):
    store = Store(make_store(tmp_path / "store", tiny_tokenizer, kind))
    export(store, tmp_path / "out.parquet")
    imported = take(str(tmp_path / "out.parquet"), step=0.01)
    back = Store(tmp_path / "out")
    assert check(tmp_path / "out").problems == []
    assert imported.manifest.num_columns == store.manifest.num_columns
    assert imported.manifest.teacher == store.manifest.teacher
    for i in range(len(store)):
        assert back.document(i) == store.document(i)
        assert np.array_equal(back.tokens(i), store.tokens(i))
        assert np.array_equal(back.loss_mask(i), store.loss_mask(i))
        if kind != "full" and back.loss_mask(i).any():
            old, new = (to_sparse(s.levels([i]), s.signal_config) for s in (store, back))
            assert old.ids.tolist() == new.ids.tolist()
            assert old.log_rests.keys() == new.log_rests.keys()
            targets = [s.log_targets()[0].exp().numpy() for s in (old, new)]
            np.testing.assert_allclose(*targets, rtol=0.012)


def test_a_sample_is_not_taken_for_the_likeliest_tokens(take, tmp_path, tiny_tokenizer):
    export(Store(make_store(tmp_path / "store", tiny_tokenizer)), tmp_path / "x.parquet")
    refused(take, tmp_path, str(tmp_path / "x.parquet"), MismatchError, "a sample of the teacher's distribution")


def test_files_of_another_tokenizer(tmp_path, tiny_tokenizer, chat_tokenizer_folder):
    export(Store(make_store(tmp_path / "store", tiny_tokenizer, "top_k")), tmp_path / "x.parquet")
    with pytest.raises(MismatchError, match="of another tokenizer"):
        import_files([str(tmp_path / "x.parquet")], ImportConfig(out=tmp_path / "o", tokenizer=chat_tokenizer_folder))


# --- wrong settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrote", "reads"), [(512, 513), (513, 512), (300, 600), (600, 300)])
@pytest.mark.parametrize("k", [1, 2, 8, 10])
def test_a_vocabulary_of_another_width_is_never_read_as_garbage(wrote, reads, k, take, tmp_path):
    """At k = 1 and 2 both widths take as many bytes, and only what is in them tells."""
    file = packed(tmp_path, teacher((40, 40), k), wrote)
    configure(tmp_path, **{**EXACT, "d": reads, "k": k, "exact_k": k})
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises((DataError, MismatchError)):
        take(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_error_of_another_width_tells_the_vocabulary_that_fits(take, tmp_path):
    file = packed(tmp_path, teacher(), 513)
    configure(tmp_path, **{**EXACT, "d": 512})
    refused(take, tmp_path, file, MismatchError, r"so 10 bits an id: 513 to 1,024 columns")


@pytest.mark.parametrize("d", [255, 256, 298])
def test_a_vocabulary_smaller_than_the_tokenizers(d, take, tmp_path):
    refused(take, tmp_path, packed(tmp_path, teacher(), d), MismatchError, "smaller than the tokenizer's")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"k": 9, "exact_k": 9}, "another width"),
        ({"exact_dtype": "bfloat16"}, "another width"),
        ({"exact_dtype": "float64"}, "another width"),
        ({"exact_k": 4, "polynomial_terms": [0, 1]}, "another width"),
        ({"delta_encoding": True}, "log-probabilities that cannot be"),
    ],
)
def test_other_settings_than_the_file_was_written_with(settings, what, take, tmp_path):
    refused(take, tmp_path, packed(tmp_path, teacher(), **settings), StillroomError, what)


@pytest.mark.parametrize(
    "settings",
    [
        {**EXACT, "k": 3, "exact_k": 4},
        {**EXACT, "exact_k": 4},
        {**EXACT, "d": 1},
        {**EXACT, "d": 2**40},
        {**EXACT, "k": 10**9, "exact_k": 10**9},
        {**EXACT, "unknown": 1},
        {**EXACT, "exact_k": 9, "residual_bins": [{"scale_dtype": "float32", "element_bits": 3, "num_elements": 2}]},
        {**EXACT, "exact_k": 9, "polynomial_terms": ["log"]},
        {**EXACT, "exact_dtype": "int8"},
        {"d": V},
        {},
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, take, tmp_path):
    file = packed(tmp_path, teacher())
    configure(tmp_path, **settings)
    refused(take, tmp_path, file, DataError, "does not hold DistillKit's compression settings")


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "12"])
def test_a_file_that_holds_no_settings(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(DataError, match="does not hold"):
        read_compression(tmp_path / "c.yaml", Compression, V)


def test_missing_settings(take, tmp_path):
    file = packed(tmp_path, teacher())
    (tmp_path / "compression_config.yaml").unlink()
    refused(take, tmp_path, file, MissingError, "compression settings")


# --- what cannot be log-probabilities --------------------------------------------------------------------------------


def with_value(rows: list[dict[str, Any]], name: str, position: int, entry: int, value: Any) -> list[dict[str, Any]]:
    rows[1][name][position][entry] = value
    return rows


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("log_probs", 0, float("nan")),
        ("log_probs", 5, float("nan")),
        ("log_probs", 0, float("inf")),
        ("log_probs", 0, 0.3),
        ("log_probs", 9, -0.001),
        ("log_probs", 0, -90.0),
        ("log_probs", 0, float("-inf")),
        ("log_probs", slice(2, 10), [-50.0] * 8),
    ],
)
@pytest.mark.parametrize("layout", [plain, packed])
def test_a_position_that_says_no_distribution_is_refused_or_left_out(layout, name, entry, value, take, tmp_path):
    file = layout(tmp_path, with_value(teacher(), name, 3, entry, value))
    refused(take, tmp_path, file, DataError, "row 1 has log-probabilities that cannot be\n  position 3")
    imported = take(file, invalid="drop")
    assert imported.manifest.positions == 21
    assert list(imported.notes.values()) == [1]
    assert not Store(tmp_path / "out").loss_mask(1)[3]
    assert "left out" in str(imported)
    assert check(tmp_path / "out").problems == []


def test_a_mass_above_1_by_rounding_leaves_out_what_float32_does_not_tell(take, tmp_path):
    rows = teacher()
    rows[1]["log_probs"][3] = np.log(np.array([0.5, 0.3, 0.2, *[0.001] * 7])).tolist()
    take(plain(tmp_path, rows))
    store = Store(tmp_path / "out")
    sparse = to_sparse(store.levels([1]), store.signal_config)
    assert sparse.log_rests[1.0][3].item() == pytest.approx(np.log(10 * 2**-24), abs=0.02)
    assert sparse.log_targets()[0][3].exp().sum() == pytest.approx(1)
    refused(take, tmp_path, plain(tmp_path, rows), DataError, "cannot be", tolerance=0.001, out="other")


def test_confident_positions_are_finite(take, tmp_path):
    rows = teacher((4,))
    rows[0]["log_probs"] = [[0.0] + [-100.0] * 9, [-1e-9] + [-30.0] * 9, [0.0] + [float("-inf")] * 9]
    take(plain(tmp_path, rows))
    store = Store(tmp_path / "out")
    sparse = to_sparse(store.levels([0]), store.signal_config)
    targets, rest = sparse.log_targets()
    assert not targets.isnan().any()
    np.testing.assert_allclose(targets.exp().sum(-1) + rest.exp(), 1, atol=1e-6)
    assert store.levels([0]).counts.tolist() == [10, 10, 1]


@pytest.mark.parametrize("invalid", ["refuse", "drop"])
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("ids", (3, 0), V), ("ids", (3, 0), -1), ("ids", (3, 1), None), ("tokens", 3, V), ("tokens", 3, 2**31)],
)
def test_ids_that_cannot_be_are_always_refused(invalid, name, place, value, take, tmp_path):
    rows = teacher()
    if isinstance(place, tuple):
        rows[1][name][place[0]][place[1]] = rows[1]["ids"][3][0] if value is None else value
    else:
        rows[1][name][place] = value
    refused(take, tmp_path, plain(tmp_path, rows), MismatchError, f"row 1 has {name} that cannot be", invalid=invalid)


def test_entries_whose_order_a_fit_broke_are_sorted_and_counted(take, tmp_path):
    settings, values, wanted = GOLDEN["bins"]
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    row = {
        "input_ids": [1, 2, 3],
        "compressed_logprobs": matrix(values).tolist(),
        "bytepacked_indices": matrix(GOLDEN_PACKED).tolist(),
    }
    types = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": byte_lists, "bytepacked_indices": byte_lists}
    pq.write_table(pa.Table.from_pylist([row], pa.schema(types.items())), tmp_path / "x.parquet")
    configure(tmp_path, d=V, k=K, **settings)
    imported = take(str(tmp_path / "x.parquet"))
    assert [n for what, n in imported.notes.items() if "sorted" in what] == [2]
    ids = Store(tmp_path / "out").levels([0]).ids.reshape(2, K)
    for p in range(2):
        order = np.argsort(-np.array(wanted[p]), kind="stable")
        assert ids[p].tolist() == np.array(GOLDEN_IDS[p])[order].tolist()


# --- positions -------------------------------------------------------------------------------------------------------


def test_a_signal_of_the_last_token_is_left_out_and_counted(take, tmp_path):
    rows = teacher()
    for row in rows:
        row["tokens"].pop()
    imported = take(plain(tmp_path, rows))
    assert imported.manifest.positions == 22 - 3
    assert list(imported.notes.values()) == [3]


def test_labels_say_what_is_learnt(take, tmp_path):
    rows = teacher()
    for row in rows:
        row["labels"] = [-100 if i < 1 or i % 3 == 0 else token for i, token in enumerate(row["tokens"])]
    imported = take(plain(tmp_path, rows), step=0.01)
    store = Store(tmp_path / "out")
    for i, row in enumerate(rows):
        assert store.target_mask(i).tolist() == [label >= 0 for label in row["labels"]]
        learnt = [p for p in range(len(row["tokens"]) - 1) if row["labels"][p + 1] >= 0]
        assert store.levels([i]).ids.tolist() == [token for p in learnt for token in row["ids"][p]]
    assert imported.manifest.positions < 22


def test_the_share_of_next_tokens_among_the_entries_is_told(take, tmp_path):
    rows = teacher()
    for row in rows:
        row["tokens"][1:] = [ids[2] for ids in row["ids"]]
    assert "100.0% of the positions" in str(take(plain(tmp_path, rows)))
    for row in rows:
        row["tokens"][1:] = [next(t for t in range(V) if t not in ids) for ids in row["ids"]]
    assert "0.0% of the positions" in str(take(plain(tmp_path, rows), out="other"))


@pytest.mark.parametrize("cut", [2, 5])
def test_another_number_of_positions(cut, take, tmp_path):
    rows = teacher()
    rows[1]["tokens"] = rows[1]["tokens"][:-cut]
    refused(take, tmp_path, plain(tmp_path, rows), MismatchError, "row 1 has a number of positions")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["ids"].pop(),
        lambda row: row["ids"][0].pop(),
        lambda row: row.update(keep=[True] * len(row["tokens"])),
        lambda row: row.update(keep=[True, False]),
        lambda row: row.update(attention_mask=[1] * (len(row["tokens"]) - 1) + [0]),
        lambda row: row.update(log_rest=[-1.0]),
        lambda row: row.update(log_rest=[-0.01] * (len(row["tokens"]) - 1)),
        lambda row: row.update(label_log_prob=[0.5] * (len(row["tokens"]) - 1)),
        lambda row: row["ids"].__setitem__(0, None),
        lambda row: row["ids"][0].__setitem__(0, None),
        lambda row: row["tokens"].__setitem__(0, None),
        lambda row: row.update(tokens=None) if len(row["tokens"]) == 9 else None,
        lambda row: row.update(tokens=[str(token) for token in row["tokens"]]),
        lambda row: row.update(tokens=[row["tokens"]]),
        lambda row: row.update(ids=row["tokens"]),
        lambda row: row.update(log_probs=row["ids"]),
        lambda row: row.update(document="first"),
    ],
)
def test_columns_that_do_not_fit_together(change, take, tmp_path):
    rows = teacher()
    for row in rows:
        change(row)
    refused(take, tmp_path, plain(tmp_path, rows), StillroomError, ".")


# --- files and settings ----------------------------------------------------------------------------------------------


def test_what_is_not_parquet_or_not_there(take, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    refused(take, tmp_path, str(tmp_path / "x.parquet"), DataError, "cannot be imported")
    refused(take, tmp_path, str(tmp_path / "y.parquet"), MissingError, "is not there")
    file = plain(tmp_path, teacher())
    (tmp_path / "data.parquet").write_bytes((tmp_path / "data.parquet").read_bytes()[:-30])
    refused(take, tmp_path, file, DataError, "cannot be imported")


@pytest.mark.parametrize("name", ["tokens", "ids", "log_probs"])
def test_a_missing_column(name, take, tmp_path):
    rows = [{k: v for k, v in row.items() if k != name} for row in teacher()]
    refused(take, tmp_path, plain(tmp_path, rows), DataError, "cannot be imported")


def test_a_layout_that_the_files_do_not_have(take, tmp_path):
    refused(take, tmp_path, plain(tmp_path, teacher()), MismatchError, "DistillKit's columns", layout="distillkit")
    refused(take, tmp_path, packed(tmp_path, teacher()), DataError, "no column", layout="plain")


@pytest.mark.parametrize("num_columns", [1, 299])
def test_fewer_columns_than_the_tokenizer_has_tokens(num_columns, take, tmp_path):
    refused(take, tmp_path, plain(tmp_path, teacher()), ConfigError, "num_columns", num_columns=num_columns)


def test_more_columns_allow_more_ids(take, tmp_path):
    rows = with_value(teacher(), "ids", 3, 0, V + 3)
    assert take(plain(tmp_path, rows), num_columns=V + 4).manifest.num_columns == V + 4


def test_out_that_exists(take, tmp_path):
    file = plain(tmp_path, teacher())
    take(file)
    with pytest.raises(StorageError, match="exists"):
        take(file)
    take(file, overwrite=True, teacher="a name")
    assert Store(tmp_path / "out").manifest.teacher.name == "a name"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.parquet", "out"]


def test_a_failed_overwrite_leaves_the_store_that_was_there(take, tmp_path):
    take(plain(tmp_path, teacher()))
    before = Store(tmp_path / "out").fingerprint
    with pytest.raises(MismatchError):
        take(plain(tmp_path, with_value(teacher(), "ids", 3, 0, V)), overwrite=True)
    assert Store(tmp_path / "out").fingerprint == before


def test_the_texts_own_token_may_be_far_less_likely_than_the_others(take, tmp_path):
    take(plain(tmp_path, with_value(teacher(), "log_probs", 3, 9, -40.0)))
    assert Store(tmp_path / "out").manifest.positions == 22


def test_nothing_to_learn(take, tmp_path):
    rows = teacher((3,))
    rows[0]["log_probs"] = [[float("nan")] * K] * 2
    refused(take, tmp_path, plain(tmp_path, rows), DataError, "no position was imported", invalid="drop")

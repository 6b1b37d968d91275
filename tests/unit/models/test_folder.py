"""Which files of a folder are the model's: one function decides, as `from_pretrained` does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.estimates.headers import read_model, read_sizes
from stillroom.models import loading
from stillroom.models.folder import weight_files
from stillroom.models.safetensors_io import load_weights, materialize, save_weights
from stillroom.runs import same_model


@pytest.fixture
def folder(saved_model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_model("llama"), tmp_path / "model"))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def streamed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as sharded loading reads them."""
    model = loading.build_meta_model(loading.read_config(str(folder)), dtype=torch.float32)
    materialize(model, "cpu")
    model.tie_weights()
    load_weights(model, folder)
    return dict(model.state_dict())


def assert_read_as_transformers_does(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for found in (streamed(folder), loading.load_model(str(folder), dtype=torch.float32).state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_file_comes_before_an_older_index(folder, saved_model):
    old = load_file(saved_model("llama", seed=9) / "model.safetensors")
    for number, name in enumerate(old):
        save_file({name: old[name]}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{number}.safetensors" for number, name in enumerate(old)}
    before = read_model(str(folder)).numbers
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert read_model(str(folder)).numbers == before
    assert_read_as_transformers_does(folder)
    (folder / "model.safetensors").unlink()
    assert [path.name for path in weight_files(folder)] == sorted(places.values())
    assert_read_as_transformers_does(folder)


def test_a_stray_file_is_no_part_of_the_model(folder):
    before = fingerprint(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    read_sizes(str(folder), None, "the model")
    assert same_model(fingerprint(folder), before)


def test_the_file_that_the_config_names_is_read(folder):
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    change_config(folder, transformers_weights="own.safetensors")
    assert weight_files(folder) == [folder / "own.safetensors"]
    assert_read_as_transformers_does(folder)
    change_config(folder, transformers_weights="../own.safetensors")
    with pytest.raises(DataError, match="outside its folder"):
        weight_files(folder)


def test_a_head_that_differs_from_the_embeddings_is_kept(folder, tmp_path):
    """`transformers` leaves it untied, whatever config.json says."""
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    for head, is_tied in ((embeddings.clone(), True), (embeddings.flip(0).contiguous(), False)):
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        change_config(folder, tie_word_embeddings=True)
        assert_read_as_transformers_does(folder)
        config = loading.read_config(str(folder))
        assert config.tie_word_embeddings is is_tied
        skeleton = loading.build_meta_model(config, dtype=torch.float32)
        assert torch.equal(loading.load_head(skeleton, folder, "cpu").weight, head.float())
        files, size = read_sizes(str(folder), None, "the model")
        assert size.total == loading.num_parameters(loading.load_model(str(folder), dtype="auto"))
        assert files.config["tie_word_embeddings"] is is_tied
        model = loading.load_model(str(folder), dtype=torch.float32)
        save_weights(model, tmp_path / f"saved-{is_tied}", writes=True)
        saved = json.loads((tmp_path / f"saved-{is_tied}" / "config.json").read_text())
        assert saved["tie_word_embeddings"] is is_tied
        again = loading.load_model(str(tmp_path / f"saved-{is_tied}"), dtype=torch.float32)
        assert torch.equal(again.get_output_embeddings().weight, head.float())


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_told_with_its_base_and_what_to_do(folder, with_config):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    if not with_config:
        (folder / "config.json").unlink()
    for read in (loading.read_config, read_model, lambda name: loading.load_model(name, dtype="auto")):
        with pytest.raises(DataError, match="holds an adapter, not a model") as raised:
            read(str(folder))
        assert "owner/base" in str(raised.value)
        assert "merge_and_unload" in str(raised.value)


# --- fingerprints ----------------------------------------------------------------------------------------------------
def fingerprint(folder: Path) -> str:
    return loading.fingerprint(str(folder), loading.read_config(str(folder)))


def test_every_byte_of_a_model_counts(folder, monkeypatch):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.zeros(4096, 4096)}, path)
    before, size = fingerprint(folder), path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size * 3 // 128 + 2**16 + 1000)  # between two samples, which begin at each 64th
        file.write(b"\1")
    after = fingerprint(folder)
    assert before.partition(",")[0] == after.partition(",")[0]
    assert not same_model(before, after)
    assert same_model(before.partition(",")[0], after)  # as a version wrote it that knew samples alone
    monkeypatch.setattr(loading, "WHOLE_BYTES", 1000)
    assert fingerprint(folder).endswith(", sampled")
    assert same_model(fingerprint(folder), before.partition(",")[0])
    assert not same_model("sha256 0123456789abcdef", before)


# --- lengths ---------------------------------------------------------------------------------------------------------
def rope(**values: object) -> PretrainedConfig:
    text = PretrainedConfig(max_position_embeddings=128)
    text.rope_parameters = values
    return text


@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "linear", "factor": 2}, 256),
        ({"rope_type": "dynamic", "factor": 2.5}, 320),
        ({"full": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}}, 128),
        ({"rope_type": "yarn", "factor": "x"}, 128),
    ],
)
def test_scaled_positions_may_be_read(parameters, limit):
    loading.check_length(limit, rope(**parameters), "student")
    with pytest.raises(ConfigError, match=f"at most {limit}") as raised:
        loading.check_length(limit + 1, rope(**parameters), "student")
    assert "max_position_embeddings: 128" in str(raised.value)


# --- config.json -----------------------------------------------------------------------------------------------------
WRONG: tuple[object, ...] = ("x", -1, [], {}, [1])
KEYS = ("num_hidden_layers", "hidden_size", "model_type", "rope_parameters")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "[" * 100_000, '{"model_type": "\\ud800"}', "{", "\x00"])
def test_a_config_that_is_no_object_is_told(folder, text):
    (folder / "config.json").write_text(text)
    for read in (loading.read_config, read_model):
        with pytest.raises(DataError, match=r"config\.json is damaged"):
            read(str(folder))


@pytest.mark.parametrize("key", KEYS)
def test_wrong_values_are_no_traceback(folder, key):
    whole = (folder / "config.json").read_text()
    for value in (*WRONG, 10**9, 10**30) if key == "num_hidden_layers" else WRONG:
        (folder / "config.json").write_text(whole)
        change_config(folder, **{key: value})
        for read in (
            loading.read_config,
            lambda name: loading.load_model(name, dtype="auto"),
            lambda name: read_sizes(name, None, "the model"),
        ):
            try:
                read(str(folder))
            except StillroomError as error:
                assert len(str(error).splitlines()) >= 3  # noqa: PT017

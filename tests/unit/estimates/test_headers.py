"""Configs and headers of models: read from folders, and refused where they are not whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stillroom.errors import DataError, MissingError
from stillroom.estimates.headers import read_model


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(5), "c": torch.zeros(())}, tmp_path / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_numbers_are_counted_by_type(folder):
    found = read_model(str(folder))
    assert found.config == {"model_type": "llama"}
    assert found.numbers == {"BF16": 12, "F32": 6}
    assert found.size_bytes == 48


def test_a_config_without_weights_is_refused(folder):
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(MissingError, match="holds no safetensors weights"):
        read_model(str(folder), whose="the teacher")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(MissingError, match="the teacher is not there"):
        read_model(str(tmp_path), whose="the teacher")


def test_damaged_files_are_told(folder):
    (folder / "model-1.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="not a safetensors file"):
        read_model(str(folder))
    (folder / "config.json").write_text("[]")
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        read_model(str(folder))


def test_a_name_that_cannot_be_fetched_is_told_with_what_to_do():
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE"):
        read_model("nobody/no-such-model", whose="the student")


def test_of_a_model_on_the_hub_only_small_files_are_read(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tensor = TensorInfo(dtype="BF16", shape=[6, 4], data_offsets=(0, 48))
    file = SafetensorsFileMetadata(metadata={}, tensors={"w": tensor})
    whole = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map={"w": "model.safetensors"}, files_metadata={"model.safetensors": file}
    )
    asked = []

    def download(name, file, revision):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: whole)
    found = read_model("owner/name", "main")
    assert (found.config, found.numbers, found.size_bytes) == ({"model_type": "qwen2"}, {"BF16": 24}, 48)
    assert asked == [("owner/name", "config.json", "main")]

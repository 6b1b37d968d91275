"""Models: loaded whole or not at all, understood down to the logits, and packed documents kept apart."""

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import FAMILIES, SaveModel, build_config, build_model
from stillroom.data.config import TextData
from stillroom.data.dataloader import BatchStream
from stillroom.data.dataset import Documents, prepare
from stillroom.errors import DataError, MismatchError, MissingError, OutOfMemoryError, StillroomError
from stillroom.models import loading
from stillroom.models.hidden_states import backbone, last_hidden_states, lm_head, verify


@pytest.fixture
def folder(saved_model: SaveModel, tmp_path: Path) -> Path:
    """A model folder of the test's own, to be damaged."""
    return Path(shutil.copytree(saved_model("llama"), tmp_path / "model"))


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return loading.load_model(str(folder), dtype=torch.float32, **settings)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(12, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("place", ["reading", "moving"])
def test_too_little_memory_is_no_damage(place, error, folder, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    if place == "reading":
        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    elif isinstance(error, torch.OutOfMemoryError):
        monkeypatch.setattr(PreTrainedModel, "to", fail)
    else:
        return
    with pytest.raises(OutOfMemoryError, match="too little memory to load the model") as raised:
        load(folder)
    assert str(folder) in raised.value.what
    assert str(raised.value.values["reason"])


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites the weights with some tensors changed, or left out where None."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()} | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def shard(folder: Path, named: dict[str, str] | None = None) -> Path:
    """Splits the weights into two files and an index; ``named`` renames files in the index alone."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    weight_map = {name: (named or {}).get(file, file) for name, file in files.items()}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# --- what is understood ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_understood(family):
    model = build_model(family)
    verify(model, family, pack=True)
    tokens = torch.randint(0, 304, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = backbone(model)(input_ids=tokens)[0]
        own = model(input_ids=tokens).logits
    torch.testing.assert_close(lm_head(model).logits(hidden.flatten(0, 1)).view_as(own), own, rtol=1e-5, atol=1e-5)


def test_families_differ_in_what_the_head_does():
    """Or the test above would show nothing."""
    heads = {family: lm_head(build_model(family)) for family in FAMILIES}
    assert heads["gemma2"].softcap == 2.0
    assert (heads["cohere"].scale, heads["granite"].scale, heads["llama"].scale) == (0.25, 0.25, 1.0)
    assert heads["phi"].bias is not None
    assert heads["phi"].bias.abs().max() > 0.1
    assert heads["llama"].bias is None


def with_other_logits(model: PreTrainedModel, change: Any) -> PreTrainedModel:
    """The same model with its logits changed behind its head."""
    forward = model.forward

    @functools.wraps(forward)
    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: 1.05 * logits,
        lambda logits: 20 * torch.tanh(logits / 20),
        lambda logits: logits + torch.arange(logits.shape[-1]) * 1e-3,
    ],
    ids=["scaled", "capped", "biased"],
)
def test_a_family_that_changes_its_logits_in_an_unknown_way_is_refused(change):
    with pytest.raises(MismatchError, match="the head of strange is not understood"):
        verify(with_other_logits(build_model("llama"), change), "strange", pack=True)


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [("cohere", "logit_scale", 0.5), ("granite", "logits_scaling", 2.0), ("gemma2", "final_logit_softcapping", None)],
)
def test_a_config_that_is_read_wrongly_is_noticed(family, setting, value, monkeypatch):
    """The model goes on as it was built, and the head is made from another scale."""
    model = build_model(family)
    real = model.config.get_text_config()
    other = type(real)(**{**real.to_dict(), setting: value})
    monkeypatch.setattr(model.config, "get_text_config", lambda *_, **__: other)
    with pytest.raises(MismatchError, match="is not understood"):
        verify(model, family, pack=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bloom", "mamba", "opt"])
def test_a_family_that_leaks_across_documents_is_refused_for_packing_alone(family, dtype):
    settings = {
        "mamba": {"state_size": 4},
        "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    }
    model = build_model(family, **settings.get(family, {})).to(dtype)
    with pytest.raises(MismatchError, match="lets documents that share a row see each other") as raised:
        verify(model, family, pack=True)
    assert "data.pack=false" in raised.value.fix
    verify(model, family, pack=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_leak_is_noticed_in_a_model_with_fresh_weights(seed, dtype):
    """Whose hidden states hardly depend on what was read before."""
    model = loading.build_model(build_config("bloom"), seed=seed).to(dtype)
    with pytest.raises(MismatchError, match="see each other"):
        verify(model, "bloom", pack=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_understood_in_half_precision(family):
    verify(build_model(family).bfloat16(), family, pack=True)
    verify(loading.build_model(build_config(family), seed=0).bfloat16(), family, pack=True)


def test_verify_leaves_the_model_as_it_was():
    model = build_model("llama").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verify(model, "llama", pack=True)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    verify(model.eval(), "llama", pack=True)
    assert not model.training


def test_a_model_without_a_head_is_refused():
    from transformers import AutoModel

    with pytest.raises(MismatchError, match="has no output head"):
        lm_head(AutoModel.from_config(build_config("llama")))


def test_a_family_that_names_a_prefix_that_it_does_not_have_is_understood():
    """As llama4's text model does."""
    config = build_config("llama4_text", pad_token_id=0, intermediate_size_mlp=24, num_local_experts=2, head_dim=8)
    model = loading.build_model(config, seed=0)
    verify(model, "llama4", pack=True)
    assert backbone(model) is model.model


def test_a_model_whose_backbone_cannot_be_found_is_refused_and_not_a_bug():
    model = build_model("llama")
    model.trunk = model.model
    del model.model
    model.get_decoder = lambda: model
    with pytest.raises(MismatchError, match="backbone of LlamaForCausalLM is not found"):
        backbone(model)


# --- packing ---------------------------------------------------------------------------------------------------------


def logits_by_place(model: PreTrainedModel, documents: Documents, **settings: Any) -> dict[tuple[int, int], Any]:
    """The logits at each (document, position), as the batches of a stream give them."""
    stream = BatchStream(documents, length=40, shuffle=False, seed=0, epochs=1, pad_token=7, **settings)
    found = {}
    for batch in (batch for step in stream for batch in step):
        with torch.no_grad():
            hidden = last_hidden_states(model, batch)
        logits = lm_head(model).logits(hidden.flatten(0, 1)).view(*batch.tokens.shape, -1)
        for row, column in (batch.documents >= 0).nonzero().tolist():
            key = batch.documents[row, column].item(), batch.positions[row, column].item()
            assert key not in found
            found[key] = logits[row, column]
    return found


@pytest.fixture
def documents(text_files: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Documents:
    return prepare(TextData(path=f"{text_files}/valid.jsonl", format="text", length=40), tiny_tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_logits_that_they_have_alone(family, documents):
    model = build_model(family).double()
    alone = logits_by_place(model, documents, pack=False, tokens=1, micro_tokens=1)
    packed = logits_by_place(model, documents, pack=True, tokens=120, micro_tokens=120)
    assert alone.keys() == packed.keys()
    for place, logits in alone.items():
        torch.testing.assert_close(packed[place], logits, rtol=1e-5, atol=1e-5)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_whole_and_in_evaluation_mode(folder):
    model = load(folder)
    assert not model.training
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    assert loading.load_model(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_shards_are_loaded(folder):
    whole = load(folder).state_dict()
    shard(folder)
    assert all(torch.equal(v, whole[k]) for k, v in load(folder).state_dict().items())


def test_a_missing_folder(tmp_path):
    with pytest.raises(MissingError, match="is not a model folder") as raised:
        load(tmp_path / "nowhere")
    assert raised.value.values["found"] == "no such folder"
    with pytest.raises(MissingError, match="is not a model folder"):
        loading.read_config(str(tmp_path / "nowhere"))


def test_a_name_that_the_hub_does_not_give():
    with pytest.raises(MissingError, match="the model stillroom/nothing could not be loaded"):
        loading.load_model("stillroom/nothing", dtype=torch.float32)
    with pytest.raises(MissingError, match="the model stillroom/nothing could not be loaded"):
        loading.read_config("stillroom/nothing")


@pytest.mark.parametrize("left", [0, 5, 8, 100, 2000, -1])
def test_truncated_weights(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    for read in (load, lambda f: loading.read_config(str(f))):
        with pytest.raises(DataError, match=r"model\.safetensors is truncated or damaged"):
            read(folder)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"3", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'{"a": {"data_offsets": [0, "x"]}}', b"{", b"\xff\xfe"],
)
def test_a_hostile_header(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DataError, match="truncated or damaged"):
        load(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40])
def test_a_header_that_claims_to_be_endless(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(DataError, match="truncated or damaged"):
        load(folder)


def test_a_git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n"
    )
    with pytest.raises(DataError, match="is a git-lfs pointer, not weights") as raised:
        load(folder)
    assert "git lfs pull" in raised.value.fix


def test_a_missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="lacks some of its weights") as raised:
        load(folder)
    assert raised.value.values["missing"] == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_leaves_its_folder(folder, name):
    shard(folder, {"model-00002-of-00002.safetensors": name})
    (folder.parent / "other.safetensors").write_bytes((folder / "model-00002-of-00002.safetensors").read_bytes())
    with pytest.raises(DataError, match="names a file outside its folder"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(folder, text):
    shard(folder).write_text(text)
    with pytest.raises(DataError, match="index"):
        load(folder)


def test_a_missing_tensor_is_not_made_up(folder):
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(DataError, match="are not complete") as raised:
        load(folder)
    assert "model.layers.1.mlp.up_proj.weight" in str(raised.value)


def test_a_tensor_of_another_shape_is_not_made_up(folder):
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(3, 3))
    with pytest.raises(StillroomError, match=r"could not be loaded|not complete"):
        load(folder)


def test_weights_that_could_run_code_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(MissingError, match="holds no safetensors weights") as raised:
        load(folder)
    assert "pytorch_model.bin" in str(raised.value)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonsense"}'])
def test_a_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(StillroomError):
        loading.read_config(str(folder))
    with pytest.raises(StillroomError):
        load(folder)


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(DataError, match="brings its own code"):
        loading.read_config(str(folder))


# --- building --------------------------------------------------------------------------------------------------------


def test_a_setting_that_the_family_does_not_have():
    with pytest.raises(MismatchError, match="the family llama has no setting `hiden_size`") as raised:
        loading.configure(build_config("llama"), {"hiden_size": 8})
    assert raised.value.values["did you mean"] == "hidden_size"


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": 15}, {"num_hidden_layers": "two"}, {"num_attention_heads": 0}, {"hidden_act": "nonsense"}],
)
def test_settings_that_no_model_can_have(settings):
    """The user's fault, so an error that says so, and not a traceback."""
    with pytest.raises(StillroomError):
        loading.build_model(loading.configure(build_config("llama"), settings), seed=0)


def test_settings_change_what_they_say_and_what_hangs_on_it():
    base = build_config("gemma2", num_hidden_layers=4)
    assert len(base.layer_types) == 4
    config = loading.configure(base, {"num_hidden_layers": 3, "intermediate_size": 48})
    assert (config.num_hidden_layers, config.intermediate_size, len(config.layer_types)) == (3, 48, 3)
    assert config.final_logit_softcapping == 2.0
    llama = loading.configure(build_config("llama"), {"hidden_size": 32})
    assert (llama.head_dim, llama.hidden_size) == (16, 32)
    assert loading.configure(build_config("llama"), {"hidden_size": 32, "head_dim": 4}).head_dim == 4
    assert build_config("llama").hidden_size == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_weights(family):
    config = build_config(family)
    before = torch.get_rng_state()
    one, two, other = (loading.build_model(config, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_counted_once(tied):
    model = build_model("llama", tie_word_embeddings=tied)
    table = 304 * 16
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    assert loading.num_parameters(model) == (1 if tied else 2) * table + 2 * layer + 16
    model.requires_grad_(False)
    assert loading.num_parameters(model, trained_only=True) == 0
    model.get_input_embeddings().weight.requires_grad_(True)
    assert loading.num_parameters(model, trained_only=True) == table


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    return loading.fingerprint(str(folder), loading.read_config(str(folder)))


def test_a_fingerprint_does_not_depend_on_the_place(folder, saved_model):
    assert fingerprint(folder) == fingerprint(saved_model("llama"))


def test_a_fingerprint_changes_with_one_weight(folder):
    before = fingerprint(folder)
    weight = load_file(folder / "model.safetensors")["model.norm.weight"].clone()
    weight[3] += 1e-3
    change_tensors(folder, model__norm__weight=weight)
    assert fingerprint(folder) != before


def test_a_fingerprint_changes_with_the_config(folder):
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(folder) != before


# --- more that must not go unnoticed ---------------------------------------------------------------------------------


def test_layers_that_the_config_does_not_know_are_not_dropped(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(DataError, match="holds more than its config") as raised:
        load(folder)
    assert "model.layers.1." in str(raised.value)


def test_a_model_that_sees_what_comes_later_is_refused():
    model = build_model("llama")
    embed = model.model.embed_tokens.register_forward_hook(lambda _, __, out: out + 0.5 * out.roll(-1, dims=1))
    with pytest.raises(MismatchError, match="sees the tokens that it is to predict"):
        verify(model, "peeking", pack=False)
    embed.remove()
    verify(model, "honest", pack=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_path_that_begins_in_a_folder_here_is_never_asked_of_the_hub(tmp_path, monkeypatch, there):
    from stillroom.config import is_local

    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "runs").mkdir()
    assert is_local("runs/teacher") is there

"""The student: existing or new, with adapters, frozen parameters and checkpointing as asked; and its export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import FAMILIES, build_batch, build_config, build_model
from stillroom.batch import Batch
from stillroom.config import load
from stillroom.distill.build import student_dtype
from stillroom.distill.config import DistillConfig
from stillroom.distill.student_plan import StudentPlan, new_config
from stillroom.errors import ConfigError, MismatchError
from stillroom.losses.divergences import forward_kl
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.models import loading
from stillroom.models.hidden_states import verify
from stillroom.teachers.live import LiveTeacher
from stillroom.training.config import AdamWConfig, NewStudentConfig
from stillroom.training.state import build_optimizer
from stillroom.training.step import StudentStep
from stillroom.training.student import Student, build_student

# peft itself still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

OBJECTIVES = (Objective("forward_kl", forward_kl, 0.5), Objective("cross_entropy", cross_entropy, 0.5))


@pytest.fixture
def student(recipe: Path, tmp_path: Path):
    """Builds the student of the tiny recipe with other settings: ``student("student.lora.rank=2")``."""

    def build(*settings: str, model: Path | None = None) -> Student:
        if model is not None:
            settings = (f"student.model={model}", *settings)
        config = load(DistillConfig, recipe, ["device=cpu", f"out={tmp_path}/run", *settings])
        dtype = student_dtype(config.precision)
        return build_student(config.student, dtype=dtype, device="cpu", seed=config.seed)

    return build


def own_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[batch.loss_mask]


def naive_loss(model: torch.nn.Module, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    """OBJECTIVES over full logits, by plain autograd."""
    log_s = torch.log_softmax(own_logits(model, batch), -1)
    with torch.no_grad():
        log_t = torch.log_softmax(own_logits(teacher, batch), -1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    hard = -log_s.gather(-1, batch.labels[batch.loss_mask].unsqueeze(-1)).squeeze(-1)
    return (0.5 * kl + 0.5 * hard).mean()


def step_loss(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    module = StudentStep(model, OBJECTIVES, vocab_size=None, logits_bytes=2**20)
    return module(batch, LiveTeacher(teacher).forward(batch), batch.num_kept).loss


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def randomise_adapters(built: Student) -> None:
    """An adapter begins as nothing, since its B is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in built.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)


# --- existing and new ------------------------------------------------------------------------------------------------


def test_an_existing_student_is_what_its_folder_holds(student, saved_model):
    built = student()
    wanted = AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=1)).state_dict()
    assert built.adapters is None
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in built.model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in built.model.parameters())


def test_a_half_precision_student_is_trained_in_float32(student, tmp_path):
    build_model(seed=1).bfloat16().save_pretrained(tmp_path / "half")
    built = student(model=tmp_path / "half")
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


def test_a_new_student_is_like_its_pattern_but_for_its_settings(tiny_tokenizer):
    pattern = build_config("qwen3")
    config = new_config(NewStudentConfig(kind="config", settings={"num_hidden_layers": 1}), pattern, tiny_tokenizer)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen3", 1, 16)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, None)


def test_a_new_student_of_a_family_fits_the_tokenizer(tiny_tokenizer):
    init = NewStudentConfig(kind="config", family="llama", settings={"hidden_size": 64, "num_hidden_layers": 1})
    config = new_config(init, None, tiny_tokenizer)
    assert (config.model_type, config.vocab_size, config.eos_token_id) == ("llama", 300, 1)


def test_a_family_that_nobody_knows(tiny_tokenizer):
    with pytest.raises(ConfigError, match="`lama` is not a family"):
        new_config(NewStudentConfig(kind="config", family="lama"), None, tiny_tokenizer)


# --- freezing and checkpointing --------------------------------------------------------------------------------------


def test_frozen_parameters_are_those_that_the_patterns_name(student):
    built = student('student.freeze=["*embed_tokens*", "model.layers.0.*"]')
    for name, parameter in built.model.named_parameters():
        frozen = "embed_tokens" in name or name.startswith("model.layers.0.")
        assert parameter.requires_grad != frozen, name


def test_a_pattern_that_matches_nothing(student):
    with pytest.raises(ConfigError, match="matches nothing: `embed_tokens`"):
        student('student.freeze=["embed_tokens"]')


def test_nothing_left_to_train(student):
    with pytest.raises(ConfigError, match="nothing of the student is left to train"):
        student('student.freeze=["*"]')


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_gradient_checkpointing_gives_the_same_gradients(family, student, saved_model):
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    folder, teacher, batch = saved_model(family, seed=1, **dropout), build_model(family, seed=2), build_batch(20, 9, 30)
    plain, saving = student(model=folder), student("student.gradient_checkpointing=true", model=folder)
    calls = {}
    for name, built in (("plain", plain), ("saving", saving)):
        built.model.train()
        layer = next(m for m in built.model.modules() if isinstance(m, torch.nn.ModuleList))[0]
        inside = next(module for module in layer.modules() if "Norm" in type(module).__name__)
        inside.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    wanted = gradients(plain.model, step_loss(plain.model, teacher, batch))
    found = gradients(saving.model, step_loss(saving.model, teacher, batch))
    assert calls == {"plain": 1, "saving": 2}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_checkpointing_trains_adapters_too(student):
    """Whose backbone's inputs have no gradient, which some ways of checkpointing need."""
    built = student("student.lora.rank=2", "student.gradient_checkpointing=true")
    built.model.train()
    found = gradients(built.model, step_loss(built.model, build_model(seed=2), build_batch(20, 9)))
    assert found
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if "lora_B" in name)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained(student):
    built = student("student.lora.rank=2")
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in built.model.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 7 * 2
    assert not any("lm_head" in name for name in trained)
    found = gradients(built.model, step_loss(built.model, build_model(seed=2), build_batch(20, 9)))
    assert found.keys() == trained
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    optimizer = build_optimizer(built.model, AdamWConfig(learning_rate=1e-3))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


def test_the_same_seed_gives_the_same_adapters(student):
    one, two, other = (student("student.lora.rank=2", f"seed={seed}").model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])
def test_adapters_on_the_head_are_part_of_the_loss(family, student, saved_model):
    """Loss and gradients are those of the adapted model's own logits."""
    targets = 'student.lora={rank: 2, targets: ["q_proj", "lm_head"]}'
    folder = saved_model(family, seed=1, tie_word_embeddings=False)
    built, teacher = student(targets, model=folder), build_model(family, seed=2)
    batch = build_batch(20, 9, 30)
    without = step_loss(built.model, teacher, batch).item()
    randomise_adapters(built)
    verify(built.model, family, pack=True)
    assert hasattr(built.model.get_output_embeddings(), "lora_A")
    wanted = naive_loss(built.adapters, teacher, batch)
    loss = step_loss(built.model, teacher, batch)
    torch.testing.assert_close(loss.float(), wanted, rtol=1e-5, atol=1e-5)
    assert abs(loss.item() - without) > 1e-3
    found, naive = gradients(built.model, loss), gradients(built.model, wanted)
    assert found.keys() == naive.keys()
    assert any("lm_head.lora_A" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, naive[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_on_the_head_with_dropout_are_refused(student):
    with pytest.raises(MismatchError, match="an adapter on the head cannot have dropout"):
        student('student.lora={rank: 2, dropout: 0.1, targets: ["q_proj", "lm_head"]}')
    assert student('student.lora={rank: 2, dropout: 0.1, targets: ["q_proj"]}').adapters is not None


def test_layers_that_the_student_does_not_have(student):
    with pytest.raises(MismatchError, match=r"no layers of the names in student\.lora\.targets"):
        student('student.lora={targets: ["wq"]}')


def test_freezing_works_beside_adapters(student):
    built = student("student.lora.rank=2", 'student.freeze=["*layers.0*"]')
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in built.model.named_parameters() if "lora_" in n and "layers.1" in n}


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_trained(family, saved_model, tmp_path, tiny_tokenizer):
    built = Student(loading.load_model(str(saved_model(family)), dtype=torch.float32))
    batch = build_batch(20, 9)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.mul_(1.1)
        wanted = own_logits(built.model, batch)
    built.save(tmp_path / "model", tiny_tokenizer)
    with torch.no_grad():
        assert torch.equal(own_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), batch), wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("12 drops")["input_ids"] == tiny_tokenizer("12 drops")["input_ids"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_replaces_what_was_there(student, tmp_path, tiny_tokenizer):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "half").touch()
    student().save(tmp_path / "model", tiny_tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not {"old", "half"} & {p.name for p in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("targets", ["all-linear", '["q_proj", "lm_head"]'], ids=["layers", "head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_adapters_give_the_adapted_model(targets, tied, student, saved_model, tmp_path, tiny_tokenizer):
    folder = saved_model("qwen2", seed=1, tie_word_embeddings=tied)
    built = student(f"student.lora={{rank: 2, targets: {targets}}}", model=folder)
    randomise_adapters(built)
    batch = build_batch(20, 9)
    with torch.no_grad():
        wanted = own_logits(built.adapters, batch)
        built.save(tmp_path / "model", tiny_tokenizer)
        found = own_logits(loading.load_model(str(tmp_path / "model"), dtype=torch.float32), batch)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not list((tmp_path / "model").glob("adapter*"))


@pytest.mark.parametrize("targets", ["all-linear", '["q_proj", "lm_head"]'], ids=["layers", "head"])
def test_adapters_alone_are_loaded_by_transformers(targets, student, saved_model, tmp_path, tiny_tokenizer):
    built = student(
        f"student.lora={{rank: 2, targets: {targets}, export: adapter}}", model=saved_model("qwen3", seed=1)
    )
    randomise_adapters(built)
    batch = build_batch(20, 9)
    built.save(tmp_path / "model", tiny_tokenizer)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    with torch.no_grad():
        found = own_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), batch)
        torch.testing.assert_close(found, own_logits(built.adapters, batch), rtol=1e-5, atol=1e-5)


def test_adapters_alone_of_a_new_student_are_refused(recipe, tmp_path):
    """Its own weights, random as they are, would be lost, and the adapters fit no other."""
    values = ["student={init: {kind: config}, lora: {rank: 2, export: adapter}}", f"out={tmp_path}/run"]
    with pytest.raises(ConfigError, match="adapter"):
        load(DistillConfig, recipe, values)


# --- what an export says of itself -----------------------------------------------------------------------------------


def test_the_export_stops_where_its_tokenizer_ends_a_sequence(student, tmp_path, tiny_tokenizer):
    """A base model that is served with a chat tokenizer must stop at the end of a turn."""
    built = student()
    built.model.generation_config.eos_token_id = [7, 1]
    built.model.config.eos_token_id = 7
    tiny_tokenizer = AutoTokenizer.from_pretrained(built.model.name_or_path)
    tiny_tokenizer.eos_token = "e"
    wanted = tiny_tokenizer.convert_tokens_to_ids("e")
    built.save(tmp_path / "model", tiny_tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.generation_config.eos_token_id == [wanted, 7, 1]
    assert again.config.eos_token_id == [wanted, 7]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [None, "merged", "adapter"])
def test_an_export_of_another_type_is_the_rounded_weights(lora, tied, student, saved_model, tmp_path, tiny_tokenizer):
    folder, stored = saved_model("qwen2", seed=1, tie_word_embeddings=tied), []
    for place, dtype in (("as it is", None), ("full", torch.float32), ("half", torch.bfloat16)):
        built = student(*([] if lora is None else [f"student.lora={{rank: 2, export: {lora}}}"]), model=folder)
        if lora is not None:
            randomise_adapters(built)
        built.save(tmp_path / place, tiny_tokenizer, dtype=dtype)
        (weights,) = (tmp_path / place).glob("*.safetensors")
        stored.append(weights)
    as_it_is, full, half = stored
    assert as_it_is.read_bytes() == full.read_bytes()
    wanted, found = load_file(full), load_file(half)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in wanted)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    files = {path.name for path in half.parent.iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json"}
    assert files == {path.name for path in as_it_is.parent.iterdir()}
    if lora != "adapter":
        assert "generation_config.json" in files
        assert json.loads((half.parent / "config.json").read_text())["dtype"] == "bfloat16"
        assert json.loads((full.parent / "config.json").read_text())["dtype"] == "float32"


def test_an_export_has_the_type_of_the_checkpoint_it_comes_from(tmp_path):
    model = build_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "half")

    def resolved(precision: str = "float32") -> str:
        source = str(tmp_path / "half")
        return StudentPlan(loading.read_config(source), (source, None)).export_dtype(precision)

    assert resolved() == "bfloat16"
    assert resolved("float64") == "float64"
    described = json.loads((tmp_path / "half" / "config.json").read_text())
    del described["dtype"]
    (tmp_path / "half" / "config.json").write_text(json.dumps(described))
    assert resolved() == "bfloat16"
    weights = load_file(tmp_path / "half" / "model.safetensors")
    norm = {name: tensor.float() if "norm" in name else tensor.half() for name, tensor in weights.items()}
    save_file(norm, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    assert resolved() == "float16"
    (tmp_path / "half" / "config.json").write_text(json.dumps({**described, "torch_dtype": "float16"}))
    assert resolved() == "float16"


def test_a_new_student_is_exported_in_float32_or_as_its_pattern_says(tiny_tokenizer):
    of_family = new_config(NewStudentConfig(kind="config", family="llama"), None, tiny_tokenizer)
    assert StudentPlan(of_family).export_dtype("float32") == "float32"
    pattern = build_config("llama")
    pattern.dtype = torch.bfloat16
    like = new_config(NewStudentConfig(kind="config"), pattern, tiny_tokenizer)
    assert StudentPlan(like).export_dtype("float32") == "bfloat16"


def test_a_student_that_will_be_sharded_keeps_its_generation_config(recipe, tmp_path):
    model = build_model("llama")
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    model.save_pretrained(tmp_path / "model")
    config = load(DistillConfig, recipe, [f"student.model={tmp_path}/model", f"out={tmp_path}/run"])
    built = build_student(config.student, dtype=torch.float32, device="meta", seed=0)
    assert built.model.generation_config.top_k == 7


def test_a_generation_config_that_contradicts_itself_is_written_back(student, saved_model, tmp_path):
    """As published ones do; a run must not fail for it at its end."""
    folder = Path(shutil.copytree(saved_model("llama"), tmp_path / "published"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.5, "eos_token_id": [9, 8]}))
    student(model=folder).save(tmp_path / "model", AutoTokenizer.from_pretrained(folder))
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.5


def test_an_adapter_on_embeddings_that_the_head_shares_is_refused(student, saved_model):
    with pytest.raises(MismatchError, match="embeddings that the head shares"):
        student("student.lora={rank: 2, targets: [embed_tokens]}", model=saved_model("llama", tie_word_embeddings=True))
    student("student.lora={rank: 2, targets: [embed_tokens]}", model=saved_model("llama", tie_word_embeddings=False))


def test_a_new_student_gets_the_attention_that_was_asked_for():
    assert loading.build_model(build_config("llama"), seed=0, attention="eager").config._attn_implementation == "eager"

"""Quantised weights: those of the layers and no others, near what they were, and counted as they were."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from conftest import SaveModel, build_batch, build_config, build_model
from stillroom.capture.config import CaptureConfig
from stillroom.capture.plan import make_plan as make_capture_plan
from stillroom.capture.run import build_capture
from stillroom.config import Quantization, load, replace
from stillroom.distill.build import build_teacher
from stillroom.distill.config import DistillConfig
from stillroom.distill.estimate import resolve_parallel
from stillroom.distill.plan import make_plan
from stillroom.distributed.group import RankGroup
from stillroom.distributed.init import DistContext
from stillroom.errors import MismatchError, MissingError
from stillroom.estimates.memory import WEIGHT_BYTES, weights_bytes
from stillroom.estimates.model_size import model_size
from stillroom.models import loading, quantization
from stillroom.models.hidden_states import lm_head, verify
from stillroom.models.quantization import PACKAGES, check_quantizable, check_quantized, is_quantized, quantized_loading
from stillroom.signals import Dense
from stillroom.teachers.live import LiveTeacher

KINDS: tuple[Quantization, ...] = ("int8", "fp8", "nf4")
SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""The least that nf4 takes on a CPU."""
FARTHEST = {"int8": 0.005, "fp8": 0.04, "nf4": 0.16}
"""Of a rounded weight, as a share of the largest of its channel: half a step of 1/127, half of e4m3's 32/448,
and half of nf4's widest gap (0.30, between the two least) with its scale in bfloat16."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Quantization:
    pytest.importorskip(PACKAGES[request.param], reason="the extra `quantized` is not installed")
    return request.param


def loaded(saved_model: SaveModel, kind: Quantization | None, **settings: Any) -> PreTrainedModel:
    folder = saved_model("llama", **SIZES, **settings)
    return loading.load_model(str(folder), dtype=torch.float32, quantization=kind)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_layers_are_quantised_and_head_and_embeddings_are_not(saved_model: SaveModel, kind: Quantization, tied: bool):
    full, model = (loaded(saved_model, which, tie_word_embeddings=tied) for which in (None, kind))
    assert torch.equal(lm_head(full).weight, lm_head(model).weight)
    assert torch.equal(full.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    inner = {name for name, p in model.named_parameters() if is_quantized(p)}
    assert inner == {name for name, p in full.named_parameters() if p.ndim == 2 and ".layers." in name}
    assert loading.num_parameters(model) == loading.num_parameters(full)
    verify(model, "the teacher", pack=True)


def test_a_layer_says_nearly_what_it_said(saved_model: SaveModel, kind: Quantization):
    full, model = (loaded(saved_model, which) for which in (None, kind))
    exact, rounded = (m.model.layers[0].mlp.up_proj for m in (full, model))
    one_by_one = torch.eye(exact.in_features)
    with torch.no_grad():
        weights, near = exact(one_by_one), rounded(one_by_one)
    assert not torch.equal(weights, near)
    assert ((weights - near).abs() / weights.abs().amax(0)).max() <= FARTHEST[kind]


def test_a_teacher_of_a_run_is_quantised_and_lies_whole(saved_model: SaveModel, recipe, kind: Quantization):
    settings = [f"teacher.model={saved_model('llama', **SIZES)}", f"teacher.quantization={kind}", "out=runs/x"]
    plan = make_plan(load(DistillConfig, recipe, settings))
    assert plan.config.teacher.placement == "whole"
    teacher = build_teacher(plan)
    signal = teacher.forward(build_batch(9, 5)).signal
    assert isinstance(signal, Dense)
    assert signal.hidden.dtype == signal.head.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert sum(map(is_quantized, teacher.model.parameters())) == 7 * teacher.model.config.num_hidden_layers


def test_beside_a_sharded_student_it_lies_whole(recipe):
    config = load(DistillConfig, recipe, ["teacher.quantization=int8", "parallel={kind: fsdp}", "out=runs/x"])
    two = DistContext(RankGroup(0, 2), RankGroup(0, 2))
    assert resolve_parallel(config, None, two, 2**40).teacher.placement == "whole"
    plain = replace(config, {"teacher.quantization": None})
    assert resolve_parallel(plain, None, two, 2**40).teacher.placement == "sharded"


def test_a_capture_asks_a_quantised_teacher(
    saved_model: SaveModel, text_files: Path, tmp_path: Path, kind: Quantization
):
    values = {
        "teacher": {
            "model": str(saved_model("llama", **SIZES)),
            "engine": {"kind": "transformers", "quantization": kind},
        },
        "data": {"path": str(text_files / "train.jsonl"), "format": "text", "length": 16, "max_documents": 4},
        "out": str(tmp_path / "run"),
    }
    plan = make_capture_plan(CaptureConfig.model_validate(values))
    config = plan.config
    teacher = build_capture(config.teacher, plan.tokenizer, config.data, config.signal, seed=0, hidden=None).teacher
    assert isinstance(teacher, LiveTeacher)
    assert any(map(is_quantized, teacher.model.parameters()))


def test_a_package_that_is_missing_is_told_before_anything_is_loaded(recipe, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingError, match=r"bitsandbytes.*is not installed\n.*nf4") as error:
        make_plan(load(DistillConfig, recipe, ["teacher.quantization=nf4", "out=runs/x"]))
    assert "stillroom[quantized]" in error.value.fix


def test_a_model_that_is_stored_quantised_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantization, "require", lambda *_: None)
    config = build_config("llama")
    check_quantizable(config, "int8", "the teacher")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(MismatchError, match=r"the teacher is quantized already\n.*gptq"):
        check_quantizable(config, "int8", "the teacher")


def test_a_model_of_which_nothing_is_quantised_is_refused(saved_model: SaveModel):
    """gpt2's layers are not linear layers of torch's, which is all that torchao knows."""
    pytest.importorskip("torchao", reason="the extra `quantized` is not installed")
    with pytest.raises(MismatchError, match=r"no layer of .* can be quantized to int8"):
        loading.load_model(str(saved_model("gpt2")), dtype=torch.float32, quantization="int8")


def test_sizes_that_four_bits_do_not_fit_are_refused(saved_model: SaveModel):
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    with pytest.raises(MismatchError, match=r"do not fit\n.*q_proj.weight: 16 outputs of 16 inputs"):
        loading.load_model(str(saved_model("llama")), dtype=torch.float32, quantization="nf4")


def test_a_head_that_is_quantised_is_refused():
    ao = pytest.importorskip("torchao.quantization", reason="the extra `quantized` is not installed")
    model = build_model("llama")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(MismatchError, match="the head of the teacher would be quantized"):
        check_quantized(model, "int8", "the teacher")


def test_four_bits_are_those_of_qlora_on_the_device():
    settings = quantized_loading("nf4", torch.bfloat16, "cuda:1")
    assert settings["device_map"] == {"": "cuda:1"}
    four = settings["quantization_config"]
    assert isinstance(four, BitsAndBytesConfig)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert four.bnb_4bit_use_double_quant
    assert four.llm_int8_skip_modules is None  # the head and what is tied to it


def test_a_plan_counts_the_bytes_that_are_held(saved_model: SaveModel, kind: Quantization):
    """But for scales of channels, which are few where models are large; here they are counted by hand."""
    model = loaded(saved_model, kind)
    planned = weights_bytes(model_size(model.config, "the teacher"), 4, kind)
    inner = [p for p in model.parameters() if is_quantized(p)]
    rest = 4 * sum(p.numel() for p in model.parameters() if not is_quantized(p))
    if kind == "nf4":
        held = rest + sum(p.numel() * p.itemsize for p in inner)
        scales = sum(p.quant_state.absmax.numel() + 4 * p.quant_state.state2.absmax.numel() for p in inner)
        assert held + scales == pytest.approx(planned, rel=0.01)
    else:
        held = rest + sum(p.numel() for p in inner)
        assert all(p.qdata.itemsize == 1 for p in inner)
        assert held == planned
    assert planned == rest + WEIGHT_BYTES[kind] * sum(map(quantization.num_numbers, inner))

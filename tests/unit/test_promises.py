"""Plans against products that are promised: what a verb will make is read as if it was there, and never loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.capture import plan as capture
from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run as run_capture
from stillroom.config import load
from stillroom.distill import plan as distill
from stillroom.distill.config import DistillConfig
from stillroom.distill.run import run as run_distill
from stillroom.errors import ConfigError, DataError
from stillroom.estimates.headers import numbers_of, read_sizes
from stillroom.models import loading
from stillroom.models.safetensors_io import load_weights
from stillroom.prune import plan as prune
from stillroom.prune.config import PruneConfig
from stillroom.prune.run import run as run_prune
from stillroom.verbs import VerbPlan

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CUT = ("layers=2", "width={hidden_size: 12, intermediate_size: 10, num_attention_heads: 2, num_key_value_heads: 1}")


@pytest.fixture
def teacher(saved_model) -> str:
    return str(saved_model("llama", seed=2, **SHAPE))


@pytest.fixture
def cut(teacher: str, text_files: Path, tmp_path: Path) -> PruneConfig:
    data = [f"data.path={text_files}/train.jsonl", "data.format=text", "data.length=32", "documents=4"]
    return load(PruneConfig, None, [f"model={teacher}", f"out={tmp_path}/cut", "device=cpu", *data, *CUT])


def plan_training(recipe: Path, tmp_path: Path, teacher: str, student: Path, *more: str) -> VerbPlan[Any]:
    words = [f"teacher.model={teacher}", f"student={{model: {student}}}", f"out={tmp_path}/run", "device=cpu", *more]
    return distill.make_plan(load(DistillConfig, recipe, words))


def shown(plan: VerbPlan[Any], *places: Path) -> str:
    text = str(plan)
    for place in places:
        text = text.replace(str(place), "PLACE")
    return text


def test_a_plan_is_the_same_before_and_after_the_run_that_it_needs(cut, teacher, recipe, tmp_path):
    promised, hidden = tmp_path / "promised", "objectives=[{kind: hidden, layers: kept, distance: {kind: cosine}}]"
    prune.make_plan(cut).promise(promised)
    before = plan_training(recipe, tmp_path, teacher, promised / "model", hidden)
    run_prune(cut)
    after = plan_training(recipe, tmp_path, teacher, tmp_path / "cut" / "model", hidden)
    assert shown(before, promised) == shown(after, tmp_path / "cut")
    assert "layers" in before.details()


def test_promises_follow_one_another(cut, teacher, recipe, tmp_path):
    prune.make_plan(cut).promise(tmp_path / "first")
    first = plan_training(recipe, tmp_path, teacher, tmp_path / "first" / "model", "export.dtype=float16")
    first.promise(tmp_path / "second")
    second = plan_training(recipe, tmp_path, teacher, tmp_path / "second" / "model")
    assert second.config.export.dtype == "float16"
    files, size = read_sizes(str(tmp_path / "second" / "model"), None, "the student")
    assert files.numbers == {"F16": size.total}
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_promised_takes_no_room_and_has_the_tensors_of_the_model(cut, tmp_path):
    prune.make_plan(cut).promise(tmp_path / "promised")
    run_prune(cut)
    weights = [folder / "model" / "model.safetensors" for folder in (tmp_path / "promised", tmp_path / "cut")]
    assert numbers_of(weights[0]) == numbers_of(weights[1])
    assert weights[0].stat().st_blocks * 512 < 2**16
    configs = [loading.read_config(str(path.parent)).to_dict() for path in weights]
    assert configs[0] == configs[1] | {"_name_or_path": configs[0].get("_name_or_path")}


def test_a_model_that_is_promised_is_never_loaded(cut, tmp_path):
    prune.make_plan(cut).promise(tmp_path)
    with pytest.raises(DataError, match="promised, and not there yet"):
        loading.load_model(str(tmp_path / "model"), dtype=torch.float32)
    model = loading.build_meta_model(loading.read_config(str(tmp_path / "model")), dtype=torch.float32)
    with pytest.raises(DataError, match="promised, and not there yet"):
        load_weights(model, tmp_path / "model")


def test_a_store_is_learned_from_before_it_is_captured(teacher, recipe, text_files, tmp_path):
    def plan(store: str, held_out: str) -> VerbPlan[Any]:
        return plan_training(
            recipe, tmp_path, teacher, Path(teacher), f"teacher={{kind: store, path: {store}}}",
            "data={format: store}", f"held_out={{path: {held_out}}}", "objectives=[{kind: forward_kl}]",
            "batch={tokens: 64}",
        )  # fmt: skip

    places = {}
    for name in ("train", "valid"):
        words = [
            f"teacher={{model: {teacher}, engine: {{kind: transformers, device: cpu}}}}",
            f"data={{path: {text_files}/{name}.jsonl, format: text, length: 32}}",
            "signal={kind: top_k, k: 4}",
            f"out={tmp_path}/{name}",
        ]
        config = load(CaptureConfig, None, words)
        capture.make_plan(config).promise(tmp_path / "promised" / name)
        places[name] = config
    before = plan(*(f"{tmp_path}/promised/{name}/store" for name in places))
    with pytest.raises(DataError, match="promised, and not there yet"):
        run_distill(before.config)
    for config in places.values():
        run_capture(config)
    after = plan(*(f"{tmp_path}/{name}/store" for name in places))
    assert before.config.model_dump(exclude={"teacher", "held_out"}) == after.config.model_dump(
        exclude={"teacher", "held_out"}
    )
    assert before.details() == after.details()
    with pytest.raises(ConfigError, match="less than a row"):
        plan_training(
            recipe, tmp_path, teacher, Path(teacher), f"teacher={{kind: store, path: {tmp_path}/promised/train/store}}",
            "data={format: store}", "held_out=null", "objectives=[{kind: forward_kl}]", "batch={tokens: 16}",
        )  # fmt: skip


def test_an_adapter_alone_is_no_model_that_could_be_promised(teacher, recipe, tmp_path):
    plan = plan_training(recipe, tmp_path, teacher, Path(teacher), "student.lora={export: adapter}")
    plan.promise(tmp_path / "promised")
    assert not (tmp_path / "promised").exists()

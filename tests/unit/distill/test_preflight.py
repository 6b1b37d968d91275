"""A trial: what it measures is so, its step is a run's longest, and it leaves nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.test_validation import naive
from transformers import AutoModelForCausalLM

from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run as capture
from stillroom.config import load
from stillroom.data.dataloader import plan_rows
from stillroom.data.dataset import prepare
from stillroom.distill import preflight as module
from stillroom.distill.config import DistillConfig
from stillroom.distill.preflight import Preflight
from stillroom.errors import MismatchError, NonFiniteError, OutOfMemoryError


@pytest.fixture
def begin(recipe: Path, tmp_path: Path):
    """A trial of the tiny recipe, which has been looked at up to its data: ``begin("steps=3", sequences=5)``."""

    def go(*words: str, sequences: int = 256) -> tuple[Preflight, dict[str, Any], dict[str, Any]]:
        trial = Preflight(load(DistillConfig, recipe, [f"out={tmp_path / 'run'}", "held_out=null", *words]), sequences)
        return trial, trial.fit(), trial.look()

    return go


def test_measures_are_those_of_full_logits(begin, saved_model):
    trial, fit, data = begin()
    found = trial.measure()
    student, teacher = (AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=seed)) for seed in (1, 2))
    wanted = naive(student, teacher, trial.documents)
    assert {name: found[name] for name in wanted if name != "loss_nats"} == pytest.approx(
        {name: value for name, value in wanted.items() if name != "loss_nats"}, rel=1e-5
    )
    assert found["student"] == "trained"
    assert found["num_tokens"] == data["tokens_learnt"]
    assert (fit["columns"], fit["student_columns"], fit["teacher_columns"]) == (304, 304, 304)


def test_nothing_is_written(begin, own_cache, tmp_path):
    trial, _, _ = begin()
    trial.measure()
    assert trial.own_text()["num_tokens"] > 32
    trial.step()
    assert not (tmp_path / "run").exists()
    assert not own_cache.exists()


def test_all_rows_are_drawn_from_once_they_are_tokenized(begin, text_files):
    trial, _, first = begin(sequences=5)
    assert (first["rows"], first["whole"], first["looked_at"]) == (5, False, 5)
    prepare(trial.plan.config.data, trial.plan.tokenizer)
    trial, _, data = begin(sequences=5)
    assert (data["rows"], data["whole"], data["looked_at"]) == (24, True, 5)
    assert trial.drawn.max() > 5
    texts = [text for _, text in trial.texts()]
    assert len(texts) == 5
    rows = [json.loads(line)["text"] for line in (text_files / "train.jsonl").read_text().splitlines()]
    assert all(any(text in row for row in rows) for text in texts)
    assert trial.measure()["num_tokens"] == sum(
        int(trial.documents.target_mask(n)[1:].sum()) for n in trial.drawn.tolist()
    )


@pytest.mark.parametrize("pack", ["true", "false"])
def test_the_step_is_of_the_longest_rows_and_fills_its_batch(begin, monkeypatch, pack):
    trial, _, _ = begin(f"data.pack={pack}", "batch={tokens: 128, micro_tokens: 64}", sequences=4)
    trial.measure()
    before = {name: p.clone() for name, p in trial.state.module.named_parameters()}
    given: list[list[Any]] = []
    monkeypatch.setattr(
        module,
        "optimizer_step",
        lambda *a, micro_batches, step=module.optimizer_step: (
            given.append(micro_batches),
            step(*a, micro_batches=micro_batches),
        )[1],
    )
    found = trial.step()
    first, whole = given
    assert first == whole[:1]
    lengths = [int((batch.documents >= 0).sum(-1).max()) for batch, _ in whole]
    data, every = trial.plan.config.data, np.arange(len(trial.documents))
    longest = int(plan_rows(trial.documents.lengths, data.length, data.pack, every).num_positions.max())
    assert found["longest_row"] == lengths[0] == longest
    assert 128 - longest < found["num_tokens"] <= 128
    assert all(batch.tokens.numel() <= 64 for batch, _ in whole)
    assert found["peak_memory_bytes"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in trial.state.module.named_parameters())


def test_no_row_is_longer_than_those_of_the_step(begin):
    """The lengths of documents differ, and a step holds few of them."""
    trial, _, _ = begin("data.pack=false", "batch={tokens: 64, micro_tokens: 32}")
    trial.measure()
    found = sorted((int(row.sum()) for batch, _ in trial._longest() for row in batch.documents >= 0), reverse=True)
    longest = np.sort(trial.documents.lengths - 1)[::-1]
    assert longest[-1] < longest[len(found)]
    assert found == longest[: len(found)].tolist()
    assert sum(found) <= 64 < sum(found) + longest[len(found)]


def test_steps_are_counted_where_all_data_are_known(begin):
    trial, _, _ = begin("steps=null", "epochs=2", sequences=4)
    trial.measure()
    assert trial.step()["num_steps"] is None
    prepare(trial.plan.config.data, trial.plan.tokenizer)
    trial, _, _ = begin("steps=null", "epochs=2", sequences=4)
    trial.measure()
    assert trial.step()["num_steps"] > 10


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["student={init: {kind: config, settings: {num_hidden_layers: 1}}}"], "new"),
        (["student={init: {kind: from_teacher, layers: 1}}"], "part"),
        (["student.lora={rank: 2}"], "trained"),
        (["objectives=[{kind: hidden, projector: {kind: linear, start: least_squares}}]"], "trained"),
        (["teacher=null", "objectives=[{kind: cross_entropy}]"], "trained"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_every_kind_of_student(begin, tmp_path, words, kind):
    trial, _, _ = begin(*words, sequences=6)
    found = trial.measure()
    assert found["student"] == kind
    assert (found["student_trained"] < found["student_parameters"]) == ("lora" in words[0])
    assert ("forward_kl_nats" in found) == ("teacher=null" not in words)
    assert (trial.own_text() is None) == (kind != "trained" or "teacher=null" in words)
    assert trial.step()["loss_nats"] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words", [["parallel.kind=fsdp"], ["teacher.placement=sharded"], ["parallel.kind=ddp", "teacher.ranks=1"]]
)
def test_a_recipe_of_many_processes_is_tried_in_one(begin, words):
    found = []
    for some in ([], words):
        trial, _, _ = begin(*some)
        found.append((trial.measure(), trial.step()["loss_nats"]))
    assert found[0] == found[1]


def test_from_a_store(begin, saved_model, text_files, tmp_path):
    words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
             "data.format=text", "data.length=32", "signal={kind: top_k, k: 8, label: true}",
             f"out={tmp_path}/capture"]  # fmt: skip
    capture(load(CaptureConfig, None, words))
    live = begin("teacher.columns=300")[0]
    of_live = live.measure()
    trial, fit, data = begin(f"teacher={{kind: store, path: {tmp_path}/capture/store}}", "data={format: store}")
    assert (fit["stored_columns"], fit["columns"]) == (300, 300)
    assert data["whole"]
    found = trial.measure()
    for name in ("cross_entropy_nats", "top1_agreement"):
        assert found[name] == pytest.approx(of_live[name], rel=1e-5)
    assert found["teacher_cross_entropy_nats"] == pytest.approx(of_live["teacher_cross_entropy_nats"], abs=0.01)
    assert found["teacher_parameters"] is None
    assert trial.own_text() is None
    assert trial.step()["num_steps"] == 6


def test_models_that_do_not_fit(begin, saved_model, chat_tokenizer_folder):
    with pytest.raises(MismatchError, match="different tokenizers"):
        begin(f"teacher.model={saved_model('llama', tokenizer=chat_tokenizer_folder)}")


def test_too_little_memory_says_what_asks_for_less(begin, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trial, _, _ = begin("batch={tokens: 128, micro_tokens: 96}")
    monkeypatch.setattr(module, "build_pair", full)
    with pytest.raises(OutOfMemoryError, match="too little memory for the models and a batch of text"):
        trial.measure()
    monkeypatch.undo()
    trial.measure()
    monkeypatch.setattr(type(trial.state.module), "forward", full)
    with pytest.raises(OutOfMemoryError, match="too little memory for a step on the longest rows") as raised:
        trial.step()
    assert raised.value.values == {"device": "cpu", "reason": "CUDA out of memory"}
    for way in ("batch.micro_tokens=48,", "student.gradient_checkpointing=true", "stillroom capture", "student.lora="):
        assert way in raised.value.fix
    assert "--resume" not in str(raised.value)


def test_a_lack_of_memory_on_a_cpu(begin, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip

    trial, _, _ = begin()
    monkeypatch.setattr(module, "build_pair", full)
    with pytest.raises(OutOfMemoryError) as raised:
        trial.measure()
    assert raised.value.values["reason"] == "can't allocate memory: you tried to allocate 99 bytes"


def test_a_bug_is_no_lack_of_memory(begin, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trial, _, _ = begin()
    monkeypatch.setattr(module, "build_pair", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        trial.measure()


def test_a_step_that_is_not_finite(begin):
    trial, _, _ = begin("optimizer={learning_rate: 1e38, clip: null}")
    trial.measure()
    with pytest.raises(NonFiniteError):
        trial.step()

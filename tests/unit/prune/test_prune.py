"""Whole cuts: what is written, what is refused before any model loads, and that nothing is left by halves."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom import runs
from stillroom.config import load
from stillroom.errors import ConfigError, MismatchError, MissingError, OutOfMemoryError, StillroomError, StorageError
from stillroom.models import loading
from stillroom.prune import run as module
from stillroom.prune.config import PruneConfig
from stillroom.prune.plan import make_plan
from stillroom.prune.run import run
from stillroom.pruning.prune import read_mask
from stillroom.runs import read_json

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
BOTH = ("layers={kind: best, count: 2, by: loss_increase}", "width={hidden_size: 12, intermediate_size: 10}")


@pytest.fixture
def settings(saved_model, text_files: Path, tmp_path: Path):
    """Settings of a tiny cut: ``settings("x", "layers=1")``; ``x`` is in tmp_path."""

    def words(out: str, *more: str, data: bool = True) -> PruneConfig:
        text = [f"data.path={text_files}/train.jsonl", "data.format=text", "data.length=32", "documents=12",
                f"held_out.path={text_files}/valid.jsonl"]  # fmt: skip
        model = saved_model("llama", seed=2, **SHAPE)
        return load(PruneConfig, None, [f"model={model}", f"out={tmp_path / out}", *(text if data else []), *more])

    return words


def test_a_smaller_model_its_cut_and_its_loss_are_written(settings, saved_model, tmp_path):
    notes: list[str] = []
    record = run(settings("a", *BOTH), report=lambda _, values: notes.append(values.get("text", "")))
    folder = tmp_path / "a"
    assert read_json(folder / "run.json") == record
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size) == (2, 12, 10)
    AutoTokenizer.from_pretrained(folder / "model")
    cut = read_mask(folder / "model")
    assert cut is not None
    assert cut.teacher == record["model"]["fingerprint"] == loading.fingerprint(
        str(saved_model("llama", seed=2, **SHAPE)), model.config)  # fmt: skip
    assert list(cut.layers) == record["cut"]["layers"]
    assert record["cut"]["num_parameters"] == loading.num_parameters(model) < record["model"]["num_parameters"]
    assert record["status"] == "done"
    held_out = record["held_out"]
    assert held_out["model_cross_entropy_nats"] != held_out["cut_cross_entropy_nats"]
    assert held_out["num_tokens"] == record["held_out_data"]["tokens_learnt"]
    assert record["data"]["rows"] == 12
    assert "2 of 3" in record["report"]
    assert any(note.startswith("without layer") for note in notes)
    assert not list(folder.glob(".model*"))


def test_the_cut_model_is_on_the_disk_before_the_run_is_done(settings, monkeypatch):
    synced, whole, fsync, write_json = set[int](), [], os.fsync, runs.write_json

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def write(path: Path, values: Any) -> None:
        if values.get("status") == "done":
            product = path.parent / "model"
            whole.append({p.name: p.stat().st_ino in synced for p in (product.parent, product, *product.rglob("*"))})
        write_json(path, values)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(runs, "write_json", write)
    run(settings("a", "layers=2", data=False))
    assert len(whole) == 1
    assert {"a", "model", "model.safetensors", "config.json", "cut.json", "tokenizer.json"} <= set(whole[0])
    assert all(whole[0].values())


def test_a_cut_without_text(settings, tmp_path):
    record = run(settings("a", "layers=2", "dtype=bfloat16", data=False))
    assert "held_out" not in record
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model", dtype="auto").dtype == torch.bfloat16
    cut = read_mask(tmp_path / "a" / "model")
    assert cut is not None
    assert (cut.layers, cut.scores) == ((0, 2), {})


def test_the_type_of_the_weights_stays(settings, saved_model, tmp_path):
    model = loading.load_model(str(saved_model("llama", seed=2, **SHAPE)), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(saved_model("llama", seed=2, **SHAPE)).save_pretrained(tmp_path / "half")
    run(settings("a", f"model={tmp_path / 'half'}", "layers=[1]", data=False))
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model", dtype="auto")
    assert smaller.dtype == torch.bfloat16
    assert torch.equal(smaller.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_twice_is_the_same(settings, tmp_path):
    for out in ("a", "b"):
        run(settings(out, *BOTH))
    a, b = ((tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("a", "b"))
    assert a == b
    assert read_mask(tmp_path / "a" / "model") == read_mask(tmp_path / "b" / "model")


def test_resume_says_that_it_is_done_and_overwrite_does_it_again(settings, tmp_path):
    record = run(settings("a", "layers=2", data=False))
    with pytest.raises(StorageError, match="exists"):
        run(settings("a", "layers=2", data=False))
    notes: list[str] = []
    assert run(settings("a", "layers=2", data=False), resume=True,
               report=lambda _, values: notes.append(values["text"])) == record  # fmt: skip
    assert notes == [f"the cut in {tmp_path / 'a'} is done already"]
    with pytest.raises(ConfigError, match="has other settings"):
        run(settings("a", "layers=1", data=False), resume=True)
    assert run(settings("a", "layers=1", data=False), overwrite=True)["cut"]["layers"] == [0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("place", ["write_mask", "choose_mask", "prune_model"])
def test_what_is_stopped_leaves_no_model_and_can_be_done_again(settings, tmp_path, monkeypatch, place, error):
    def stop(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, place, stop)
        with pytest.raises(error):
            run(settings("a", "layers=2", data=False))
    assert [p.name for p in sorted((tmp_path / "a").iterdir()) if p.name != ".lock"] == ["run.json"]
    status = read_json(tmp_path / "a" / "run.json")["status"]
    assert status == ("interrupted" if error is KeyboardInterrupt else "failed")
    run(settings("a", "layers=2", data=False), resume=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").config.num_hidden_layers == 2


def test_a_full_disk_leaves_nothing(settings, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr(module, "write_mask", full)
    with pytest.raises(StorageError, match=r"model could not be written"):
        run(settings("a", "layers=2", data=False))
    assert not (tmp_path / "a").exists()


def test_too_little_memory_says_what_to_lower(settings, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to")

    monkeypatch.setattr(module, "choose_mask", fail)
    with pytest.raises(OutOfMemoryError, match="too little memory") as caught:
        run(settings("a", *BOTH))
    assert "Lower batch_tokens" in str(caught.value)


# --- refused before any model loads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("width=null",), "give `layers`, `width` or both"),
        (("layers=2", "held_out.path=x"), "give `data` too"),
        (("layers=2", "data={path: x, format: text, weight: w}"), "data.weight"),
        (("layers=2", "data={path: x, format: chat, template: student}"), "data.template"),
        (("layers=2", "data={path: x, format: text, length: 32}", "batch_tokens=31"), "batch_tokens (31) is less"),
        (("layers=2", "data={path: x, format: text}", "held_out={path: x}"), "held_out is the same as data"),
    ],
)
def test_settings_that_do_not_go_together(settings, words, said):
    with pytest.raises(ConfigError, match="these settings do not go together") as caught:
        settings("a", *words, data=False)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "data", "error", "what"),
    [
        (("layers=4",), False, MismatchError, "layers asks for layers that are not there"),
        (("width={hidden_size: 12}",), False, ConfigError, "there is no text to measure on"),
        (("layers={kind: best, count: 2}",), False, ConfigError, "there is no text to measure on"),
        (("layers=2", "held_out=null"), True, ConfigError, "nothing would read `data`"),
        (("layers=2", "data.length=65"), True, ConfigError, "data.length is longer than the model can read"),
        (("layers=2", "held_out.path=/nowhere.jsonl"), True, MissingError, "nowhere.jsonl"),
        (("layers=2", "model=/nowhere"), False, MissingError, "is not a model folder"),
        (("layers=2", "device=cuda:7"), False, MissingError, "the device `cuda:7` is not there"),
        (("layers=2", "data.format=chat"), True, MissingError, "the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_is_told_before_any_model_loads(settings, tmp_path, monkeypatch, words, data, error, what):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=what):
        run(settings("a", *words, data=data))
    assert not (tmp_path / "a").exists()


def test_a_family_that_is_not_described(settings, saved_model):
    with pytest.raises(MismatchError, match="no smaller model can be cut out of the family gpt2"):
        make_plan(settings("a", "layers=1", f"model={saved_model('gpt2')}", data=False))


def test_a_tokenizer_that_is_too_large_for_the_model(settings, saved_model):
    with pytest.raises(MismatchError, match="tokens that the model has no column for"):
        make_plan(settings("a", "layers=2", f"model={saved_model('llama', vocab_size=200)}"))


def test_the_output_does_not_lie_over_what_is_read(settings, saved_model):
    with pytest.raises(StillroomError, match="model lies inside the output folder"):
        make_plan(settings("a", "layers=1", f"out={saved_model('llama', seed=2, **SHAPE)}", data=False))


def test_the_plan_tells_what_will_be_read_cut_and_written(settings, text_files, tmp_path):
    text = str(make_plan(settings("a", *BOTH)))
    assert not (tmp_path / "a").exists()
    for line in (
        "  layers: '2 of 3: those that matter most by loss increase'",
        "  hidden_size: 12 of 16",
        "  num_attention_heads: 4, as it is",
        "  measured: on 12 documents",
        f"  data: {text_files}/train.jsonl",
        f"  model: {tmp_path}/a/model",
        "  batch_tokens: 4096",
    ):
        assert line in text.splitlines(), line

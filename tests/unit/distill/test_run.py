"""A whole run: what it leaves, and that an interrupted one ends as if it had never been."""

import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from conftest import build_model
from stillroom import runs
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.run import run
from stillroom.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MissingError,
    NonFiniteError,
    StillroomError,
    StorageError,
)
from stillroom.runs import read_json, read_metrics, seal, write_json

# peft itself still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

Distil = Callable[..., dict[str, Any]]


@pytest.fixture
def distil(recipe: Path, tmp_path: Path) -> Distil:
    """Runs the tiny recipe with other settings: ``distil("out=x", "steps=3", resume=True)``; ``x`` is in tmp_path."""

    def go(out: str, *settings: str, **flags: Any) -> dict[str, Any]:
        return run(load(DistillConfig, recipe, [f"out={tmp_path / out}", *settings]), **flags)

    return go


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of an uninterrupted run of the tiny recipe with other settings, which is not to be changed."""
    folders: dict[tuple[str, ...], Path] = {}

    def go(*settings: str) -> Path:
        if settings not in folders:
            folder = tmp_path_factory.mktemp("whole")
            cache = f"data.cache={folder / 'cache'}"
            run(load(DistillConfig, recipe, [f"out={folder / 'run'}", cache, *settings]))
            folders[settings] = folder / "run"
        return folders[settings]

    return go


def at_step(number: int, action: Callable[[], Any]) -> Callable[[str, Any], None]:
    """A ``report`` that does something once a step is done."""

    def report(event: str, values: Any) -> None:
        if event == "step" and values["step"] == number:
            action()

    return report


def press() -> None:
    signal.raise_signal(signal.SIGINT)


class Killed(BaseException):
    """As if the process had ended there."""


def kill() -> None:
    raise Killed


def weights(folder: Path) -> bytes:
    (path,) = (folder / "model").glob("*.safetensors")
    return path.read_bytes()


def losses(folder: Path) -> list[tuple[int, Any]]:
    """Each line of metrics.jsonl without the times."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [(line["step"], {k: v for k, v in line.items() if k not in ("time_s", "tokens_per_s")}) for line in lines]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    left_out = ("time_s", "started", "peak_memory_bytes", "config")
    return {key: value for key, value in record.items() if key not in left_out}


# --- what it leaves --------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(distil, tmp_path, tiny_tokenizer):
    record = distil("run", "checkpoints.every=4")
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"run.json", "metrics.jsonl", "model", "checkpoints"}
    assert read_json(folder / "run.json") == record
    assert record["status"] == "done"
    assert record["steps"] == 6
    assert record["config"]["batch"] == {"tokens": 64, "micro_tokens": 32}
    assert record["config"]["precision"] in ("float32", "bfloat16")
    assert "auto" not in (record["config"][key] for key in ("device", "precision", "logits_bytes"))
    assert record["num_kept"] == sum(line["num_kept"] for line in read_metrics(folder / "metrics.jsonl")[:6])
    assert {"python", "torch", "transformers", "stillroom"} <= record["versions"].keys()
    assert record["peak_memory_bytes"] > 2**26
    assert record["time_s"] > 0
    for thing in ("teacher", "student", "tokenizer", "data", "held_out_data"):
        assert record[thing]["fingerprint"]
    assert record["teacher"]["fingerprint"] != record["student"]["fingerprint"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == tiny_tokenizer.get_vocab()


@pytest.mark.parametrize("export", ["", "merged", "adapter"])
def test_the_model_is_on_the_disk_before_the_run_is_done(export, distil, monkeypatch):
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
    distil("run", "steps=1", *([f"student.lora={{rank: 2, export: {export}}}"] if export else []))
    assert len(whole) == 1
    weights = "adapter_model.safetensors" if export == "adapter" else "model.safetensors"
    assert {"run", "model", weights, "tokenizer.json"} <= set(whole[0])
    assert all(whole[0].values())


def held_out_cross_entropy(folder: Path, text: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[float, int]:
    """The exported model's loss on each document alone, by transformers, in pieces of 33 tokens; and how many count."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    total, num = 0.0, 0
    for line in text.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
        for start in range(0, len(tokens) - 1, 32):
            piece = tokens[start : start + 33]
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=piece[None, :-1]).logits[0], -1)
            total -= log_p.gather(-1, piece[1:, None]).sum().item()
            num += len(piece) - 1
    return total / num, num


def test_the_model_that_is_left_has_the_held_out_loss_that_is_told(whole, text_files, tiny_tokenizer):
    told = read_json(whole() / "run.json")["held_out"]
    loss, num = held_out_cross_entropy(whole(), text_files / "valid.jsonl", tiny_tokenizer)
    assert told["num_tokens"] == num
    assert told["cross_entropy_nats"] == pytest.approx(loss, rel=1e-5)


def test_the_same_settings_give_the_same_model(distil, tmp_path, whole):
    one = whole()
    torch.manual_seed(77)
    record = distil("two")
    assert weights(tmp_path / "two") == weights(one)
    assert losses(tmp_path / "two") == losses(one)
    assert without_times(record) == without_times(read_json(one / "run.json"))
    assert weights(whole("seed=1")) != weights(one)


def test_micro_tokens_change_no_more_than_rounding(whole):
    wanted = load_file(whole() / "model" / "model.safetensors")
    found = load_file(whole("batch.micro_tokens=64") / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_new_student(distil, tmp_path):
    record = distil("run", "student={init: {kind: config, settings: {num_hidden_layers: 1}}}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 1
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert record["student"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    lines = losses(tmp_path / "run")
    assert lines[5][1]["loss_nats"] < lines[0][1]["loss_nats"]


def test_without_a_teacher(distil):
    hard = ("teacher=null", "objectives=[{kind: cross_entropy}]")
    record = distil("run", *hard)
    assert "teacher" not in record
    assert record["held_out"].keys() == {"loss_nats", "cross_entropy_nats", "student_entropy_nats", "num_tokens"}


def test_a_teacher_that_only_measures(distil, tmp_path):
    """Hard labels alone give the same student with it and without."""
    record = distil("with", "objectives=[{kind: cross_entropy}]")
    assert record["held_out"]["forward_kl_nats"] > 0
    distil("without", "teacher=null", "objectives=[{kind: cross_entropy}]")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_frozen_parameters_stay_bit_for_bit(distil, tmp_path, saved_model):
    distil("run", 'student.freeze=["model.layers.0.*", "model.embed_tokens.weight"]')
    before = load_file(saved_model("llama", seed=1) / "model.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        frozen = name.startswith(("model.layers.0.", "model.embed_tokens"))
        assert torch.equal(tensor, before[name]) == frozen, name


def test_heads_that_are_padded_differently(distil, saved_model, tmp_path):
    record = distil("run", f"teacher.model={saved_model('llama', seed=2, vocab_size=320)}", "optimizer.weight_decay=0")
    assert record["config"]["teacher"]["columns"] == 300
    before = load_file(saved_model("llama", seed=1) / "model.safetensors")["lm_head.weight"]
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(after[300:], before[300:])
    assert not torch.equal(after[:300], before[:300])


def test_epochs_are_passes_over_the_data(distil, tmp_path):
    record = distil("run", "steps=null", "epochs=2", "batch.tokens=256")
    assert record["num_kept"] == 2 * record["data"]["tokens_learnt"]
    assert {line["epoch"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "epoch" in line} >= {0, 1}


def test_adapters(distil, tmp_path, saved_model):
    record = distil("run", "student.lora={rank: 2, alpha: 64}")
    sizes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    assert record["student"]["num_trained"] == 2 * sum(2 * (inputs + outputs) for inputs, outputs in sizes)
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(saved_model("llama", seed=1) / "model.safetensors")
    assert merged.keys() == before.keys()
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in merged if "proj" in name}
    distil("alone", "student.lora={rank: 2, alpha: 64, export: adapter}")
    assert (tmp_path / "alone" / "model" / "adapter_model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alone" / "model")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")(tokens).logits
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


WORSE = ("objectives=[{kind: cross_entropy}]", "optimizer={learning_rate: 1, schedule: constant}", "held_out.every=1",
         "checkpoints={best: true, keep: 1}")  # fmt: skip
"""It gets worse and worse."""


def test_the_best_step_is_what_is_left(whole, text_files, tiny_tokenizer):
    record = read_json(whole(*WORSE) / "run.json")
    lines = read_metrics(whole(*WORSE) / "metrics.jsonl")
    held_out = {line["step"]: line["held_out"]["loss_nats"] for line in lines if "held_out" in line}
    best = min(held_out, key=held_out.__getitem__)
    assert best < 6
    assert record["best"] == {"step": best, "loss_nats": held_out[best]}
    loss, _ = held_out_cross_entropy(whole(*WORSE), text_files / "valid.jsonl", tiny_tokenizer)
    assert loss == pytest.approx(held_out[best], rel=1e-5)
    assert record["held_out"]["loss_nats"] == held_out[best]
    assert record["steps"] == 6, "steps were trained, whichever is kept"


# --- resuming --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": (),
    "adapters": ("student.lora={rank: 2}",),
    "tied": ("student.model=$TIED",),
    "dropout": ("student.model=$DROPOUT",),
    "new": ("student={init: {kind: config, settings: {num_hidden_layers: 1, attention_dropout: 0.3}}}",),
    "adapters of a new student": (
        "student={lora: {rank: 2, dropout: 0.2}, init: {kind: config, settings: {num_hidden_layers: 1}}}",
    ),
}
WHERE = [("plain", at) for at in (1, 2, 5)] + [(name, 3) for name in VARIANTS if name != "plain"]


@pytest.mark.parametrize(("name", "at"), WHERE)
def test_a_resumed_run_ends_as_an_uninterrupted_one(name, at, distil, tmp_path, saved_model, whole, monkeypatch):
    monkeypatch.setenv("TIED", str(saved_model("llama", seed=1, tie_word_embeddings=True)))
    monkeypatch.setenv("DROPOUT", str(saved_model("gpt2", seed=1)))
    settings = [*VARIANTS[name], "held_out.every=2"]
    wanted = whole(*settings)
    with pytest.raises(Interrupted, match=f"after step {at} of 6"):
        distil("parts", *settings, report=at_step(at, press))
    assert not (tmp_path / "parts" / "model").exists()
    torch.manual_seed(99)
    record = distil("parts", *settings, resume=True)
    assert weights(tmp_path / "parts") == weights(wanted)
    assert losses(tmp_path / "parts") == losses(wanted)
    assert without_times(record) == without_times(read_json(wanted / "run.json"))


@pytest.mark.parametrize("every", [1, 4])
def test_a_killed_run_goes_on_from_its_last_checkpoint(every, distil, tmp_path, whole):
    """Its metrics after that checkpoint are made anew, and not twice."""
    with pytest.raises(Killed):
        distil("parts", f"checkpoints.every={every}", report=at_step(5, kill))
    told = []

    def report(event: str, values: Any) -> None:
        told.append((event, values))

    distil("parts", f"checkpoints.every={every}", resume=True, report=report)
    assert [values["step"] for event, values in told if event == "step"] == list(range(4 // every * every + 1, 7))
    assert weights(tmp_path / "parts") == weights(whole())
    assert losses(tmp_path / "parts") == losses(whole())


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(distil, tmp_path, whole):
    with pytest.raises(Killed):
        distil("parts", report=at_step(2, kill))
    distil("parts", resume=True)
    assert weights(tmp_path / "parts") == weights(whole())
    assert losses(tmp_path / "parts") == losses(whole())


def test_a_run_that_was_killed_while_it_wrote_the_model(distil, tmp_path, whole):
    def report(event: str, values: Any) -> None:
        if event == "note" and values["text"].startswith("writing"):
            kill()

    with pytest.raises(Killed):
        distil("parts", report=report)
    (tmp_path / "parts" / ".model.tmp").mkdir()
    (tmp_path / "parts" / ".model.tmp" / "half").touch()
    distil("parts", resume=True)
    assert weights(tmp_path / "parts") == weights(whole())
    assert losses(tmp_path / "parts") == losses(whole())
    assert not (tmp_path / "parts" / ".model.tmp").exists()


def test_the_best_step_outlives_an_interruption(distil, tmp_path, whole):
    with pytest.raises(Interrupted):
        distil("parts", *WORSE, report=at_step(5, press))
    record = distil("parts", *WORSE, resume=True)
    assert record["best"] == read_json(whole(*WORSE) / "run.json")["best"]
    assert weights(tmp_path / "parts") == weights(whole(*WORSE))


@pytest.mark.parametrize("change", ["a value", "a line less", "nothing left"])
def test_metrics_that_were_changed_before_a_resume_are_told(change, distil, tmp_path, whole):
    with pytest.raises(Interrupted):
        distil("parts", report=at_step(3, press))
    metrics = tmp_path / "parts" / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text(
        {"a value": before.replace('"step": 2', '"step": 1'), "a line less": before.partition("\n")[2]}.get(change, "")
    )
    with pytest.raises(DataError, match="was changed after the checkpoint of step 3"):
        distil("parts", resume=True)
    metrics.write_text(before + '{"step": 4, "loss_nats": 0.0}\n')  # what follows is dropped as ever
    distil("parts", resume=True)
    assert losses(tmp_path / "parts") == losses(whole())


def test_a_run_of_an_earlier_version_whose_metrics_are_not_sealed_goes_on(distil, tmp_path, whole):
    with pytest.raises(Interrupted):
        distil("parts", report=at_step(3, press))
    state = tmp_path / "parts" / "checkpoints" / "step-00000003" / "state.json"
    values = read_json(state)
    assert values.pop("metrics")["size_bytes"] == (tmp_path / "parts" / "metrics.jsonl").stat().st_size
    write_json(state, seal(values))
    distil("parts", resume=True)
    assert losses(tmp_path / "parts") == losses(whole())
    assert weights(tmp_path / "parts") == weights(whole())


def test_a_run_without_a_folder_begins_with_resume(distil, tmp_path, whole):
    assert distil("run", resume=True)["status"] == "done"
    assert weights(tmp_path / "run") == weights(whole())


def test_a_run_that_is_done_is_left_alone(distil, tmp_path):
    record = distil("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    told = []
    assert distil("run", resume=True, report=lambda event, values: told.append((event, values))) == record
    assert told == [("note", {"text": f"the run in {tmp_path / 'run'} is done already"})]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_second_run_into_the_same_folder(distil, tmp_path):
    distil("run")
    before = weights(tmp_path / "run")
    with pytest.raises(StorageError, match="exists") as raised:
        distil("run", "seed=4")
    assert "--resume" in raised.value.fix
    assert "--overwrite" in raised.value.fix
    assert weights(tmp_path / "run") == before
    distil("run", "seed=4", overwrite=True)
    distil("fresh", "seed=4")
    assert weights(tmp_path / "run") == weights(tmp_path / "fresh")
    assert losses(tmp_path / "run") == losses(tmp_path / "fresh")


def test_other_settings_cannot_go_on(distil, tmp_path, whole):
    with pytest.raises(Interrupted):
        distil("run", report=at_step(2, press))
    with pytest.raises(ConfigError, match="has other settings") as raised:
        distil("run", "optimizer.learning_rate=3e-3", "objectives.0.weight=0.5", resume=True)
    assert raised.value.values == {
        "optimizer.learning_rate": "0.01 there, 0.003 now",
        "objectives.0.weight": "0.75 there, 0.5 now",
    }
    assert distil("run", "checkpoints={every: 1, keep: 1}", resume=True)["status"] == "done"
    assert weights(tmp_path / "run") == weights(whole())


def copied(saved_model, tmp_path: Path, seed: int) -> Path:
    return Path(shutil.copytree(saved_model("llama", seed=seed), tmp_path / f"model-{seed}", dirs_exist_ok=True))


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_the_export_is_of_the_type_of_the_students_checkpoint_or_of_the_one_that_is_asked_for(
    asked, distil, tmp_path, saved_model
):
    source = copied(saved_model, tmp_path, 0)
    AutoModelForCausalLM.from_pretrained(source).bfloat16().save_pretrained(source)
    settings = (f"student.model={source}", "steps=1")
    with pytest.raises(Interrupted):
        distil("run", *settings, "export.dtype=float16", report=at_step(1, press))
    record = read_json(tmp_path / "run" / "run.json")
    assert record["config"].pop("export") == {"dtype": "float16"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))  # as a version before wrote it
    wanted = "bfloat16" if asked == "auto" else asked
    done = distil("run", *settings, f"export.dtype={asked}", resume=True)
    assert done["config"]["export"] == {"dtype": wanted}
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, wanted)}
    assert read_json(tmp_path / "run" / "model" / "config.json")["dtype"] == wanted


def test_other_data_at_the_same_path_cannot_go_on(distil, tmp_path, text_files):
    data = Path(shutil.copy(text_files / "train.jsonl", tmp_path / "train.jsonl"))
    with pytest.raises(Interrupted):
        distil("run", f"data.path={data}", report=at_step(2, press))
    data.write_text(data.read_text().replace("still", "stall"))
    with pytest.raises(StillroomError):
        distil("run", f"data.path={data}", resume=True)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_another_model_at_the_same_path_cannot_go_on(which, distil, tmp_path, saved_model):
    """Neither run nor result would be what run.json says."""
    folder = copied(saved_model, tmp_path, 1)
    settings = (f"{which}.model={folder}", "student.lora.rank=2")
    with pytest.raises(Interrupted):
        distil("run", *settings, report=at_step(2, press))
    build_model("llama", seed=8).save_pretrained(folder)
    with pytest.raises(StillroomError):
        distil("run", *settings, resume=True)


def test_a_damaged_checkpoint_stops_the_run_and_the_earlier_one_goes_on(distil, tmp_path, whole):
    with pytest.raises(Killed):
        distil("run", "checkpoints.every=2", report=at_step(5, kill))
    checkpoints = tmp_path / "run" / "checkpoints"
    largest = max((checkpoints / "step-00000004").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be read") as raised:
        distil("run", "checkpoints.every=2", resume=True)
    assert "step-00000002" in str(raised.value)
    assert str(checkpoints / "step-00000004") in raised.value.fix
    shutil.rmtree(checkpoints / "step-00000004")
    distil("run", "checkpoints.every=2", resume=True)
    assert weights(tmp_path / "run") == weights(whole())
    assert losses(tmp_path / "run") == losses(whole())


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["data.path", "held_out.path", "teacher.model", "student.model"])
def test_a_run_that_lacks_something_leaves_nothing(key, distil, tmp_path):
    """And so the same command works once it is there."""
    with pytest.raises(MissingError):
        distil("run", f"{key}={tmp_path}/nowhere.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_broken_row_does_not_stand_in_the_way_of_the_mended_one(distil, tmp_path, text_files):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2"):
        distil("run", f"data.path={data}")
    data.write_text((text_files / "train.jsonl").read_text())
    assert distil("run", f"data.path={data}", resume=True)["status"] == "done"


def poisoned(
    saved_model, tmp_path: Path, value: float, weight: str = "layers.1.mlp.down_proj.weight", rows: slice = slice(1)
) -> Path:
    folder = tmp_path / "poisoned"
    model = AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=1))
    with torch.no_grad():
        model.model.get_parameter(weight)[rows, 3] = value
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(saved_model("llama", seed=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_student_with_a_broken_weight(value, distil, saved_model, tmp_path):
    with pytest.raises(NonFiniteError, match="what the student says is not a number"):
        distil("run", f"student.model={poisoned(saved_model, tmp_path, value)}")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_student_with_a_broken_embedding(value, distil, saved_model, tmp_path):
    """Of full stops and other signs, which are not among the tokens that a model is tried with."""
    model = poisoned(saved_model, tmp_path, value, "embed_tokens.weight", slice(10, 37))
    with pytest.raises(NonFiniteError, match="step 1 is not finite") as raised:
        distil("run", f"student.model={model}")
    assert "train.jsonl line" in raised.value.values["documents"]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_teacher_with_a_broken_weight(value, distil, saved_model, tmp_path):
    with pytest.raises(StillroomError):
        distil("run", f"teacher.model={poisoned(saved_model, tmp_path, value)}")


def test_a_learning_rate_that_is_too_high(distil, tmp_path):
    with pytest.raises(NonFiniteError) as raised:
        distil("run", "optimizer={learning_rate: 1e38, clip: null}", "checkpoints.every=1")
    step = int(raised.value.what.split()[1])
    assert f"step-{step - 1:08d}" in raised.value.why
    assert (tmp_path / "run" / "checkpoints" / f"step-{step - 1:08d}").is_dir()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] != "done"


@pytest.mark.parametrize("room", [0, 3000, 30_000])
def test_a_full_disk(room, distil, tmp_path, whole):
    """Whatever there is no more room for, a line of metrics, run.json or a checkpoint, nothing is lost."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    try:
        with pytest.raises(StorageError):
            distil("run", "checkpoints.every=1", report=at_step(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    distil("run", "checkpoints.every=1", resume=True)
    assert weights(tmp_path / "run") == weights(whole())
    assert losses(tmp_path / "run") == losses(whole())


def test_a_disk_that_is_full_when_the_model_is_written(distil, tmp_path, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(event: str, values: Any) -> None:
        if event == "note" and values["text"].startswith("writing"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(StorageError):
            distil("run", report=report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run" / "model").exists()
    distil("run", resume=True)
    assert weights(tmp_path / "run") == weights(whole())

"""`stillroom distill` as a user runs it: whole runs in processes of their own."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import CHATML, Command, SaveModel, build_model
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.recipe import from_yaml, to_yaml
from stillroom.runs import read_json, read_metrics

STEPS = ("steps=40", "checkpoints={every: 5, keep: 100}", "held_out.every=2")
"""What the run that is interrupted, killed and resumed, and the one that is not, have in common."""


@pytest.fixture(scope="module")
def whole(command: Command, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of an uninterrupted run, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, command("distill", str(recipe), *STEPS, f"out={folder}")


def weights(folder: Path) -> bytes:
    (path,) = (folder / "model").glob("*.safetensors")
    return path.read_bytes()


def measured(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time_s", "tokens_per_s")} for line in lines]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_progress_to_stderr(whole):
    folder, printed = whole
    model, trained, held_out = printed.stdout.splitlines()
    assert model.startswith(f"model     {folder}/model (")
    assert trained.startswith("trained   40 steps, ")
    assert held_out.startswith("held out  loss ")
    for step in (1, 40):
        (line,) = [line for line in printed.stderr.splitlines() if line.startswith(f"step {step}/40: ")]
        assert all(word in line for word in ("tokens/s", "loss ", "forward kl ", "cross entropy ", " left"))
    assert "held out after step 40: loss " in printed.stderr
    assert "Traceback" not in printed.stderr
    assert "Warning" not in printed.stderr


def test_run_json_tells_what_the_run_was(whole, environment):
    folder, _ = whole
    record = read_json(folder / "run.json")
    assert record["status"] == "done"
    assert record["config"]["steps"] == 40
    assert load(DistillConfig, None, [f"{key}={json.dumps(value)}" for key, value in record["config"].items()])
    assert {"python", "stillroom", "torch", "transformers"} <= record["versions"].keys()
    assert "git_commit" in record
    for thing in ("teacher", "student", "tokenizer", "data", "held_out_data"):
        assert len(record[thing]["fingerprint"]) > 16
    assert record["time_s"] > 0
    assert record["peak_memory_bytes"] > 2**27
    text = (folder / "run.json").read_text()
    assert "environ" not in record
    assert not any(value in text for key, value in environment.items() if "TOKEN" in key.upper() and len(value) > 8)


def test_metrics_hold_one_object_a_step(whole):
    folder, _ = whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "held_out" not in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["step"] for line in lines if "held_out" in line] == list(range(2, 41, 2))
    keys = {"step", "epoch", "loss_nats", "forward_kl_nats", "cross_entropy_nats", "grad_norm", "learning_rate"}
    keys |= {"num_tokens", "num_kept", "time_s", "tokens_per_s"}
    assert all(line.keys() == keys for line in steps)
    assert steps[-1]["loss_nats"] < 0.9 * steps[0]["loss_nats"]


def test_the_model_is_an_ordinary_folder_with_the_loss_that_is_told(whole, text_files):
    folder, _ = whole
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, num = 0.0, 0
    for line in (text_files / "valid.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
        for start in range(0, len(tokens) - 1, 32):
            piece = tokens[start : start + 33]
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=piece[None, :-1]).logits[0], -1)
            total -= log_p.gather(-1, piece[1:, None]).sum().item()
            num += len(piece) - 1
    assert read_json(folder / "run.json")["held_out"]["cross_entropy_nats"] == pytest.approx(total / num, rel=1e-5)


def test_the_model_can_write(whole):
    folder, _ = whole
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    prompt = tokenizer("A teacher", return_tensors="pt")
    written = model.generate(input_ids=prompt["input_ids"], max_new_tokens=8, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]


# --- once more into the same folder ----------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused(whole, here, recipe):
    folder, _ = whole
    before = listing(folder)
    refused = here("distill", str(recipe), *STEPS, f"out={folder}", code=2)
    assert refused.stdout == ""
    assert f"error: the output folder {folder} exists" in refused.stderr
    assert "--resume" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert listing(folder) == before


def test_a_run_that_is_done_says_so(whole, here, recipe):
    folder, printed = whole
    before = listing(folder / "model")
    again = here("distill", str(recipe), *STEPS, f"out={folder}", "--resume")
    assert "is done already" in again.stderr
    assert again.stdout == printed.stdout
    assert listing(folder / "model") == before


def test_overwrite_begins_anew(whole, here, recipe, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    here("distill", str(recipe), "steps=2", f"out={folder}", "--overwrite", "--quiet")
    assert [line["step"] for line in measured(folder)] == [1, 2, 2]
    assert steps_saved(folder) == [2]


def test_other_settings_are_named(whole, here, recipe, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    record = read_json(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({**record, "status": "started"}))
    words = ("distill", str(recipe), *STEPS, f"out={folder}", "--resume")
    refused = here(*words, "optimizer.learning_rate=0.5", "data.length=24", code=2)
    assert "optimizer.learning_rate: 0.01 there, 0.5 now" in refused.stderr
    assert "data.length: 32 there, 24 now" in refused.stderr
    assert "Traceback" not in refused.stderr


# --- stopped, and on again -------------------------------------------------------------------------------------------

Stop = Callable[[Path, int, int], int]


@pytest.fixture
def stopped(recipe: Path, environment: dict[str, str]) -> Stop:
    """Begins a run, sends it a signal when it has measured after a step, and gives its exit code."""

    def stop(folder: Path, sent: int, step: int) -> int:
        words = [sys.executable, "-m", "stillroom", "distill", str(recipe), *STEPS, f"out={folder}"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
            assert run.stderr is not None
            for line in run.stderr:
                if line.startswith(f"held out after step {step}:"):
                    run.send_signal(sent)
                    break
            rest = run.stderr.read()
        if sent == signal.SIGINT:
            assert "interrupted after step " in rest
            assert "Go on with the same command and --resume" in rest
        return run.returncode

    return stop


def test_ctrl_c_then_a_full_disk_and_it_still_ends_as_if_never_interrupted(whole, stopped, command, recipe, tmp_path):
    folder = tmp_path / "run"
    assert stopped(folder, signal.SIGINT, 6) == 130
    saved = steps_saved(folder)
    assert saved[0] == 5
    assert 6 <= saved[-1] < 40
    assert not (folder / "model").exists()
    assert [line["step"] for line in measured(folder) if "held_out" not in line] == list(range(1, saved[-1] + 1))
    checkpoints = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    words = ("distill", str(recipe), *STEPS, f"out={folder}", "--resume")
    full = command(*words, code=2, preexec_fn=fill_disk)
    assert "could not be written" in full.stderr
    assert f"step-{saved[-1]:08d}" in full.stderr
    assert "Traceback" not in full.stderr
    found = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert found == checkpoints

    resumed = command(*words)
    assert f"resumed after step {saved[-1]} of 40" in resumed.stderr
    assert weights(folder) == weights(whole[0])
    assert measured(folder) == measured(whole[0])


def test_a_killed_run_ends_as_if_never_interrupted(whole, stopped, here, recipe, tmp_path):
    folder = tmp_path / "run"
    assert stopped(folder, signal.SIGKILL, 8) == -signal.SIGKILL
    assert steps_saved(folder)[0] == 5
    assert not (folder / "model").exists()
    here("distill", str(recipe), *STEPS, f"out={folder}", "--resume", "--quiet")
    assert weights(folder) == weights(whole[0])
    assert measured(folder) == measured(whole[0])


# --- data of every kind ----------------------------------------------------------------------------------------------

PAIRS = [{"question": f"How many drops in {i}?", "answer": f"{12 + i} drops, no more."} for i in range(12)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": pair["question"]},
            {"role": "assistant", "content": pair["answer"]},
        ]
    }
    for pair in PAIRS
]
QUESTION = "format: prompt_completion, prompt: question, completion: answer, length: 48"
BRACES = 'format: prompt_completion, prompt: "Q: {question}\\nA: ", completion: "{answer}", length: 48'


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


KINDS: dict[str, tuple[str, Callable[[Path], Any], str, int]] = {
    "chats": ("chat.jsonl", lambda path: write_jsonl(path, CHATS), "format: chat, length: 64", 12),
    "pairs": ("pairs.json", lambda path: path.write_text(json.dumps(PAIRS)), QUESTION, 12),
    "braces": ("pairs.parquet", lambda path: pq.write_table(pa.Table.from_pylist(PAIRS), path), BRACES, 12),
    "text": ("one.txt", lambda path: path.write_text("The still runs slowly.\n" * 40), "format: text, length: 32", 1),
}


@pytest.fixture(scope="module")
def chat_models(saved_model: SaveModel, chat_tokenizer_folder: Path) -> list[str]:
    folders = [saved_model("llama", seed=seed, tokenizer=chat_tokenizer_folder) for seed in (1, 2)]
    return [f"student.model={folders[0]}", f"teacher.model={folders[1]}"]


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_every_kind(kind, command, here, recipe, chat_models, tmp_path):
    """Of chats in a process of its own, where everything would be heard that the libraries have to say."""
    name, write, settings, num_rows = KINDS[kind]
    write(tmp_path / name)
    others = ("held_out=null", "batch={tokens: 128}", "steps=2", f"out={tmp_path}/run")
    data = f"data={{path: {tmp_path / name}, {settings}}}"
    told = command if kind == "chats" else here
    done = told("distill", str(recipe), *chat_models, data, *others, "--quiet")
    assert done.stderr == ""
    assert done.stdout.splitlines()[1].startswith("trained   2 steps, ")
    record = read_json(tmp_path / "run" / "run.json")
    assert record["data"]["rows"] == num_rows
    lines = measured(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    if kind != "text":
        assert all(line["num_kept"] < line["num_tokens"] for line in lines)
    if kind == "chats":
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == CHATML


def test_an_adapter_says_nothing_that_it_was_not_asked(command, here, recipe, tmp_path, saved_model):
    here("distill", str(recipe), "student.lora.rank=2", "steps=2", f"out={tmp_path}/run")
    settings = ("student.lora={rank: 2, export: adapter}", "student.gradient_checkpointing=true", "steps=2")
    done = command("distill", str(recipe), *settings, f"out={tmp_path}/alone", "--quiet")
    assert done.stderr == ""
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "alone" / "model")
    base = AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=1))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert not torch.equal(adapted(tokens).logits, base(tokens).logits)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_settings_that_load_again_and_writes_nothing(recipe, tmp_path, environment):
    cache = tmp_path / "cache"
    environment = {**environment, "STILLROOM_CACHE": str(cache)}
    words = [sys.executable, "-m", "stillroom", "distill", str(recipe), "steps=3", f"out={tmp_path}/run", "--dry-run"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    printed = from_yaml(done.stdout)
    assert printed.keys() == {"config", "reads", "writes", "costs"}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(printed["config"]))
    config = load(DistillConfig, again)
    assert config.steps == 3
    assert config.model_dump(mode="json") == printed["config"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distill", "{recipe}", "optimizer.learning_rat=1"], "did you mean: learning_rate"),
        (["distill", "{recipe}", "steps=0", "out=x"], "`steps`"),
        (["distil"], "did you mean: distill"),
        (["distill", "{recipe}.yml"], "is not there"),
        (["distill", "{recipe}", "--resum"], "did you mean: --resume"),
    ],
)
def test_a_mistake_is_answered_without_a_traceback(words, said, command, recipe, tmp_path):
    done = command(*[word.format(recipe=recipe) for word in words], code=2, cwd=tmp_path)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_student_that_is_not_finite(here, recipe, tmp_path, saved_model):
    folder = Path(shutil.copytree(saved_model("llama", seed=1), tmp_path / "student"))
    model = build_model("llama", seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[10:37, 0] = float("inf")  # of signs that a model is not tried with at first
    model.save_pretrained(folder)
    done = here("distill", str(recipe), f"student.model={folder}", f"out={tmp_path}/run", code=2)
    assert "error: step 1 is not finite" in done.stderr
    assert "train.jsonl line " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_truncated(here, recipe, tmp_path, saved_model):
    folder = Path(shutil.copytree(saved_model("llama", seed=1), tmp_path / "student"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    done = here("distill", str(recipe), f"student.model={folder}", f"out={tmp_path}/run", code=2)
    assert done.stderr.startswith(f"error: {path} is truncated or damaged")
    assert not (tmp_path / "run").exists()


# --- real data -------------------------------------------------------------------------------------------------------


def test_a_teacher_of_tiny_stories(command, shared_data, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "tinystories-3m-to-1m.yaml"
    settings = ("steps=2", "data.max_documents=200", "held_out.max_documents=4", f"out={tmp_path}/run")
    paths = (
        f"teacher.model={shared_data}/models/stories3M",
        f"data.path={shared_data}/text/tinystories_train.jsonl",
        f"held_out.path={shared_data}/text/tinystories_valid.jsonl",
    )
    done = command("distill", str(recipe), *paths, *settings, "--quiet")
    assert done.stderr == ""
    held_out = read_json(tmp_path / "run" / "run.json")["held_out"]
    assert held_out["teacher_cross_entropy_nats"] < 2.5 < held_out["cross_entropy_nats"]

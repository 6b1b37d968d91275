"""`stillroom doctor` by the real command line: a run that can start, and runs that cannot."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import build_config


@pytest.fixture
def models(tokenizer_folder: Path, tmp_path: Path) -> list[str]:
    """A student and a teacher as `transformers` begins them, whose guesses are nearly uniform."""
    words = []
    for seed, who in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(build_config()).save_pretrained(tmp_path / who)
        PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / who)
        words.append(f"{who}.model={tmp_path / who}")
    return words


def test_a_run_that_can_start(command, here, recipe, models, tmp_path):
    out = tmp_path / "run"
    words = ["doctor", str(recipe), *models, f"out={out}", "sequences=8"]
    done = command(*words)
    for part in ("cross-entropy", "KL to teacher", "same top token", "accepted mass", "one step", "peak memory"):
        assert f"\n{part}" in done.stdout
    assert "one optimizer step on the longest rows" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("ready: ")
    record = json.loads(here(*words, "--json", "--quiet").stdout)
    assert record["ready"]
    assert record["data"]["rows"] == record["data"]["looked_at"] == 8
    assert 5 < record["measures"]["cross_entropy_nats"] < 6
    assert record["step"]["num_steps"] == 6
    assert not out.exists()
    here("distill", str(recipe), *models, f"out={out}")
    assert here(*words).stdout.splitlines()[-1].startswith("ready: "), "a run that is there may be looked at again"


def test_what_is_to_be_changed(here, recipe, models, text_files, tmp_path):
    first = json.loads((text_files / "train.jsonl").read_text().splitlines()[0])["text"]
    (tmp_path / "items.jsonl").write_text(json.dumps({"q": " ".join([first, *"abcdefghijklmnop"]), "a": "x"}) + "\n")
    (tmp_path / "quiz.yaml").write_text("kind: exact_match\nname: quiz\nitems: items.jsonl\ncontext: q\ntarget: a\n")
    text = " ".join([first, *"abcdefghijklmnop"])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (text, "other")))
    words = ["doctor", str(recipe), *models, f"out={tmp_path}/run", f"data.path={tmp_path}/train.jsonl",
             "data.length=64", "batch={tokens: 64}", f"tasks=[{tmp_path}/quiz.yaml]"]  # fmt: skip
    printed = here(*words, code=2).stdout
    assert "1 of 2 documents (50.0%) share 13 words in a row with an item" in printed
    assert "error: 1 of 2 documents hold text of the evaluation's items" in printed
    assert "train.jsonl line 1: quiz items.jsonl line 1" in printed
    assert printed.splitlines()[-1] == "not ready: 1 thing to change before this run"


def test_a_teacher_that_does_not_fit(here, recipe, models, saved_model, chat_tokenizer_folder, tmp_path):
    other = saved_model("llama", tokenizer=chat_tokenizer_folder)
    words = ["doctor", str(recipe), *models, f"teacher.model={other}", f"out={tmp_path}/run"]
    printed = here(*words, code=2)
    assert printed.stdout.startswith("error: the teacher and the student have different tokenizers\n")
    assert printed.stdout.splitlines()[-1].startswith("not ready: 1 thing to change")
    assert "Traceback" not in printed.stderr


def test_real_models(here, shared_data: Path, recipe, tmp_path):
    """A teacher of 3 M parameters and itself as its own student; the text of a story asked as a task."""
    model = shared_data / "models" / "stories3M"
    words = ["doctor", str(recipe), f"student.model={model}", f"teacher.model={model}", "held_out=null",
             f"data.path={shared_data}/text/tinystories_train.jsonl", "data.length=256", "batch={tokens: 512}",
             "sequences=20", f"out={tmp_path}/run", "--json"]  # fmt: skip
    record = json.loads(here(*words).stdout)
    assert record["measures"]["forward_kl_nats"] == 0
    assert record["measures"]["top1_agreement"] == 1
    assert record["measures"]["accepted_mass"] == pytest.approx(1, abs=1e-6)  # a sum, rounded as the machine has it
    assert 1.2 < record["measures"]["teacher_cross_entropy_nats"] < 1.6
    assert ["no better" in finding["what"] for finding in record["findings"]] == [True]
    assert record["step"]["num_tokens"] == 512

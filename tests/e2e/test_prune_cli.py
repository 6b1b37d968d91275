"""`stillroom prune` as a user runs it, and its model as the student of a distillation."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from conftest import Command


def test_cut_then_distil(command: Command, here: Command, saved_model, recipe: Path, text_files: Path, tmp_path: Path):
    teacher = saved_model("llama", seed=2)
    words = ["prune", f"model={teacher}", "layers={kind: best, count: 1}", "width={intermediate_size: 12}",
             f"data={{path: {text_files}/train.jsonl, format: text, length: 32}}",
             f"held_out.path={text_files}/valid.jsonl", f"out={tmp_path / 'cut'}"]  # fmt: skip
    plan = here(*words, "--dry-run").stdout
    assert "1 of 2: those that matter most by block influence" in plan
    assert not (tmp_path / "cut").exists()
    done = command(*words)
    assert "1 of 2:" in done.stdout
    assert "block influence" in done.stdout
    assert "nats before" in done.stdout
    assert "writing" in done.stderr
    assert here(*words, "--resume").stdout == done.stdout
    assert "--overwrite" in here(*words, code=2).stderr
    here("distill", str(recipe), f"student={{model: {tmp_path / 'cut' / 'model'}}}", f"teacher.model={teacher}",
         "steps=2", f"out={tmp_path / 'run'}")  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (1, 12)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("layers=few", "should be a number of layers, a list of them, or settings with a kind (every, best)"),
        ("layers=3", "2 layers, 0 to 1"),
        ("width=8", "width=8 is not a whole share of heads and MLP channels"),
        ("width={intermediate_size: 12}", "there is no text to measure on"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(here: Command, saved_model, tmp_path: Path, word: str, said: str):
    done = here("prune", f"model={saved_model('llama', seed=2)}", word, f"out={tmp_path / 'cut'}", code=2)
    assert said in done.stderr
    assert done.stderr.startswith("error: ")

"""Every recipe loads, and runs for two steps on tiny stand-ins for its models and data."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import SaveModel
from stillroom.cli.main import main
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.recipe import read_recipe
from stillroom.runs import read_json, read_metrics

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STILLROOM_DATA", str(tmp_path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, text_files: Path) -> dict[str, Path]:
    """For each format a folder of train.jsonl and valid.jsonl."""
    folder = tmp_path_factory.mktemp("chats")
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} drops."}] for i in range(24)]
    for name, part in (("train", turns[:20]), ("valid", turns[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in part))
    return {"text": text_files, "chat": folder}


def stand_ins(values: dict[str, Any], models: list[Path], data: dict[str, Path]) -> list[str]:
    """Overrides that put tiny things in the place of whatever the recipe names, and leave the rest as it is."""
    student, folder = values["student"], data[values["data"]["format"]]
    settings = [f"data.path={folder}/train.jsonl", "data.length=32", "batch={tokens: 64}", "steps=2", "epochs=null"]
    if "teacher" in values:
        settings.append(f"teacher.model={models[0]}")
    if "model" in student:
        settings.append(f"student.model={models[1]}")
    if "tokenizer" in student:
        settings.append(f"student.tokenizer={models[0]}")
    if "like" in student.get("init", {}):
        settings.append(f"student.init.like={models[1]}")
    if "held_out" in values:
        settings.append(f"held_out.path={folder}/valid.jsonl")
    return [*settings, "tracking=[]"]


def test_there_are_recipes():
    assert {"qwen2-7b-to-1.5b-logits", "tinystories-3m-to-1m"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_writes_into_a_folder_of_its_name(path):
    assert Path(load(DistillConfig, path).out).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(
    path: Path,
    saved_model: SaveModel,
    chat_tokenizer_folder: Path,
    data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    models = [saved_model("llama", seed=s, tokenizer=chat_tokenizer_folder) for s in (2, 1)]
    settings = stand_ins(read_recipe(path), models, data)
    assert main(["distill", str(path), *settings, f"out={tmp_path}/run", "--quiet"]) == 0, capsys.readouterr().err
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out" not in line]
    assert [line["step"] for line in lines] == [1, 2]
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "done"
    wanted = load(DistillConfig, path)
    assert [o["kind"] for o in record["config"]["objectives"]] == [o.kind for o in wanted.objectives]
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab()

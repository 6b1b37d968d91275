"""Every recipe loads, and runs for two steps, captures or evaluates, on tiny stand-ins for models, data and stores."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import SaveModel
from stillroom.capture.config import CaptureConfig
from stillroom.cli.main import main
from stillroom.config import Config, load
from stillroom.distill.config import DistillConfig
from stillroom.evaluate.config import EvaluateConfig
from stillroom.recipe import read_recipe
from stillroom.runs import read_json, read_metrics
from stillroom.store.reader import Store

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
DISTILLS, EVALUATIONS, CAPTURES = (
    [path for path in RECIPES if read_recipe(path)["verb"] == verb] for verb in ("distill", "evaluate", "capture")
)


def load_recipe(path: Path) -> Config:
    verbs = ((DISTILLS, DistillConfig), (EVALUATIONS, EvaluateConfig), (CAPTURES, CaptureConfig))
    return load(next(config for paths, config in verbs if path in paths), path)


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


@pytest.fixture(scope="module")
def models(saved_model: SaveModel, chat_tokenizer_folder: Path) -> list[Path]:
    """A teacher and a student."""
    return [saved_model("llama", seed=seed, tokenizer=chat_tokenizer_folder) for seed in (2, 1)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, models: list[Path], data: dict[str, Path]) -> dict[str, Path]:
    """What the teacher says of a text, and of a text that is held out, by the names of the recipes' settings."""
    folder = tmp_path_factory.mktemp("stores")
    for name, text, signal in (("teacher", "train", "head_and_sample"), ("held_out", "valid", "top_k")):
        words = [f"teacher.model={models[0]}", f"data.path={data['text']}/{text}.jsonl", "data.format=text"]
        words += [f"data.cache={folder}/cache", "data.length=32", f"signal={{kind: {signal}, label: true}}"]
        assert main(["capture", *words, f"out={folder}/{name}", "--quiet"]) == 0
    return {name: folder / name / "store" for name in ("teacher", "held_out")}


def stand_ins(values: dict[str, Any], models: list[Path], data: dict[str, Path], stores: dict[str, Path]) -> list[str]:
    """Overrides that put tiny things in the place of whatever the recipe names, and leave the rest as it is."""
    student, offline = values["student"], values["data"]["format"] == "store"
    settings = ["data.length=32", "batch={tokens: 64}", "steps=2", "epochs=null"]
    if offline:
        settings.append(f"teacher.path={stores['teacher']}")
    else:
        folder = data[values["data"]["format"]]
        settings.append(f"data.path={folder}/train.jsonl")
        if "teacher" in values:
            settings.append(f"teacher.model={models[0]}")
    if "model" in student:
        settings.append(f"student.model={models[1]}")
    if "tokenizer" in student:
        settings.append(f"student.tokenizer={models[0]}")
    if "like" in student.get("init", {}):
        settings.append(f"student.init.like={models[1]}")
    if student.get("init", {}).get("kind") == "from_teacher":
        settings.append("student.init={kind: from_teacher, layers: 1, width: {intermediate_size: 16}}")
    if "held_out" in values:
        settings.append(f"held_out.path={stores['held_out'] if offline else folder / 'valid.jsonl'}")
    return [*settings, "tracking=[]"]


def test_there_are_recipes():
    assert {"qwen2-7b-to-1.5b-logits", "tinystories-3m-to-1m-offline"} <= {path.stem for path in DISTILLS}
    assert {"qwen2-7b-capture", "tinystories-3m-capture"} <= {path.stem for path in CAPTURES}


def test_what_learns_from_a_store_names_the_one_that_a_recipe_captures():
    captured = {f"{load_recipe(path).out}/store" for path in CAPTURES}
    learnt = {config.teacher.path for config in map(load_recipe, DISTILLS) if config.data.format == "store"}
    assert learnt == captured


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_writes_into_a_folder_of_its_name(path):
    assert Path(load_recipe(path).out).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_every_recipe_begins_with_its_verb():
    assert sorted([*DISTILLS, *EVALUATIONS, *CAPTURES]) == RECIPES
    assert all(next(iter(read_recipe(path))) == "verb" for path in RECIPES)


@pytest.mark.parametrize("path", DISTILLS, ids=lambda path: path.stem)
def test_every_recipe_runs(
    path: Path,
    models: list[Path],
    data: dict[str, Path],
    stores: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    settings = stand_ins(read_recipe(path), models, data, stores)
    assert main(["distill", str(path), *settings, f"out={tmp_path}/run", "--quiet"]) == 0, capsys.readouterr().err
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out" not in line]
    assert [line["step"] for line in lines] == [1, 2]
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "done"
    wanted = load(DistillConfig, path)
    assert [o["kind"] for o in record["config"]["objectives"]] == [o.kind for o in wanted.objectives]
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab()


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_every_recipe_captures(path: Path, models: list[Path], data: dict[str, Path], tmp_path: Path):
    values = read_recipe(path)
    settings = [f"teacher.model={models[0]}", f"data.path={data[values['data']['format']]}/train.jsonl"]
    assert main(["capture", str(path), *settings, "data.length=32", f"out={tmp_path}/run", "--quiet"]) == 0
    store = Store(tmp_path / "run" / "store")
    assert len(store) > 0
    assert store.signal_config == load(CaptureConfig, path).signal


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_every_evaluation_measures_its_models(path, models, data, tmp_path):
    values = read_recipe(path)
    (tmp_path / "pairs.jsonl").write_text('{"good": "It runs.", "bad": "runs It."}\n' * 8)
    (tmp_path / "pairs.yaml").write_text("kind: minimal_pairs\nname: pairs\nitems: pairs.jsonl\ngood: good\nbad: bad\n")
    stand_in = {name: models[name != "teacher"] for name in values["models"]}
    words = [f"models.{name}{'.model' if isinstance(values['models'][name], dict) else ''}={folder}"
             for name, folder in stand_in.items()]  # fmt: skip
    words += [f"data.path={data['text']}/valid.jsonl", "data.length=32", f"tasks=[{tmp_path}/pairs.yaml]"]
    assert main(["evaluate", str(path), *words, f"out={tmp_path}/run", "--quiet"]) == 0
    record = read_json(tmp_path / "run" / "run.json")
    assert record["metrics"].keys() == record["tasks"]["pairs"]["scores"].keys() == values["models"].keys()
    for task in values["tasks"]:
        assert (path.parents[1] / task).is_file()

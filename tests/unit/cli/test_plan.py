"""`stillroom plan`: recipes, storage, settings of both kinds, JSON, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from store.stores import build_manifest

from published import PUBLISHED
from stillroom.cli.main import main
from stillroom.recipe import read_recipe
from stillroom.runs import seal
from stillroom.store.config import TopK

ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipe(tmp_path):
    """A live distillation of Qwen2 7B into Qwen2 1.5B: configs, and headers of weights without these."""
    for name, (config, total) in {"teacher": PUBLISHED["Qwen2 7B"], "student": PUBLISHED["Qwen2 1.5B"]}.items():
        header = json.dumps({"w": {"dtype": "BF16", "shape": [total], "data_offsets": [0, 2 * total]}}).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
verb: distill
student: {{model: {tmp_path}/student}}
teacher: {{kind: model, model: {tmp_path}/teacher}}
data: {{path: nowhere.jsonl, format: text, length: 4096}}
objectives: [{{kind: forward_kl}}]
epochs: 3
batch: {{tokens: 32768, micro_tokens: 32768}}
optimizer: {{learning_rate: 1e-5}}
out: {tmp_path}/out
""")
    return path


def planned(capsys, *words):
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_storage_with_no_model(capsys):
    assert main(["plan", "storage", "prompts=50000", "vocab=100000", "length=512"]) == 0
    shown = capsys.readouterr().out
    assert "2.56e+12 (2.33 Ti)" in shown
    assert "4.66 TiB" in shown
    assert "benchmarks/store.json" in shown
    assert "top 128, plain columns" in shown


def test_a_recipe_as_json(capsys, recipe):
    found = planned(capsys, recipe, "data_tokens=6e7", "utilisation=0.4", "price=3")
    assert found["parameters"]["student"]["value"] == 1_543_714_304
    assert found["parameters"]["teacher"]["value"] == 7_615_616_512
    time = found["time on H100"]
    assert time["tokens"]["value"] == 1.8e8
    assert time["time"]["value"] == pytest.approx(time["arithmetic"]["value"] / (989.4e12 * 0.4))
    assert time["cost"]["value"] == pytest.approx(3 * time["device-hours"]["value"])
    assert any("utilisation" in sentence for sentence in found["assumed"])


def test_how_many_tokens_there_are_is_not_made_up(capsys, recipe):
    found = planned(capsys, recipe)
    assert found["time on H100"]["tokens"]["value"] is None
    assert "time" not in found["time on H100"]


def test_what_does_not_fit_is_told_with_the_nearest_that_does(capsys, recipe):
    advice = planned(capsys, recipe, "device=H100")["advice"]
    assert advice[0].startswith("does not fit")
    assert "would fit with batch.micro_tokens=" in advice[1]
    smaller = advice[1].split("with ")[1].split(":")[0]
    assert planned(capsys, recipe, "device=H100", smaller)["advice"][0].startswith("fits")
    alone = planned(capsys, recipe, "device=RTX4090")["advice"]
    assert "num_devices=" in alone[1]


def test_fsdp_divides_what_stays(capsys, recipe):
    one, eight = (planned(capsys, recipe, f"num_devices={n}")["memory of a device"] for n in (1, 8))
    assert eight["optimizer's states"]["value"] == one["optimizer's states"]["value"] / 8


def test_a_quantised_teacher_is_smaller_and_lies_whole(capsys, recipe):
    one, eight = (
        planned(capsys, recipe, "teacher.quantization=nf4", f"num_devices={n}")["memory of a device"][
            "teacher's weights"
        ]
        for n in (1, 8)
    )
    full = planned(capsys, recipe)["memory of a device"]["teacher's weights"]
    assert one == eight
    assert one["value"] < full["value"] / 2


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "device": (["device=H10"], "did you mean: H100"),
        "zero": (["num_devices=0"], "num_devices"),
        "absurd": (["utilisation=3"], "utilisation"),
        "parallel": (["num_devices=2", "parallel=none"], "one device does all of the work"),
        "recipe's": (["batch.micro_token=8"], "did you mean: micro_tokens"),
        "no model": (["teacher.model=/nowhere/at/all"], "the teacher is not there"),
        "flag": (["--resume"], "`plan` has no --resume"),
    }.values(),
)
def test_what_cannot_be_meant_is_refused(capsys, recipe, words, message):
    assert main(["plan", str(recipe), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=x"], "nothing says which verb this is a recipe of"),
        (["verb=chat", "model=x"], "`chat` is no verb that can be planned"),
        ([], "there is nothing to plan"),
    ],
)
def test_a_plan_does_not_guess_the_verb(capsys, words, message):
    assert main(["plan", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "stillroom plan verb=distill" in shown


def test_nothing_to_plan_and_json_elsewhere_are_refused(capsys):
    assert main(["plan"]) == 2
    assert main(["plan", "storage", "prompts=0", "vocab=1", "length=1"]) == 2
    assert main(["distill", "--json"]) == 2
    assert "`distill` has no --json" in capsys.readouterr().err


def test_a_capture(capsys, recipe, tmp_path):
    data = "data={path: x.jsonl, format: text, length: 4096}"
    words = ["verb=capture", f"teacher.model={recipe.parent}/teacher", data, f"out={tmp_path}/x",
             "hidden={layers: [3, 9]}", "data_tokens=1e6"]  # fmt: skip
    found = planned(capsys, *words)
    kept = found["this store, a position"]
    assert kept["hidden states, int8"]["value"] == 2 * (3584 + 4)
    assert kept["in all"]["value"] == pytest.approx(1e6 * sum(f["value"] for f in kept.values() if f["unit"] == "each"))


def test_a_store_that_is_not_there_yet_is_planned_with_and_said(capsys, recipe, tmp_path):
    stored = f"teacher={{kind: store, path: {tmp_path}/store}}"
    found = planned(capsys, recipe, stored, "data={format: store, length: 4096}", "data_tokens=1e6")
    assert "teacher's weights" not in found["memory of a device"]
    assert any("no store is at" in sentence for sentence in found["assumed"])
    (tmp_path / "store").mkdir()
    counts = {"positions": 900, "tokens": 1000, "length": 2048, "num_columns": 151646, "entries": 9000}
    manifest = build_manifest(TopK(kind="top_k", k=8), **counts).model_dump(mode="json")
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(seal(manifest)))
    there = planned(capsys, recipe, stored, "data={format: store}")
    assert there["time on H100"]["tokens"]["value"] == 3 * 1000
    (tmp_path / "store" / "manifest.json").write_text("{}")
    assert main(["plan", str(recipe), stored, "data={format: store}"]) == 2
    assert "is damaged" in capsys.readouterr().err


def of_verb(verb, folder):
    """The words of a plan of each verb, of the models of ``recipe``."""
    data = "data={path: x.jsonl, format: text, length: 4096}"
    return {
        "distill": [f"{folder}/recipe.yaml", "data_tokens=1e6"],
        "capture": ["verb=capture", f"teacher.model={folder}/teacher", data, "out=x"],
        "evaluate": [
            "verb=evaluate",
            f"models={{teacher: {folder}/teacher, distilled: {folder}/student}}",
            data,
            "out=x",
        ],
        "prune": ["verb=prune", f"model={folder}/teacher", "layers={kind: best, count: 14}", data, "out=x"],
    }[verb]


def test_an_evaluation_and_a_cut_are_planned_too(capsys, recipe):
    found = planned(capsys, *of_verb("evaluate", recipe.parent), "data_tokens=1e6")
    assert found["plan"] == "evaluate"
    assert found["parameters"]["distilled"]["value"] == 1_543_714_304
    assert found["time on H100"]["tokens"]["value"] == 1e6
    found = planned(capsys, *of_verb("prune", recipe.parent))
    assert found["plan"] == "prune"
    assert found["parameters"]["smaller model"]["value"] < found["parameters"]["model"]["value"] == 7_615_616_512
    assert main(["plan", "verb=prune", f"model={recipe.parent}/teacher", "layers=29", "out=x"]) == 2
    assert "layers that are not there" in capsys.readouterr().err
    assert main(["plan", *of_verb("evaluate", recipe.parent), "num_devices=2"]) == 2
    assert "no use for num_devices" in capsys.readouterr().err


def write_models(folder, recipe, models):
    """Writes the configs and the headers of the weights of a recipe's models, by the names that it gives them."""
    for whose, name in models.items():
        config, num_parameters = PUBLISHED[name]
        model = folder / read_recipe(recipe)[whose]["model"]
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))
        header = json.dumps({"all": {"dtype": "BF16", "shape": [num_parameters], "data_offsets": [0, 0]}}).encode()
        (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def test_the_largest_models_are_planned_without_memory(tmp_path):
    path = ROOT / "recipes" / "llama-405b-to-70b.yaml"
    write_models(tmp_path, path, {"teacher": "Llama 3.1 405B", "student": "Llama 3.1 70B"})
    code = (
        "import resource; from stillroom.cli.main import main; "
        f"assert main(['plan', {str(path)!r}, 'num_devices=128']) == 0; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout.splitlines()[-1]) < 2 * 2**20


def test_frozen_parameters_have_no_gradients_and_no_moments(capsys, recipe):
    whole, frozen = (planned(capsys, recipe, *words) for words in ([], ['student.freeze=["*.layers.*"]']))
    assert whole["parameters"]["trained"]["value"] == 1_543_714_304
    assert frozen["parameters"]["trained"]["value"] == 151936 * 1536 + 1536
    states = frozen["memory of a device"]["optimizer's states"]["value"]
    assert states == 8 * frozen["parameters"]["trained"]["value"]
    assert frozen["time on H100"]["tokens a second"]["value"] > whole["time on H100"]["tokens a second"]["value"]


def test_a_family_without_attention_is_refused_by_name(capsys, recipe):
    student = "student={init: {kind: config, family: mamba, settings: {vocab_size: 96}}, tokenizer: x}"
    assert main(["plan", str(recipe), student]) == 2
    assert "memory and time of a mamba are not known" in capsys.readouterr().err


def test_weights_of_another_model_are_refused_and_a_model_to_be_like_needs_none(capsys, recipe):
    (recipe.parent / "student" / "model.safetensors").unlink()
    like = f"student={{init: {{kind: config, like: {recipe.parent}/student}}, tokenizer: {recipe.parent}/teacher}}"
    assert planned(capsys, recipe, like)["parameters"]["student"]["value"] == 1_543_714_304
    (recipe.parent / "student" / "model.safetensors").write_bytes(
        (recipe.parent / "teacher" / "model.safetensors").read_bytes()
    )
    assert main(["plan", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "the weights of the student are not those of its config" in said
    assert "1,543,714,304 parameters" in said
    assert "7,615,616,512 numbers" in said


def test_time_that_is_not_counted_is_named(capsys, recipe):
    part = "student={init: {kind: from_teacher, layers: {kind: best, count: 14}}}"
    said = planned(capsys, recipe, part, "held_out.path=other.jsonl")["assumed"]
    assert any("what is held out takes time besides" in sentence for sentence in said)
    assert any("what the student keeps takes time besides" in sentence for sentence in said)
    assert not any("besides" in sentence for sentence in planned(capsys, recipe)["assumed"])


@pytest.mark.parametrize(
    ("recipe", "models", "devices"),
    [
        ("llama-405b-to-70b", {"teacher": "Llama 3.1 405B", "student": "Llama 3.1 70B"}, 128),
        ("qwen2.5-72b-to-14b", {"teacher": "Qwen2.5 72B", "student": "Qwen2.5 14B"}, 8),
        ("qwen2.5-72b-to-14b", {"teacher": "Qwen2.5 72B", "student": "Qwen2.5 14B"}, 32),
    ],
)
def test_the_plans_of_the_guide_are_those_of_the_command(recipe, models, devices, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / f"{recipe}.yaml"
    write_models(tmp_path, path, models)
    assert main(["plan", str(path), f"num_devices={devices}"]) == 0
    guide = {line.split("  (of ")[0] for line in (ROOT / "docs/guide/scaling.md").read_text().splitlines()}
    told = capsys.readouterr().out.splitlines()
    for start in ("  in all ", "  time "):
        (line,) = [line for line in told if line.startswith(start)]
        assert line in guide

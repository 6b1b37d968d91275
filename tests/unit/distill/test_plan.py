"""The plan: every "auto" resolved, everything checked that headers tell, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, SaveModel
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import DistillPlan, make_plan
from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, StillroomError
from stillroom.recipe import from_yaml, to_yaml

MakePlan = Callable[..., DistillPlan]
SetTokenizer = Callable[..., Path]


@pytest.fixture
def plan(recipe: Path, tmp_path: Path) -> MakePlan:
    """Plans the tiny recipe with other settings."""

    def make(*settings: str) -> DistillPlan:
        return make_plan(load(DistillConfig, recipe, [f"out={tmp_path}/run", "device=cpu", *settings]))

    return make


@pytest.fixture
def with_tokenizer(saved_model: SaveModel, tmp_path: Path) -> SetTokenizer:
    """A copy of a model folder whose tokenizer differs in some of its settings, or in the ids of two tokens."""

    def copy(name: str, *, seed: int = 1, swap: tuple[str, str] | None = None, base: Path | None = None, **settings):
        folder = Path(shutil.copytree(saved_model("llama", seed=seed), tmp_path / name))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base or folder)
        for key, value in settings.items():
            setattr(tokenizer, key, value)
        tokenizer.save_pretrained(folder)
        if swap:
            path = folder / "tokenizer.json"
            content = json.loads(path.read_text())
            vocabulary = content["model"]["vocab"]
            a, b = swap
            vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
            path.write_text(json.dumps(content))
        return folder

    return copy


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


# --- what it says ----------------------------------------------------------------------------------------------------


def test_it_tells_what_a_run_costs(plan):
    found = from_yaml(str(plan()))["costs"]
    assert found["memory of a device"]["in all"].endswith("GiB)")
    assert found["advice"][0].startswith("fits")


def test_a_family_of_no_table_is_counted_too(plan, saved_model):
    made = plan("teacher=null", "held_out=null", "objectives=[{kind: cross_entropy}]",
                f"student={{model: {saved_model('granite')}}}")  # fmt: skip
    assert "granite: embeddings" in made.costs()["parameters"]["student"]


def test_it_writes_nothing(plan, tmp_path, recipe, text_files, own_cache):
    places = [tmp_path, recipe.parent, text_files]
    before = [listing(place) for place in places]
    plan()
    plan("student={init: {kind: config}}", "held_out=null")
    assert [listing(place) for place in places] == before
    assert not own_cache.exists()
    assert not (tmp_path / "run").exists()


def test_every_auto_is_resolved(plan):
    config = plan("batch.micro_tokens=auto").config
    assert (config.device, config.precision, config.teacher.dtype) == ("cpu", "float32", "float32")
    assert (config.teacher.columns, config.batch.micro_tokens, config.logits_bytes) == (304, 64, 256 * 2**20)


def test_what_is_said_is_kept(plan):
    settings = ["precision=bfloat16", "teacher.dtype=bfloat16", "teacher.columns=301", "logits_bytes=4096"]
    config = plan(*settings).config
    assert (config.precision, config.teacher.dtype) == ("bfloat16", "bfloat16")
    assert (config.teacher.columns, config.logits_bytes, config.batch.micro_tokens) == (301, 4096, 32)


def test_an_automatic_micro_batch_is_16384_tokens_or_a_row(plan):
    assert plan("batch={tokens: 100000}").config.batch.micro_tokens == 16384
    assert plan("batch={tokens: 500}").config.batch.micro_tokens == 500


def test_it_prints_settings_that_load_again_and_plan_the_same(plan, tmp_path):
    made = plan("student.freeze=['*norm*']", "held_out.max_documents=3")
    printed = from_yaml(str(made))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(printed["config"]))
    assert load(DistillConfig, again) == made.config
    assert str(make_plan(load(DistillConfig, again))) == str(made)


def test_it_tells_what_will_be_read_and_written(plan, tmp_path, text_files, own_cache, saved_model):
    made = plan("checkpoints.every=3")
    assert made.reads()["data"] == f"{text_files}/train.jsonl"
    assert made.reads()["held_out"] == f"{text_files}/valid.jsonl"
    assert made.reads()["teacher"].startswith(f"{saved_model('llama', seed=2)} (")
    assert made.reads()["student"].startswith(f"{saved_model('llama', seed=1)} (")
    assert made.writes()["tokenized data"].startswith(f"{own_cache}/data/")
    assert made.writes()["tokenized data"].endswith("(new)")
    assert f"{tmp_path}/run/run.json" in made.writes()["run"]
    assert "--resume or --overwrite" not in str(made)
    (tmp_path / "run").mkdir()
    assert "--resume or --overwrite" in from_yaml(str(plan()))["writes"]["note"]


def test_held_out_data_are_read_as_the_data_are(plan, text_files):
    held_out = plan("data.length=24", "data.pack=false", "held_out.max_documents=3").config.held_out_data
    assert held_out.model_dump() == {
        **plan("data.length=24", "data.pack=false").config.data.model_dump(),
        "path": f"{text_files}/valid.jsonl",
        "max_documents": 3,
        "shuffle": False,
    }
    assert plan("held_out=null").config.held_out_data is None


# --- students --------------------------------------------------------------------------------------------------------


def test_a_new_student_is_like_the_teacher_and_has_its_tokenizer(plan, saved_model):
    made = plan(f"teacher.model={saved_model('qwen3', seed=2)}", "student={init: {kind: config}}")
    assert made.student.config.model_type == "qwen3"
    assert made.student.config.vocab_size == 304
    assert made.config.teacher.columns == 304


def test_a_new_student_like_another_model(plan, saved_model):
    init = f"{{kind: config, like: {saved_model('gemma2')}, settings: {{num_hidden_layers: 1}}}}"
    made = plan(f"student={{init: {init}}}")
    assert (made.student.config.model_type, made.student.config.num_hidden_layers) == ("gemma2", 1)


def test_a_new_student_of_a_family_is_as_wide_as_the_tokenizer(plan):
    made = plan("student={init: {kind: config, family: llama, settings: {max_position_embeddings: 32}}}")
    assert (made.student.config.vocab_size, made.config.teacher.columns) == (300, 300)


def test_settings_that_no_model_can_have(plan):
    with pytest.raises(StillroomError):
        plan("student={init: {kind: config, settings: {hidden_size: 15}}}")


def test_without_a_teacher_the_tokenizer_is_named(plan, tokenizer_folder):
    init = "init: {kind: config, family: llama, settings: {max_position_embeddings: 32}}"
    made = plan(
        "teacher=null", "objectives=[{kind: cross_entropy}]", f"student={{{init}, tokenizer: {tokenizer_folder}}}"
    )
    assert made.teacher_config is None
    assert made.reads()["tokenizer"] == str(tokenizer_folder)
    assert "teacher" not in made.reads()


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_tokenizers_of_one_size_that_differ_are_refused(plan, with_tokenizer, tiny_tokenizer):
    other = with_tokenizer("other", swap=("a", "b"))
    changed = PreTrainedTokenizerFast.from_pretrained(other)
    assert len(changed) == len(tiny_tokenizer)
    with pytest.raises(MismatchError, match="have different tokenizers") as raised:
        plan(f"student.model={other}")
    values = raised.value.values
    prints = [str(values[who]).split(",")[0] for who in ("teacher", "student")]
    assert all(p.startswith("fingerprint ") for p in prints)
    assert prints[0] != prints[1]
    at = [tiny_tokenizer.get_vocab()[token] for token in "ab"]
    assert values[f"id {at[0]}"] == "'a' in the teacher, 'b' in the student"
    assert values[f"id {at[1]}"] == "'b' in the teacher, 'a' in the student"


def test_another_end_of_sequence_is_refused_and_can_be_chosen(plan, with_tokenizer, saved_model):
    other = with_tokenizer("other", eos_token="<s>")
    with pytest.raises(MismatchError, match="special tokens differ") as raised:
        plan(f"student.model={other}")
    assert "student.tokenizer" in raised.value.fix
    made = plan(f"student.model={other}", f"student.tokenizer={saved_model('llama', seed=2)}")
    assert made.tokenizer.eos_token == "</s>"


def test_a_chosen_tokenizer_must_have_the_students_own_tokens(plan, with_tokenizer, saved_model):
    other = with_tokenizer("other", swap=("a", "b"))
    with pytest.raises(MismatchError, match="different tokenizers"):
        plan(f"student.model={other}", f"student.tokenizer={saved_model('llama', seed=2)}")


def test_heads_that_are_padded_differently_share_the_tokenizers_columns(plan, saved_model):
    wide = f"teacher.model={saved_model('llama', seed=2, vocab_size=320)}"
    assert plan(wide).config.teacher.columns == 300
    assert plan(wide, "teacher.columns=304").config.teacher.columns == 304
    for columns in (299, 305):
        with pytest.raises(ConfigError, match=f"teacher.columns={columns} cannot be compared") as raised:
            plan(wide, f"teacher.columns={columns}")
        assert raised.value.values["student"] == "304 columns"
        assert raised.value.values["teacher"] == "320 columns"


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_tokenizer_that_is_wider_than_a_head(who, plan, saved_model):
    narrow = saved_model("llama", seed=3, vocab_size=299)
    with pytest.raises(MismatchError, match=f"tokens that the {who} has no column for") as raised:
        plan(f"{who}.model={narrow}")
    tokenizer, head = raised.value.values.values()
    assert str(tokenizer).startswith("300 tokens: the student's own, by default (")
    assert head == "299 columns"


def test_a_new_student_that_is_too_narrow(plan):
    with pytest.raises(MismatchError, match="the student has no column for"):
        plan("student={init: {kind: config, settings: {vocab_size: 299}}}")


# --- lengths and devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_are_longer_than_a_model_can_read(who, family, plan, saved_model):
    key = "n_positions" if family == "gpt2" else "max_position_embeddings"
    short = saved_model(family, seed=3, **{key: 31})
    with pytest.raises(ConfigError, match=f"data.length is longer than the {who} can read") as raised:
        plan(f"{who}.model={short}")
    assert list(raised.value.values.values()) == [32, 31]
    assert plan(f"{who}.model={short}", "data.length=31").config.data.length == 31


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "cpu:x"])
def test_a_device_that_is_not_there(device, plan):
    with pytest.raises(MissingError, match=f"the device `{device}` is not there"):
        plan(f"device={device}")


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["data.path", "held_out.path"])
def test_data_that_are_not_there(key, plan, tmp_path):
    with pytest.raises(MissingError, match="nowhere"):
        plan(f"{key}={tmp_path}/nowhere.jsonl")


@pytest.mark.parametrize("key", ["teacher.model", "student.model", "student.tokenizer"])
def test_models_that_are_not_there(key, plan, tmp_path):
    with pytest.raises(MissingError, match="nowhere"):
        plan(f"{key}={tmp_path}/nowhere")


def test_damaged_weights_are_noticed_before_anything_is_loaded(plan, saved_model, tmp_path):
    folder = Path(shutil.copytree(saved_model("llama", seed=1), tmp_path / "damaged"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated"):
        plan(f"student.model={folder}")


# --- chat templates --------------------------------------------------------------------------------------------------

OTHER = CHATML.replace("<|im_end|>", "</s>")


@pytest.fixture
def chat(tmp_path: Path) -> str:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    return f"data={{path: {path}, format: chat, length: 32}}"


def two(with_tokenizer: SetTokenizer, teacher: str | None, student: str | None, base: Path) -> list[str]:
    folders = [
        with_tokenizer(name, seed=seed, base=base, chat_template=template)
        for name, seed, template in (("teacher", 2, teacher), ("student", 1, student))
    ]
    return [f"teacher.model={folders[0]}", f"student.model={folders[1]}", "held_out=null"]


def test_one_template_for_both(plan, chat, with_tokenizer, chat_tokenizer_folder):
    made = plan(chat, *two(with_tokenizer, CHATML, CHATML, chat_tokenizer_folder))
    assert made.template == CHATML


def test_templates_that_differ_are_refused_and_can_be_chosen(plan, chat, with_tokenizer, chat_tokenizer_folder):
    models = two(with_tokenizer, OTHER, CHATML, chat_tokenizer_folder)
    with pytest.raises(MismatchError, match="different chat templates") as raised:
        plan(chat, *models)
    teacher, student = (raised.value.values[who] for who in ("teacher", "student"))
    assert teacher != student
    assert "data.template=teacher" in raised.value.fix
    for choice, template in (("teacher", OTHER), ("student", CHATML)):
        made = plan(chat, *models, f"data.template={choice}")
        assert made.template == template
        assert made.tokenizer.chat_template == template


@pytest.mark.parametrize(("teacher", "student"), [(CHATML, None), (None, CHATML)])
def test_one_template_is_enough(teacher, student, plan, chat, with_tokenizer, chat_tokenizer_folder):
    models = two(with_tokenizer, teacher, student, chat_tokenizer_folder)
    assert plan(chat, *models).template == CHATML
    with pytest.raises(MissingError, match="no chat template"):
        plan(chat, *models, f"data.template={'student' if teacher else 'teacher'}")


def test_no_template_at_all(plan, chat, with_tokenizer, chat_tokenizer_folder):
    models = two(with_tokenizer, None, None, chat_tokenizer_folder)
    with pytest.raises(MissingError, match="the tokenizer has no chat template") as raised:
        plan(chat, *models)
    assert "prompt_completion" in raised.value.fix


def test_text_goes_through_no_template(plan, with_tokenizer, chat_tokenizer_folder):
    made = plan(*two(with_tokenizer, OTHER, CHATML, chat_tokenizer_folder))
    assert made.template is None
    assert made.tokenizer.chat_template == CHATML


# --- what is read and what is written --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("teacher.model={out}/model",),
        ("student.model={out}/model",),
        ("student.tokenizer={out}/model",),
        ("data.path={out}/text.jsonl",),
        ("held_out.path={out}",),
        ("data.cache={out}/cache",),
    ],
)
def test_nothing_that_is_read_lies_where_the_run_writes(plan, tmp_path, settings):
    """--overwrite would delete it."""
    with pytest.raises(ConfigError, match="lies inside the output folder"):
        plan(*(word.format(out=tmp_path / "run") for word in settings))


def test_held_out_data_of_another_place_do_not_inherit_what_belongs_to_a_place(plan, recipe, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "another"}\n')
    made = plan("data.subset=a", "data.revision=b", f"held_out.path={tmp_path}/other.jsonl", "held_out.revision=c")
    found = made.config.held_out_data
    assert (found.subset, found.revision, found.shuffle) == (None, "c", False)
    words = ["data.subset=a", f"held_out={{path: {made.config.data.path}, split: test}}", f"out={tmp_path}/run"]
    same = load(DistillConfig, recipe, words).held_out_data
    assert (same.subset, same.split) == ("a", "test")

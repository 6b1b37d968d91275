"""The plan of a capture: every "auto" resolved, everything checked that headers tell, and nothing written."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML
from stillroom.capture.config import CaptureConfig, Transformers
from stillroom.capture.plan import LOGITS_BYTES, CapturePlan, make_plan
from stillroom.config import load
from stillroom.errors import ConfigError, MismatchError, MissingError
from stillroom.recipe import from_yaml, to_yaml

MakePlan = Callable[..., CapturePlan]


@pytest.fixture
def plan(saved_model, text_files: Path, tmp_path: Path) -> MakePlan:
    """Plans a tiny capture with other settings."""

    def make(*settings: str) -> CapturePlan:
        words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
                 "data.format=text", "data.length=32", f"out={tmp_path}/run", *settings]  # fmt: skip
        return make_plan(load(CaptureConfig, None, words))

    return make


def engine(plan: CapturePlan) -> Transformers:
    found = plan.config.teacher.engine
    assert isinstance(found, Transformers)
    return found


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


# --- what it says ----------------------------------------------------------------------------------------------------


def test_it_tells_what_a_capture_costs(plan):
    found = from_yaml(str(plan("teacher.engine={kind: transformers, device: cpu}")))["costs"]
    assert found["time on CPU"]["tokens"].startswith("not known")
    assert "store, default (head and draws)" in found["this store, a position"]


def test_it_writes_nothing(plan, tmp_path, text_files, own_cache):
    before = [listing(place) for place in (tmp_path, text_files)]
    str(plan())
    assert [listing(place) for place in (tmp_path, text_files)] == before
    assert not own_cache.exists()
    assert not (tmp_path / "run").exists()


def test_every_auto_is_resolved(plan, own_cache):
    made = plan("teacher.engine={kind: transformers, device: cpu}")
    assert (engine(made).device, engine(made).dtype) == ("cpu", "float32")
    assert (engine(made).batch_tokens, engine(made).logits_bytes) == (16384, LOGITS_BYTES["cpu"])
    assert made.config.teacher.columns == 300
    assert made.config.data.cache == str(own_cache)
    assert "auto" not in {v for k, v in made.config.teacher.engine.model_dump().items() if k != "attention"}


def test_what_is_said_is_kept(plan):
    made = plan(
        "teacher.engine={kind: transformers, device: cpu, dtype: bfloat16, batch_tokens: 32, logits_bytes: 4096}",
        "teacher.columns=302",
    )
    assert engine(made).dtype == "bfloat16"
    assert (engine(made).batch_tokens, engine(made).logits_bytes) == (32, 4096)
    assert made.config.teacher.columns == 302


def test_an_automatic_batch_holds_a_row_at_least(plan, saved_model):
    long = saved_model("llama", seed=2, max_position_embeddings=40000)
    assert engine(plan(f"teacher.model={long}", "data.length=20000")).batch_tokens == 20000
    assert engine(plan(f"teacher.model={long}", "data.length=16384")).batch_tokens == 16384


def test_it_prints_settings_that_load_again_and_plan_the_same(plan, tmp_path):
    made = plan("signal={kind: top_p, temperatures: [2]}", "part={index: 1, of: 3}", "seed=4")
    printed = from_yaml(str(made))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(printed["config"]))
    assert load(CaptureConfig, again) == made.config
    assert str(make_plan(load(CaptureConfig, again))) == str(made)


def test_it_tells_what_will_be_read_and_written(plan, saved_model, tokenizer_folder, text_files, tmp_path, own_cache):
    made = plan()
    assert made.reads() == {"teacher": str(saved_model("llama", seed=2)), "data": f"{text_files}/train.jsonl"}
    assert plan(f"teacher.tokenizer={tokenizer_folder}").reads()["tokenizer"] == str(tokenizer_folder)
    assert made.writes()["store"] == f"{tmp_path}/run/store"
    assert made.writes()["run"] == f"{tmp_path}/run/run.json"
    assert made.writes()["tokenized data"].startswith(f"{own_cache}/data/")
    assert made.writes()["tokenized data"].endswith("(new)")
    assert "--resume or --overwrite" not in str(made)
    (tmp_path / "run").mkdir()
    assert "--resume or --overwrite" in from_yaml(str(plan()))["writes"]["note"]


def test_it_keeps_a_servers_secrets_to_itself(plan, tokenizer_folder):
    made = plan("teacher.model=toy", f"teacher.tokenizer={tokenizer_folder}", "signal={kind: top_k, k: 5}",
                "teacher.engine={kind: vllm, url: 'http://me:hunter2@127.0.0.1:1/v1?api_key=s3cret'}")  # fmt: skip
    assert made.teacher_config is None
    assert "127.0.0.1:1/v1" in made.reads()["teacher"]
    for secret in ("hunter2", "s3cret"):
        assert secret not in str(made)
        assert secret in made.config.teacher.engine.model_dump()["url"]  # by which the server is reached


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [300, 304])
def test_columns_from_those_of_the_tokenizer_to_those_of_the_head(plan, columns):
    assert plan(f"teacher.columns={columns}").config.teacher.columns == columns


@pytest.mark.parametrize("columns", [1, 299, 305])
def test_other_columns_are_refused(plan, columns):
    with pytest.raises(ConfigError, match=f"teacher.columns={columns} cannot be kept") as raised:
        plan(f"teacher.columns={columns}")
    assert raised.value.values == {"possible": "300 (all tokens of the tokenizer) to 304", "asked for": columns}


def test_a_servers_head_may_be_as_wide_as_it_is(plan, tokenizer_folder):
    server = ("teacher.model=toy", f"teacher.tokenizer={tokenizer_folder}", "signal={kind: top_k, k: 5}",
              "teacher.engine={kind: vllm, url: 'http://127.0.0.1:1/v1'}")  # fmt: skip
    assert plan(*server).config.teacher.columns == 300
    assert plan(*server, "teacher.columns=5000").config.teacher.columns == 5000
    with pytest.raises(ConfigError, match="cannot be kept"):
        plan(*server, "teacher.columns=299")


def test_a_tokenizer_that_is_wider_than_the_head(plan, saved_model):
    narrow = saved_model("llama", seed=3, vocab_size=299)
    with pytest.raises(MismatchError, match="tokens that the teacher has no column for") as raised:
        plan(f"teacher.model={narrow}")
    own = f"300 tokens: the teacher's own, by default ({narrow})"
    assert list(raised.value.values.values()) == [own, "299 columns"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_are_longer_than_the_teacher_can_read(plan, saved_model, family):
    key = "n_positions" if family == "gpt2" else "max_position_embeddings"
    short = saved_model(family, seed=3, **{key: 31})
    with pytest.raises(ConfigError, match=r"data\.length is longer than the teacher can read") as raised:
        plan(f"teacher.model={short}")
    assert list(raised.value.values.values()) == [32, 31]
    assert plan(f"teacher.model={short}", "data.length=31").config.data.length == 31


def test_a_length_that_nobody_gave_is_told_as_the_default(saved_model, text_files, tmp_path):
    words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
             "data.format=text", f"out={tmp_path}/run"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.length is longer than the teacher can read") as raised:
        make_plan(load(CaptureConfig, None, words))
    assert raised.value.values["data.length"] == "1024, by default"
    words.append("teacher.engine={kind: transformers, batch_tokens: 31}")
    with pytest.raises(ConfigError, match="batch_tokens is less than a row") as raised:
        make_plan(load(CaptureConfig, None, words))
    assert raised.value.values["data.length"] == "1024, by default"


def test_a_cache_that_nobody_named_is_told_as_the_default(plan, own_cache):
    with pytest.raises(ConfigError, match=r"data\.cache, by default, lies inside the output folder"):
        plan(f"out={own_cache.parent}")


def test_a_batch_that_does_not_hold_a_row(plan):
    with pytest.raises(ConfigError, match="batch_tokens is less than a row") as raised:
        plan("teacher.engine={kind: transformers, batch_tokens: 31}")
    assert raised.value.values == {"teacher.engine.batch_tokens": 31, "data.length": 32}


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "cpu:x"])
def test_a_device_that_is_not_there(plan, device):
    with pytest.raises(MissingError, match=f"the device `{device}` is not there"):
        plan(f"teacher.engine={{kind: transformers, device: '{device}'}}")


@pytest.mark.parametrize("key", ["teacher.model", "teacher.tokenizer", "data.path"])
def test_what_is_not_there(plan, tmp_path, key):
    with pytest.raises(MissingError, match="nowhere"):
        plan(f"{key}={tmp_path}/nowhere")


# --- chat templates --------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tmp_path: Path) -> str:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    return f"data={{path: {path}, format: chat, length: 32}}"


@pytest.fixture
def chat_teacher(saved_model, chat_tokenizer_folder) -> str:
    return f"teacher.model={saved_model('llama', seed=2, tokenizer=chat_tokenizer_folder)}"


def test_conversations_go_through_the_tokenizers_template(plan, chat, chat_teacher):
    assert plan(chat, chat_teacher).template == CHATML


def test_text_goes_through_no_template(plan, chat_teacher):
    assert plan(chat_teacher).template is None


@pytest.mark.parametrize("data_format", ["chat", "prompt_completion"])
def test_no_template_at_all(plan, chat, data_format):
    setting = chat if data_format == "chat" else chat.replace("format: chat", "format: prompt_completion, chat: true")
    with pytest.raises(MissingError, match="the tokenizer has no chat template") as raised:
        plan(setting)
    assert raised.value.values["data.format"] == data_format
    assert str(raised.value.values["tokenizer"]).startswith("the teacher's own, by default (")
    assert "prompt_completion" in raised.value.fix


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_whose_template_is_no_question_where_there_is_no_student(plan, chat, chat_teacher, whose):
    words = (chat, chat_teacher, f"data.template={whose}")
    if whose == "teacher":
        assert plan(*words).template == CHATML
        return
    with pytest.raises(ConfigError, match="template"):
        plan(*words)


# --- what is read and what is written --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["teacher.model", "teacher.tokenizer", "data.path", "data.cache"])
def test_nothing_that_is_read_lies_where_the_capture_writes(plan, tmp_path, saved_model, text_files, key):
    """--overwrite would delete it."""
    inside = tmp_path / "run" / "inside"
    if key in ("teacher.model", "teacher.tokenizer"):
        shutil.copytree(saved_model("llama", seed=2), inside)
    elif key == "data.path":
        inside.parent.mkdir()
        inside = Path(shutil.copy(text_files / "train.jsonl", tmp_path / "run" / "text.jsonl"))
    with pytest.raises(ConfigError, match="lies inside the output folder") as raised:
        plan(f"{key}={inside}")
    assert raised.value.values == {key: str(inside), "out": str(tmp_path / "run")}


# --- a tokenizer that is named ---------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_not_the_teachers_own(plan, saved_model, chat_tokenizer_folder):
    """Its ids would go into the wrong rows of the embedding, though there are rows enough."""
    with pytest.raises(MismatchError, match="different tokenizers") as raised:
        plan(f"teacher.tokenizer={chat_tokenizer_folder}")
    assert f"({saved_model('llama', seed=2)})" in str(raised.value)
    assert f"({chat_tokenizer_folder})" in str(raised.value)
    assert "'<|im_start|>' in the teacher.tokenizer" in raised.value.values["id 2"]
    assert raised.value.fix.startswith("Leave out teacher.tokenizer")


def test_the_teachers_own_with_a_chat_template(plan, chat, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    assert plan(chat, f"teacher.tokenizer={tmp_path}/chat").template == CHATML


def test_any_that_fits_where_the_teacher_comes_without_one(plan, saved_model, chat_tokenizer_folder, tmp_path):
    bare = Path(shutil.copytree(saved_model("llama", seed=2), tmp_path / "bare"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    made = plan(f"teacher.model={bare}", f"teacher.tokenizer={chat_tokenizer_folder}")
    assert made.tokenizer.get_vocab() == PreTrainedTokenizerFast.from_pretrained(chat_tokenizer_folder).get_vocab()
    assert made.config.teacher.columns == max(made.tokenizer.get_vocab().values()) + 1

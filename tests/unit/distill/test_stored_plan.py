"""Offline: a store that does not fit the run is refused before anything loads, and the message says what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML
from stillroom.capture import signals
from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run as capture
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import DistillPlan, make_plan
from stillroom.distill.run import run
from stillroom.errors import ConfigError, DataError, MismatchError, MissingError
from stillroom.models import loading
from stillroom.runs import seal
from stillroom.store.concat import concat
from stillroom.store.format import MANIFEST

TOP_K = "{kind: top_k, k: 8, label: true, temperatures: [2.0]}"
MakeStore = Callable[..., Path]


@pytest.fixture(scope="module")
def stored(saved_model, text_files: Path, tmp_path_factory) -> MakeStore:
    """A tiny store: ``stored("valid", signal=…, data=…, "seed=1")``. Equal arguments give the same one."""
    made: dict[str, Path] = {}

    def make(text: str = "train", *settings: str, signal: str = TOP_K) -> Path:
        key = repr((text, settings, signal))
        if key not in made:
            folder = tmp_path_factory.mktemp("stored")
            words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/{text}.jsonl",
                     "data.format=text", "data.length=32", f"data.cache={folder}/cache", f"signal={signal}",
                     f"out={folder}/run", *settings]  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(signals, "WINDOW_DOCUMENTS", 4)  # so that each of a few parts has some
                capture(load(CaptureConfig, None, words))
            (made[key],) = (folder / "run").rglob("store")
        return made[key]

    return make


@pytest.fixture
def plan(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DistillPlan]:
    """Plans a run that learns from a store. No model may be loaded on the way."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    def make(store: Path, *settings: str) -> DistillPlan:
        words = [f"teacher={{kind: store, path: {store}}}", "data={format: store}", "held_out=null",
                 f"out={tmp_path}/run", *settings]  # fmt: skip
        with monkeypatch.context() as without_models:
            without_models.setattr(loading, "load_model", forbidden)
            try:
                return make_plan(load(DistillConfig, recipe, words))
            finally:
                assert not (tmp_path / "run").exists()

    return make


def change(store: Path, **values: Any) -> None:
    """Changes the manifest, checksum and all."""
    path = store / MANIFEST
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), **values})))


# --- what fits -------------------------------------------------------------------------------------------------------


def test_what_a_store_says_is_filled_in(plan, stored):
    made = plan(stored(), f"held_out.path={stored('valid')}")
    assert (made.config.data.length, made.config.batch.micro_tokens, made.vocab_size) == (32, 32, 300)
    assert made.template is None
    assert made.teacher_config is None
    assert made.reads()["store"].startswith(f"{stored()} (")
    assert made.reads()["held_out"].startswith(f"{stored('valid')} (")
    assert "teacher" not in made.reads()
    assert "tokenized data" not in made.writes()


def test_a_new_student_has_the_stores_tokenizer(plan, stored):
    init = "student={init: {kind: config, family: llama, settings: {max_position_embeddings: 32}}}"
    made = plan(stored(), init)
    assert made.student.kind == "new"
    assert made.student.config.vocab_size == 300
    assert len(made.tokenizer.get_vocab()) == 300


def test_a_longer_row_is_taken(plan, stored):
    assert plan(stored(), "data.length=64", "batch={tokens: 64}").config.data.length == 64


# --- the store itself ------------------------------------------------------------------------------------------------


def test_no_store_at_all(plan, stored, tmp_path):
    for place in (tmp_path / "nowhere", stored().parent):  # the run's folder is not the store
        with pytest.raises(MissingError, match="is not a store") as raised:
            plan(place)
        assert "OUT/store" in raised.value.fix


def test_a_store_that_is_not_complete(plan, stored, tmp_path):
    half = Path(shutil.copytree(stored(), tmp_path / "half"))
    change(half, complete=False)
    with pytest.raises(DataError, match="is not complete") as raised:
        plan(half)
    assert "--resume" in raised.value.fix
    with pytest.raises(DataError, match="is not complete"):
        plan(stored(), f"held_out.path={half}")


def test_a_store_of_a_later_format(plan, stored, tmp_path):
    later = Path(shutil.copytree(stored(), tmp_path / "later"))
    change(later, format=99)
    with pytest.raises(DataError, match="has a format that is not known"):
        plan(later)


def test_a_shard_that_was_cut(plan, stored, tmp_path):
    cut = Path(shutil.copytree(stored(), tmp_path / "cut"))
    data = (cut / "00000.arrow").read_bytes()
    (cut / "00000.arrow").write_bytes(data[:-1])
    with pytest.raises(DataError, match="is damaged"):
        plan(cut)


def test_a_store_of_nothing_is_refused_in_words(plan, stored):
    """A worker's part may be empty; nothing can be learned from it."""
    empty = stored("train", "data.max_documents=1", "part={index: 0, of: 9}")
    with pytest.raises(DataError, match=r"document"):
        plan(empty)


def test_a_store_inside_the_output(plan, stored):
    with pytest.raises(ConfigError, match=r"teacher\.path lies inside the output folder"):
        plan(stored(), f"out={stored().parent}")
    with pytest.raises(ConfigError, match=r"held_out\.path lies inside the output folder"):
        plan(stored(), f"held_out.path={stored('valid')}", f"out={stored('valid').parent}")


# --- tokens and columns ----------------------------------------------------------------------------------------------


@pytest.fixture
def student(saved_model, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model whose tokenizer has two tokens swapped, or other settings."""

    def copy(*, base: Path | None = None, swap: tuple[str, str] | None = None, **settings: Any) -> Path:
        folder = Path(shutil.copytree(saved_model("llama", seed=1), tmp_path / "student"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base or folder)
        for key, value in settings.items():
            setattr(tokenizer, key, value)
        tokenizer.save_pretrained(folder)
        if swap:
            exchange(folder, *swap)
        return folder

    return copy


def exchange(folder: Path, a: str, b: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_another_tokenizer_of_the_same_size(plan, stored, student):
    with pytest.raises(MismatchError, match="have different tokenizers") as raised:
        plan(stored(), f"student.model={student(swap=('a', 'b'))}")
    assert any(str(value) == "'a' in the teacher, 'b' in the student" for value in raised.value.values.values())


def test_the_stores_own_tokenizer_was_changed(plan, stored, tmp_path):
    changed = Path(shutil.copytree(stored(), tmp_path / "changed"))
    exchange(changed / "tokenizer", "a", "b")
    with pytest.raises(MismatchError, match="is not the one that it was captured with"):
        plan(changed)


def test_a_head_that_lacks_columns(plan, stored, saved_model):
    narrow = saved_model("llama", seed=1, vocab_size=300)
    assert plan(stored(), f"student.model={narrow}").vocab_size == 300
    with pytest.raises(MismatchError, match="have different vocabularies") as raised:
        plan(stored("train", "teacher.columns=302"), f"student.model={narrow}")
    assert raised.value.values == {
        "store": "302 columns", "student's head": "300 columns",
        "tokenizer": f"300 tokens: the student's own, by default ({narrow})",
    }  # fmt: skip


def test_a_wider_head_is_taken(plan, stored, saved_model):
    assert plan(stored(), f"student.model={saved_model('llama', seed=1, vocab_size=400)}").vocab_size == 300


# --- chat templates --------------------------------------------------------------------------------------------------

OTHER = CHATML.replace("<|im_end|>", "</s>")


@pytest.fixture(scope="module")
def of_chats(saved_model, chat_tokenizer_folder: Path, tmp_path_factory) -> Path:
    """A store of one conversation."""
    folder = tmp_path_factory.mktemp("chats")
    row = {"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "12 drops"}]}
    (folder / "chat.jsonl").write_text(json.dumps(row))
    words = [f"teacher.model={saved_model('llama', seed=2, tokenizer=chat_tokenizer_folder)}", "data.format=chat",
             f"data.path={folder}/chat.jsonl", "data.length=40", f"data.cache={folder}/cache", f"signal={TOP_K}",
             f"out={folder}/run"]  # fmt: skip
    capture(load(CaptureConfig, None, words))
    return folder / "run" / "store"


def test_a_student_of_the_same_template(plan, of_chats, student, chat_tokenizer_folder):
    made = plan(of_chats, f"student.model={student(base=chat_tokenizer_folder)}", "batch.tokens=40",
                "batch.micro_tokens=40")  # fmt: skip
    assert made.template == made.tokenizer.chat_template == CHATML


def test_a_student_of_another_template(plan, of_chats, student, chat_tokenizer_folder):
    other = student(base=chat_tokenizer_folder, chat_template=OTHER)
    with pytest.raises(MismatchError, match="different chat templates") as raised:
        plan(of_chats, f"student.model={other}", "batch.tokens=40", "batch.micro_tokens=40")
    assert raised.value.values["store"] != raised.value.values["student"]
    assert "student.tokenizer" in raised.value.fix
    made = plan(of_chats, f"student.model={other}", f"student.tokenizer={of_chats}/tokenizer", "batch.tokens=40",
                "batch.micro_tokens=40")  # fmt: skip
    assert made.template == CHATML


def test_a_student_without_a_template_is_given_the_stores(plan, of_chats, student, chat_tokenizer_folder):
    bare = student(base=chat_tokenizer_folder, chat_template=None)
    made = plan(of_chats, f"student.model={bare}", "batch.tokens=40", "batch.micro_tokens=40")
    assert made.tokenizer.chat_template == CHATML


def test_the_stores_own_template_was_changed(plan, of_chats, student, chat_tokenizer_folder, tmp_path):
    changed = Path(shutil.copytree(of_chats, tmp_path / "changed"))
    (changed / "tokenizer" / "chat_template.jinja").write_text(OTHER)
    with pytest.raises(MismatchError, match=r"the chat template in the store .* is not the one"):
        plan(changed, f"student.model={student(base=chat_tokenizer_folder)}", "batch.tokens=40",
             "batch.micro_tokens=40")  # fmt: skip


# --- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "objective", "words"),
    [
        ("{kind: sampled}", "{kind: reverse_kl}", "reverse_kl cannot be learned from sampled targets"),
        ("{kind: head_and_sample}", "{kind: reverse_kl}", "reverse_kl cannot be learned from sampled targets"),
        ("{kind: head_and_sample}", "{kind: forward_kl, temperature: 2}", "cannot be used at temperature 2.0"),
        (TOP_K, "{kind: forward_kl, temperature: 1.5}", "cannot be used at temperature 1.5"),
        (TOP_K, "{kind: reverse_kl, temperature: 4}", "cannot be used at temperature 4.0"),
    ],
)
def test_what_the_signals_do_not_tell(plan, stored, signal, objective, words):
    with pytest.raises(MismatchError, match=words):
        plan(stored("train", signal=signal), f"objectives=[{{kind: cross_entropy}}, {objective}]")
    with pytest.raises(MismatchError, match=words):  # and so of the held-out store
        plan(stored("train", signal="{kind: full}"), f"objectives=[{objective}]",
             f"held_out.path={stored('valid', signal=signal)}")  # fmt: skip


@pytest.mark.parametrize(
    ("signal", "objective"),
    [
        ("{kind: sampled}", "{kind: forward_kl}"),
        ("{kind: sampled}", "{kind: cross_entropy, temperature: 3}"),
        (TOP_K, "{kind: reverse_kl, temperature: 2}"),
        ("{kind: full}", "{kind: reverse_kl, temperature: 7}"),
    ],
)
def test_what_the_signals_tell(plan, stored, signal, objective):
    assert plan(stored("train", signal=signal), f"objectives=[{objective}]").store is not None


def test_what_stands_for_missing_entries_is_refused_where_none_are(plan, stored):
    missing = "objectives=[{kind: forward_kl, missing: label}]"
    with pytest.raises(ConfigError, match=r"forward_kl\.missing has no meaning for a full store"):
        plan(stored(signal="{kind: full}"), missing)
    assert plan(stored(), missing, f"held_out.path={stored('valid', signal='{kind: full}')}").held_out_store is not None


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_a_row_that_does_not_hold_a_document(plan, stored):
    with pytest.raises(ConfigError, match=r"data\.length is less than a document") as raised:
        plan(stored(), "data.length=31")
    assert list(raised.value.values.values()) == [31, 32]
    longer = stored("valid", "data.length=48")
    with pytest.raises(ConfigError, match=r"data\.length is less than a document"):
        plan(stored(), "data.length=32", f"held_out.path={longer}")


def test_a_held_out_document_that_the_rows_do_not_hold(plan, stored):
    """The length is that of the training store, and the held-out documents are longer."""
    with pytest.raises(ConfigError, match=r"data\.length is less than a document") as raised:
        plan(stored("train", "data.length=30"), f"held_out.path={stored('valid')}", "data.length=auto")
    assert raised.value.values["data.length"] == "30, the teacher's store's"
    assert raised.value.fix == "Set data.length to at least 32."


@pytest.mark.parametrize("settings", [("batch.tokens=31", "batch.micro_tokens=auto"), ("batch.micro_tokens=31",)])
def test_a_batch_that_does_not_hold_a_row(plan, stored, settings):
    with pytest.raises(ConfigError, match=r"batch\.\w+ is less than a row") as raised:
        plan(stored(), *settings)
    assert 31 in raised.value.values.values()


def test_a_student_that_cannot_read_so_much(plan, stored, saved_model):
    short = saved_model("llama", seed=3, max_position_embeddings=31)
    with pytest.raises(ConfigError, match=r"data\.length is longer than the student can read") as raised:
        plan(stored(), f"student.model={short}")
    assert raised.value.values["data.length"] == "32, the teacher's store's"


# --- held-out stores -------------------------------------------------------------------------------------------------


def test_held_out_data_of_the_training_store(plan, stored):
    for place in (f"{stored()}/../store", stored("train", "seed=1")):
        with pytest.raises(MismatchError, match="holds the data that are trained on"):
            plan(stored(), f"held_out.path={place}")


def test_held_out_data_that_were_merged_into_the_training_store(plan, stored, tmp_path):
    """Also where they were merged with others before that, and where a part of them alone is held out."""
    concat([stored(), stored("valid")], tmp_path / "merged")
    concat([stored("valid", "data.max_documents=2"), tmp_path / "merged"], tmp_path / "again")
    for place in (tmp_path / "merged", tmp_path / "again"):
        for held in (stored("valid"), stored("valid", "part={index: 1, of: 2}"), stored("valid", "seed=1")):
            with pytest.raises(MismatchError, match="holds the data that are trained on") as raised:
                plan(place, f"held_out.path={held}")
            assert "valid.jsonl" in str(raised.value.values["teacher.path"])
            assert "merge the store" in raised.value.fix
        with pytest.raises(MismatchError, match="holds the data that are trained on"):
            plan(stored(), f"held_out.path={place}")
    assert plan(tmp_path / "merged", f"held_out.path={stored('valid', 'data.max_documents=3')}").held_out_store


def test_parts_that_share_no_document_may_be_held_out(plan, stored):
    one, other = (stored("train", f"part={{index: {i}, of: 2}}") for i in range(2))
    assert plan(one, f"held_out.path={other}").held_out_store is not None


@pytest.mark.parametrize(("trained", "held"), [("{index: 0, of: 2}", "null"), ("null", "{index: 1, of: 2}"),
                                               ("{index: 0, of: 2}", "{index: 1, of: 3}")])  # fmt: skip
def test_parts_that_share_documents_may_not(plan, stored, trained, held):
    with pytest.raises(MismatchError, match="holds the data that are trained on"):
        plan(stored("train", f"part={trained}"), f"held_out.path={stored('train', f'part={held}')}")


def test_a_held_out_store_of_another_vocabulary(plan, stored):
    with pytest.raises(MismatchError, match="has another num columns"):
        plan(stored(), f"held_out.path={stored('valid', 'teacher.columns=302')}")


def test_a_held_out_store_of_another_tokenizer(plan, stored, saved_model, chat_tokenizer_folder):
    """The same weights, and as many tokens, so that the columns are equal."""
    other = stored("valid", f"teacher.model={saved_model('llama', seed=2, tokenizer=chat_tokenizer_folder)}")
    with pytest.raises(MismatchError, match="has another tokenizer"):
        plan(stored(), f"held_out.path={other}")


def test_a_held_out_store_of_another_teacher(plan, stored, saved_model):
    other = stored("valid", f"teacher.model={saved_model('llama', seed=5)}")
    with pytest.raises(MismatchError, match="has another teacher"):
        plan(stored(), f"held_out.path={other}")


def test_a_teacher_is_the_same_in_another_folder(plan, stored, saved_model, tmp_path):
    """Its fingerprint tells, and that of its tokenizer, and not where they lie."""
    moved = shutil.copytree(saved_model("llama", seed=2), tmp_path / "moved")
    assert plan(stored(), f"held_out.path={stored('valid', f'teacher.model={moved}')}").held_out_store is not None


# --- the whole verb --------------------------------------------------------------------------------------------------


def test_a_refused_run_leaves_nothing(recipe, stored, tmp_path):
    words = [f"teacher={{kind: store, path: {stored('train', signal='{kind: sampled}')}}}", "data={format: store}",
             "held_out=null", "objectives=[{kind: reverse_kl}]", f"out={tmp_path}/run"]  # fmt: skip
    with pytest.raises(MismatchError):
        run(load(DistillConfig, recipe, words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("{kind: logit_mse}", "logit_mse cannot be learned from a few entries"),
        (
            "{kind: forward_kl, temperature: {kind: linear, start: 2.0, stop: 1.0}}",
            "cannot follow a temperature that changes",
        ),
        ("{kind: forward_kl, token_weight: {kind: teacher_entropy}}", "does not hold the teacher's entropy"),
    ],
)
def test_objectives_that_the_store_cannot_teach_are_refused(stored, plan, objective, says):
    with pytest.raises(MismatchError, match=says):
        plan(stored(), f"objectives=[{objective}]")


@pytest.mark.parametrize(
    "objective",
    [
        "{kind: jensen_shannon, beta: 0.3, temperature: 2.0}",
        "{kind: forward_kl, missing: label}",
        "{kind: hinge_ranking, k: 4}",
        "{kind: cross_entropy, temperature: {kind: linear, start: 2.0, stop: 1.0}}",
        "{kind: forward_kl, token_weight: {kind: student_entropy}}",
    ],
)
def test_objectives_that_it_can_teach_are_planned(stored, plan, objective):
    assert plan(stored(), f"objectives=[{objective}]").store is not None

"""The settings of `stillroom capture`: what they are by themselves, and what is said of those that do not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.capture.config import CaptureConfig, OpenAI, Transformers
from stillroom.config import load
from stillroom.errors import ConfigError
from stillroom.recipe import to_yaml
from stillroom.store.config import HeadAndSample, known_temperatures, side_columns

Load = Callable[..., CaptureConfig]
VLLM = "teacher.engine={kind: vllm, url: 'http://x/v1'}"
OPENAI = "teacher.engine={kind: openai, url: 'http://x/v1'}"


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """Loads a small valid recipe with some overrides."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: {model: t}\ndata: {path: d, format: text, length: 64}\nout: o\n")
    return lambda *overrides: load(CaptureConfig, recipe, overrides)


# --- what they are by themselves -------------------------------------------------------------------------------------


def test_a_teacher_data_and_a_place_are_enough(loaded):
    config = loaded()
    assert config.teacher.engine == Transformers(kind="transformers")
    assert (config.teacher.columns, config.teacher.tokenizer, config.teacher.revision) == ("auto", None, None)
    assert config.signal == HeadAndSample(kind="head_and_sample")
    assert (config.generate, config.part, config.shard_positions, config.seed) == (None, "auto", 2**20, 0)
    engine = config.teacher.engine
    assert (engine.dtype, engine.device, engine.attention) == ("auto", "auto", "auto")
    assert (engine.batch_tokens, engine.logits_bytes) == ("auto", "auto")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("top_k", {"k": 50, "entropy": False, "temperatures": (), "step": 0.1, "label": False}),
        ("top_p", {"mass": 0.98, "most": 100, "entropy": False, "temperatures": (), "step": 0.1, "label": False}),
        ("sampled", {"draws": 50, "step": 0.1, "label": False}),
        ("head_and_sample", {"head": 12, "draws": 8, "least": 0.002, "step": 0.1, "label": False}),
        ("full", {}),
    ],
)
def test_the_fields_of_each_kind_of_signal(loaded, kind, values):
    assert loaded(f"signal={{kind: {kind}}}").signal.model_dump() == {"kind": kind, **values}


def test_the_fields_of_a_server(loaded):
    engine = loaded(OPENAI, "signal={kind: top_k, k: 5}").teacher.engine
    assert isinstance(engine, OpenAI)
    assert engine.model_dump(exclude={"kind", "url"}) == {
        "concurrency": 8, "retries": 6, "timeout_s": 120.0, "key_variable": None, "prompt_price": 0.0,
        "completion_price": 0.0,
    }  # fmt: skip


def test_the_fields_of_answers(loaded):
    config = loaded("data.overlong=cut", "generate={prompt_tokens: 3, max_tokens: 8}").generate
    assert config is not None
    assert config.model_dump() == {
        "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "answers": 1, "prompt_tokens": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("signal", "columns", "temperatures"),
    [
        ("{kind: top_k}", ["rest@1.0"], (1.0,)),
        (
            "{kind: top_p, temperatures: [4, 1, 2.0, 2], entropy: true, label: true}",
            ["rest@1.0", "rest@2.0", "rest@4.0", "entropy", "label"],
            (1.0, 2.0, 4.0),
        ),
        ("{kind: sampled}", ["unit", "entropy"], ()),
        ("{kind: head_and_sample, label: true}", ["unit", "entropy", "label"], ()),
        ("{kind: full}", [], ()),
    ],
)
def test_what_is_kept_besides_the_entries(loaded, signal, columns, temperatures):
    config = loaded(f"signal={signal}").signal
    assert side_columns(config) == columns
    assert known_temperatures(config) == temperatures


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["part={index: 0, of: 1}"],
        ["part={index: 6, of: 7}"],
        ["data.overlong=cut", "generate={max_tokens: 63, prompt_tokens: 1}"],
        ["data.overlong=cut", "generate={max_tokens: 8, prompt_tokens: 1, temperature: 0}"],
        [
            "data.overlong=cut",
            "generate={max_tokens: 8, prompt_tokens: 1, temperature: 0.5, answers: 1000, top_p: 0.1}",
        ],
        ["data={path: d, format: chat, length: 64}", "generate={max_tokens: 8}"],
        ["data={path: d, format: prompt_completion, length: 64}", "generate={max_tokens: 8, answers: 3}"],
        [VLLM, "signal={kind: top_k, k: 65536, label: true}"],
        [VLLM, "signal={kind: top_p, most: 21, mass: 0.5}"],
        [OPENAI, "signal={kind: top_k, k: 20}"],
        [OPENAI, "signal={kind: top_p, most: 20}"],
        ["signal={kind: head_and_sample, least: 0}"],
        ["signal={kind: top_k, temperatures: [0.5, 2.0], step: 0.001}"],
        ["seed=9223372036854775807", "shard_positions=1"],
    ],
    ids=" ".join,
)
def test_settings_that_go_together(loaded, overrides, tmp_path):
    config = loaded(*overrides)
    assert CaptureConfig.model_validate(config.model_dump()) == config
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config.model_dump(mode="json")))
    assert load(CaptureConfig, again) == config


# --- what is refused -------------------------------------------------------------------------------------------------

SERVERS_TELL_LITTLE = " needs the whole distribution, and a server tells its likeliest tokens alone: use top_k or top_p"
NOT_TOLD = "a server does not tell the entropy, or the mass left out at other temperatures"
PROMPT_OF_TEXT = "generate.prompt_tokens says where the prompt of plain text ends, and is for text alone"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.overlong=cut", "generate={max_tokens: 8, prompt_tokens: 1, answers: 2, temperature: 0}"],
            "generate.temperature=0 gives the same answer each time, so generate.answers must be 1",
        ),
        (["data.overlong=cut", "generate={max_tokens: 8}"], PROMPT_OF_TEXT),
        (
            ["generate={max_tokens: 8, prompt_tokens: 1}"],
            "generate with data.overlong=split would take each piece of a long text for a prompt: set "
            "data.overlong=cut, or drop",
        ),
        (["data.weight=score"], "data.weight: a store holds what the teacher said, and no weights of the data's own"),
        (["data={path: d, format: chat, length: 64}", "generate={max_tokens: 8, prompt_tokens: 1}"], PROMPT_OF_TEXT),
        (
            ["data={path: d, format: prompt_completion, length: 64}", "generate={max_tokens: 8, prompt_tokens: 1}"],
            PROMPT_OF_TEXT,
        ),
        (
            ["data.overlong=cut", "generate={max_tokens: 64, prompt_tokens: 1}"],
            "generate.max_tokens (64) leaves no room for a prompt in data.length (64)",
        ),
        (["part={index: 2, of: 2}"], "part.index (2) counts from 0, so it is less than part.of (2)"),
        ([VLLM], "signal.kind=head_and_sample" + SERVERS_TELL_LITTLE),
        ([VLLM, "signal={kind: sampled}"], "signal.kind=sampled" + SERVERS_TELL_LITTLE),
        ([OPENAI, "signal={kind: full}"], "signal.kind=full" + SERVERS_TELL_LITTLE),
        ([VLLM, "signal={kind: top_k, entropy: true}"], NOT_TOLD),
        ([VLLM, "signal={kind: top_p, temperatures: [2]}"], NOT_TOLD),
        (
            [OPENAI, "signal={kind: top_k, k: 21}"],
            "an OpenAI-compatible server tells 20 tokens a position at the most, not 21",
        ),
        (
            [OPENAI, "signal={kind: top_p}"],
            "an OpenAI-compatible server tells 20 tokens a position at the most, not 100",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_words(loaded, overrides, message):
    with pytest.raises(ConfigError) as caught:
        loaded(*overrides)
    assert caught.value.what == "these settings do not go together"
    assert caught.value.values == {"settings": message}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("teacher.columns=0", "teacher.columns"),
        ("teacher.columns=some", "teacher.columns"),
        ("teacher.engine={kind: transformers, dtype: float16}", "teacher.engine.dtype"),
        ("teacher.engine={kind: transformers, attention: fast}", "teacher.engine.attention"),
        ("teacher.engine={kind: transformers, batch_tokens: 0}", "teacher.engine.batch_tokens"),
        ("teacher.engine={kind: transformers, logits_bytes: 0}", "teacher.engine.logits_bytes"),
        ("teacher.engine={kind: vllm, url: x, concurrency: 0}", "teacher.engine.concurrency"),
        ("teacher.engine={kind: vllm, url: x, concurrency: 1025}", "teacher.engine.concurrency"),
        ("teacher.engine={kind: vllm, url: x, retries: -1}", "teacher.engine.retries"),
        ("teacher.engine={kind: vllm, url: x, retries: 101}", "teacher.engine.retries"),
        ("teacher.engine={kind: vllm, url: x, timeout_s: 0}", "teacher.engine.timeout_s"),
        ("teacher.engine={kind: vllm, url: x, prompt_price: -1}", "teacher.engine.prompt_price"),
        ("teacher.engine={kind: vllm, url: x, completion_price: -1}", "teacher.engine.completion_price"),
        ("teacher.engine={kind: vllm, url: x, timeout_s: .inf}", "teacher.engine.timeout_s"),
        ("signal={kind: top_k, k: 0}", "signal.k"),
        ("signal={kind: top_k, k: 65537}", "signal.k"),
        ("signal={kind: top_k, step: 0.0009}", "signal.step"),
        ("signal={kind: top_k, step: 1.1}", "signal.step"),
        ("signal={kind: top_k, step: .nan}", "signal.step"),
        ("signal={kind: top_k, temperatures: [0]}", "signal.temperatures.0"),
        ("signal={kind: top_k, temperatures: [2, .inf]}", "signal.temperatures.1"),
        ("signal={kind: top_k, temperatures: 2}", "signal.temperatures"),
        ("signal={kind: top_p, mass: 0}", "signal.mass"),
        ("signal={kind: top_p, mass: 1}", "signal.mass"),
        ("signal={kind: top_p, most: 0}", "signal.most"),
        ("signal={kind: sampled, draws: 0}", "signal.draws"),
        ("signal={kind: head_and_sample, head: 0}", "signal.head"),
        ("signal={kind: head_and_sample, draws: 65537}", "signal.draws"),
        ("signal={kind: head_and_sample, least: -0.1}", "signal.least"),
        ("signal={kind: head_and_sample, least: 1}", "signal.least"),
        ("generate={prompt_tokens: 0}", "generate.prompt_tokens"),
        ("generate={max_tokens: 0}", "generate.max_tokens"),
        ("generate={temperature: -1}", "generate.temperature"),
        ("generate={top_p: 0}", "generate.top_p"),
        ("generate={top_p: 1.1}", "generate.top_p"),
        ("generate={answers: 0}", "generate.answers"),
        ("generate={answers: 1001}", "generate.answers"),
        ("part={index: -1, of: 2}", "part.index"),
        ("part={index: 0, of: 0}", "part.of"),
        ("part=3", "part"),
        ("part=al", "part"),
        ("shard_positions=0", "shard_positions"),
        ("seed=-1", "seed"),
        ("seed=9223372036854775808", "seed"),
        ("data.length=1", "data.length"),
        ("out=null", "out"),
    ],
)
def test_a_value_out_of_bounds_is_refused_and_named(loaded, override, key):
    with pytest.raises(ConfigError) as caught:
        loaded(override)
    assert caught.value.what == f"the setting `{key}` is not valid"
    assert list(caught.value.values) == [key]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("teacher.kind=model", "unknown setting `teacher.kind`"),
        ("teacher.dtype=float32", "unknown setting `teacher.dtype`"),
        ("teacher.engine={kind: transformers, url: x}", "unknown setting `teacher.engine.url`"),
        ("teacher.engine={kind: vllm, url: x, batch_tokens: 4}", "unknown setting `teacher.engine.batch_tokens`"),
        ("teacher.engine={kind: vllm, url: x, key: abc}", "unknown setting `teacher.engine.key`"),
        ("signal={kind: top_k, draws: 3}", "unknown setting `signal.draws`"),
        ("signal={kind: sampled, entropy: true}", "unknown setting `signal.entropy`"),
        ("signal={kind: head_and_sample, temperatures: [2]}", "unknown setting `signal.temperatures`"),
        ("signal={kind: full, step: 0.1}", "unknown setting `signal.step`"),
        ("student={model: s}", "unknown setting `student`"),
    ],
)
def test_only_known_settings_are_taken(loaded, override, what):
    with pytest.raises(ConfigError) as caught:
        loaded(override)
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("signal={kind: nonsense}", "signal", "there are top_k, top_p, sampled, head_and_sample, full"),
        ("teacher.engine={kind: tgi}", "teacher.engine", "there are transformers, vllm, openai"),
        ("data={path: d, format: store}", "data", "here are text, chat, prompt_completion, tokens"),
    ],
)
def test_another_kind_says_which_kinds_there_are(loaded, override, key, words):
    with pytest.raises(ConfigError) as caught:
        loaded(override)
    assert list(caught.value.values) == [key]
    assert words in str(caught.value.values[key])


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("data: {path: d, format: text}\nout: o\n", "teacher"),
        ("teacher: {model: t}\nout: o\n", "data"),
        ("teacher: {model: t}\ndata: {path: d, format: text}\n", "out"),
        ("teacher: {}\ndata: {path: d, format: text}\nout: o\n", "teacher.model"),
        ("teacher: {model: t, engine: {kind: vllm}}\ndata: {path: d, format: text}\nout: o\n", "teacher.engine.url"),
    ],
)
def test_what_must_be_said_is_asked_for(tmp_path, text, key):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(CaptureConfig, recipe)
    assert f"`{key}`" in str(caught.value)


def test_a_place_may_be_named_by_a_variable(loaded, monkeypatch):
    monkeypatch.setenv("PLACE", "/where")
    assert loaded("out=$PLACE/x", "teacher.model=${PLACE}/t").out == "/where/x"
    with pytest.raises(ConfigError, match="NOWHERE_AT_ALL"):
        loaded("out=$NOWHERE_AT_ALL/x")

"""The settings of `stillroom distill`: which of them go together, and what is said of those that do not."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.capture.config import CaptureConfig
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.errors import ConfigError
from stillroom.evaluate.config import EvaluateConfig
from stillroom.losses.objective import build_objectives
from stillroom.recipe import to_yaml
from stillroom.training.config import AdamWConfig
from stillroom.training.step import StudentStep

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.fixture
def loaded(tmp_path: Path):
    """Loads a small valid recipe with some overrides."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "student: {model: s}\n"
        "teacher: {kind: model, model: t}\n"
        "data: {path: d, format: text, length: 8}\n"
        "objectives: [{kind: forward_kl}]\n"
        "steps: 10\n"
        "batch: {tokens: 64}\n"
        "optimizer: {learning_rate: 1e-3}\n"
        "out: o\n"
    )
    return lambda *overrides: load(DistillConfig, recipe, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["steps=null", "epochs=2"],
        ["teacher=null", "objectives=[{kind: cross_entropy}]"],
        ["batch.tokens=8", "batch.micro_tokens=8"],
        ["batch.micro_tokens=4096"],
        ["checkpoints.best=true", "held_out={path: v, every: 5}"],
        ["student={init: {kind: config}}"],
        ["student={init: {kind: config, like: x}}"],
        ["student={init: {kind: config, family: llama, settings: {hidden_size: 8}}}"],
        [
            "teacher=null",
            "objectives=[{kind: cross_entropy}]",
            "student={init: {kind: config, family: llama}, tokenizer: t}",
        ],
        ["student.lora={rank: 4}"],
        ["student.lora={targets: [q_proj, v_proj]}"],
        ["tracking=[wandb, tensorboard]"],
        ["optimizer.clip=null", "checkpoints.every=null"],
        ["teacher.quantization=fp8", "teacher.placement=whole", "teacher.ranks=1"],
        ["objectives.1={kind: reverse_kl, temperature: 2, weight: 0}"],
    ],
    ids=" ".join,
)
def test_settings_that_go_together(loaded, overrides):
    config = loaded(*overrides)
    assert DistillConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (
            ["student={}"],
            "student",
            "the student needs either `model` (an existing one) or `init` (a new one), and not both",
        ),
        (
            ["student.init.kind=config"],
            "student",
            "the student needs either `model` (an existing one) or `init` (a new one), and not both",
        ),
        (["epochs=2"], "settings", "give either `steps` or `epochs`, and not both"),
        (["steps=null"], "settings", "give either `steps` or `epochs`, and not both"),
        (["teacher=null"], "settings", "objectives.0 (forward_kl) needs a `teacher`"),
        (
            ["teacher=null", "objectives=[{kind: cross_entropy}, {kind: reverse_kl}]"],
            "settings",
            "objectives.1 (reverse_kl) needs a `teacher`",
        ),
        (
            ["objectives=[{kind: forward_kl, missing: zero}]"],
            "settings",
            "objectives.0.missing is `zero`, and a live teacher leaves nothing out: nobody reads it",
        ),
        (["batch.tokens=7"], "settings", "batch.tokens (7) is less than a row, data.length (8)"),
        (["batch.micro_tokens=7"], "settings", "batch.micro_tokens (7) is less than a row, data.length (8)"),
        (
            ["checkpoints.best=true"],
            "settings",
            "checkpoints.best needs `held_out` with `every`, by which the best is known",
        ),
        (
            ["checkpoints.best=true", "held_out={path: v}"],
            "settings",
            "checkpoints.best needs `held_out` with `every`, by which the best is known",
        ),
        (
            ["student={init: {kind: config, like: x, family: llama}}"],
            "settings",
            "student.init takes `like` or `family`, and not both",
        ),
        (
            ["teacher=null", "objectives=[{kind: cross_entropy}]", "student={init: {kind: config}, tokenizer: t}"],
            "settings",
            "student.init needs `like` or `family` where there is no live teacher to be like",
        ),
        (
            ["teacher=null", "objectives=[{kind: cross_entropy}]", "student={init: {kind: config, family: llama}}"],
            "settings",
            "a new student without a teacher needs student.tokenizer",
        ),
        (
            ["teacher.quantization=int8", "teacher.placement=sharded"],
            "settings",
            "a teacher in int8 lies whole in each process: teacher.placement=sharded would divide weights that are "
            "packed with their scales",
        ),
        (
            ["teacher.quantization=nf4", "teacher.dtype=float64"],
            "teacher",
            "dtype=float64 is for checks, and quantization=nf4 rounds what it checks",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_words(loaded, overrides, key, message):
    with pytest.raises(ConfigError) as caught:
        loaded(*overrides)
    assert caught.value.values == {key: message}
    assert caught.value.what == (
        "these settings do not go together" if key == "settings" else f"the setting `{key}` is not valid"
    )


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("steps=0", "steps"),
        ("steps=-1", "steps"),
        ("epochs=0", "epochs"),
        ("seed=-1", "seed"),
        ("data.length=1", "data.length"),
        ("data.max_documents=0", "data.max_documents"),
        ("batch.tokens=0", "batch.tokens"),
        ("batch.micro_tokens=-1", "batch.micro_tokens"),
        ("logits_bytes=0", "logits_bytes"),
        ("logits_bytes=-1", "logits_bytes"),
        ("checkpoints.every=0", "checkpoints.every"),
        ("checkpoints.keep=0", "checkpoints.keep"),
        ("held_out={path: v, every: 0}", "held_out.every"),
        ("teacher.columns=0", "teacher.columns"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate"),
        ("optimizer.warmup=1.5", "optimizer.warmup"),
        ("optimizer.warmup=100", "optimizer.warmup"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay"),
        ("optimizer.beta1=-0.1", "optimizer.beta1"),
        ("optimizer.beta2=1.01", "optimizer.beta2"),
        ("optimizer.beta1=1.0", "optimizer.beta1"),
        ("optimizer.beta2=1.0", "optimizer.beta2"),
        ("optimizer.epsilon=0", "optimizer.epsilon"),
        ("optimizer.clip=0", "optimizer.clip"),
        ("optimizer.clip=-1", "optimizer.clip"),
        ("optimizer.schedule=exponential", "optimizer.schedule"),
        ("objectives.0.temperature=0", "objectives.0.temperature"),
        ("objectives.0.weight=-1", "objectives.0.weight"),
        ("objectives=[]", "objectives"),
        ("student.lora={rank: 0}", "student.lora.rank"),
        ("student.lora={alpha: 0}", "student.lora.alpha"),
        ("student.lora={dropout: 2}", "student.lora.dropout"),
        ("student.lora={targets: some}", "student.lora.targets"),
        ("student.lora={targets: [1]}", "student.lora.targets.0"),
        ("student.lora={export: both}", "student.lora.export"),
        ("student.freeze=lm_head", "student.freeze"),
        ("student.attention=fast", "student.attention"),
        ("precision=float16", "precision"),
        ("tracking=[excel]", "tracking.0"),
        ("teacher.dtype=int8", "teacher.dtype"),
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
        ("objectives.0.beta=0.5", "unknown setting `objectives.0.beta`"),
        ("objectives.0.temprature=2", "unknown setting `objectives.0.temprature`"),
        ("teacher.path=x", "unknown setting `teacher.path`"),
        ("student={init: {kind: config, layers: 3}}", "unknown setting `student.init.layers`"),
        ("student.lora={r: 3}", "unknown setting `student.lora.r`"),
        ("data.template=auto", "unknown setting `data.template`"),
        ("student={init: {kind: config, settings: {any_name: 3}}, model: null}", None),
    ],
)
def test_only_known_settings_are_taken(loaded, override, what):
    if what is None:
        assert loaded(override).student.init.settings == {"any_name": 3}
        return
    with pytest.raises(ConfigError) as caught:
        loaded(override)
    assert caught.value.what == what


def test_a_teacher_of_another_kind_says_which_kinds_there_are(loaded):
    with pytest.raises(ConfigError) as caught:
        loaded("teacher={kind: shop, path: x}")
    assert caught.value.values == {"teacher": "there is no kind `shop`; there are model, server, store"}


def test_what_the_optimizers_settings_allow_torch_allows():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for beta1, beta2 in ((0.0, 0.0), (0.9, 0.999)):
        config = AdamWConfig(learning_rate=1e-3, beta1=beta1, beta2=beta2)
        torch.optim.AdamW([parameter], lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_reads_the_same_after_it_was_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLROOM_DATA", "/where/the/data/are")
    verbs = {"capture": CaptureConfig, "evaluation": EvaluateConfig}
    verb = verbs.get(recipe.stem.rsplit("-", 1)[-1], DistillConfig)
    config = load(verb, recipe)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config.model_dump()))
    assert load(verb, again) == config


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("temperature", ["1e-30", "1e30", "0", "{kind: linear, start: 1, stop: 1e-9}",
                                         "{kind: cosine, start: 2000, stop: 1}"])  # fmt: skip
def test_a_temperature_at_which_nothing_is_learned_is_refused(loaded, temperature):
    with pytest.raises(ConfigError, match=r"temperature|0\\.01"):
        loaded(f"objectives=[{{kind: forward_kl, temperature: {temperature}}}]")


@pytest.mark.parametrize(
    ("held_out", "same"),
    [
        ("{path: d}", True),
        ("{path: d, subset: a}", True),
        ("{path: d, subset: b}", False),
        ("{path: d, revision: c}", False),
        ("{path: d, split: test}", False),
        ("{path: e, subset: a}", False),
    ],
)
def test_other_data_of_the_same_place_are_held_out(loaded, held_out, same):
    words = ("data.subset=a", f"held_out={held_out}")
    if same:
        with pytest.raises(ConfigError, match="held_out is the same as data"):
            loaded(*words)
    else:
        loaded(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["held_out={}"], "either `path` or `share`"),
        (["held_out={path: e, share: 0.1}"], "either `path` or `share`"),
        (["held_out={share: 1.0}"], "less than 1"),
        (["held_out={share: 0.1, max_documents: 3}"], "max_documents is for text at a `path`"),
        (["held_out={share: 0.1, split: test}"], "split is for text at a `path`"),
        (["held_out={share: 0.1}", "data.hash_range=[0.5, 1.0]"], "both choose rows by their hash"),
    ],
)
def test_what_is_held_out_of_the_data_themselves(loaded, words, message):
    config = loaded("held_out={share: 0.1}")
    held_out = config.held_out_data
    assert (held_out.path, held_out.hash_range, held_out.shuffle) == (config.data.path, [0.0, 0.1], False)
    assert config.held_out.rest(config.data).hash_range == [0.1, 1.0]
    loaded("held_out={share: 0.1}", "data.hash_range=[0.1, 1.0]")  # as a plan writes it down
    with pytest.raises(ConfigError, match=message):
        loaded(*words)


def test_a_column_is_called_nats_where_the_loss_is(loaded):
    kinds = ["forward_kl", "cross_entropy", "total_variation", "logit_mse", "hinge_ranking", "logistic_ranking"]
    config = loaded(f"objectives=[{', '.join(f'{{kind: {kind}}}' for kind in kinds)}]")
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    step = StudentStep(model, build_objectives(config.objectives), vocab_size=None, logits_bytes=2**20)
    assert step.columns == ["forward_kl_nats", "cross_entropy_nats", "total_variation_loss", "logit_mse_loss",
                            "hinge_ranking_loss", "logistic_ranking_loss"]  # fmt: skip

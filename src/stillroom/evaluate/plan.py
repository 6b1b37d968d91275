"""The plan of an evaluation: every "auto" resolved, everything checked that headers tell. Writes nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stillroom.config import BATCH_TOKENS, LOGITS_BYTES, format_setting, is_local, replace
from stillroom.data.config import DataConfig
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError, MismatchError, MissingError
from stillroom.evaluate.config import AnyTask, EvaluateConfig, HarnessTask, ModelConfig, expand
from stillroom.evaluate.estimate import costs, read_headers
from stillroom.evaluate.tasks.harness import HarnessBenchmark
from stillroom.evaluate.tasks.local import LocalBenchmark
from stillroom.models import loading
from stillroom.runs import check_outside, redact
from stillroom.tokenizers import (
    compare,
    has_tokenizer,
    load_tokenizer,
    required_vocab_size,
    template_fingerprint,
    template_of,
)
from stillroom.verbs import VerbPlan, check_row, check_vocabulary, costs_on, files_of, has_bfloat16, no_template

Benchmark = LocalBenchmark | HarnessBenchmark
"""A task that is put to every model."""


@dataclass(frozen=True)
class LocalModel:
    """A model that runs in this process, and reads the held-out text where there is one."""

    name: str
    config: ModelConfig
    fingerprint: str
    """The fingerprint of the model."""
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template that rows go through, where they do."""
    vocab_size: int
    """The ids that make up its distribution; its head may be wider."""
    mismatch: str | None
    """Why it cannot be compared with the teacher token by token; None where it can, and of the teacher itself."""


@dataclass(frozen=True)
class EvaluatePlan(VerbPlan[EvaluateConfig]):
    local_models: tuple[LocalModel, ...]
    """The models that run in this process, the teacher first."""
    served: dict[str, PreTrainedTokenizerBase | None]
    """The models behind an address, each with its tokenizer where that is known."""
    benchmarks: tuple[Benchmark, ...]
    runs: dict[str, str]
    """The folder by model of the run that made it, where it is known."""
    batch_tokens: int
    """Tokens that go through a model at once."""
    logits_bytes: int
    """The budget for logits that are held at a time."""

    def not_beside_teacher(self, reader: LocalModel) -> str | None:
        """Returns why a model is not compared with the teacher token by token; None where it is."""
        teacher = self.config.teacher
        if teacher is None:
            return "no model is said to be the teacher"
        return f"of {teacher}, {NO_DISTRIBUTION}" if teacher in self.served else reader.mismatch

    def costs(self) -> dict[str, Any] | str:
        headers = dataclasses.replace(
            read_headers(self.config),
            alone=frozenset(reader.name for reader in self.local_models if reader.mismatch is not None),
            questions={
                one.name: len(one.questions) if isinstance(one, LocalBenchmark) else None for one in self.benchmarks
            },
        )
        return costs_on(self.config.device, lambda hardware: costs(self.config, headers, hardware))

    def details(self) -> dict[str, Any]:
        teacher, found = self.config.teacher, {}
        readers = {reader.name: reader for reader in self.local_models}
        for name in self.config.models:
            if name in self.served:
                found[name] = f"by tasks alone: {NO_DISTRIBUTION}"
            elif name == teacher:
                found[name] = f"the teacher, {readers[name].vocab_size} columns"
            else:
                reason = self.not_beside_teacher(readers[name])
                found[name] = f"not token by token: {reason}" if reason else "token by token"
        return {"compares": found}

    def reads(self) -> dict[str, str]:
        found = {f"model {name}": model.url or model.model for name, model in self.config.models.items()}
        if self.config.data is not None:
            found["data"] = files_of(self.config.data)
        for benchmark in self.benchmarks:
            found[f"task {benchmark.name}"] = ", ".join(benchmark.files) or "lm-eval"
        return {**redact(found), **{f"{name}'s run": run for name, run in self.runs.items()}}

    def writes(self) -> dict[str, str]:
        out = Path(self.config.out)
        found = {"run": str(out / "run.json"), "results": str(out / "results.json")}
        found["report"] = f"{out / 'report.html'}, {out / 'report.md'}"
        return {**found, "items": str(out / "items")} if self.config.tasks else found


NO_DISTRIBUTION = "it is behind an address, and a server does not tell its whole distribution"


def make_plan(config: EvaluateConfig) -> EvaluatePlan:
    """Resolves and checks a config from headers alone. A model whose tokenizer is not the teacher's is no error.

    Raises:
        MissingError: a model, a tokenizer, a data file or a device is not there.
        MismatchError: a tokenizer is not the model's own, or has tokens that it has no column for; chat templates of
            models that are to be compared differ.
        ConfigError: settings contradict what the headers say.
    """
    device = loading.resolve_device(config.device, "device")
    length = 2 if config.data is None else config.data.length
    shown_length = None if config.data is None else format_setting(config, "data.length")
    batch_tokens = max(length, BATCH_TOKENS) if config.batch_tokens == "auto" else config.batch_tokens
    check_row("batch_tokens", batch_tokens, length, shown_length or length)
    logits_bytes = LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes
    dtype = "bfloat16" if has_bfloat16(device) else "float32"
    values: dict[str, Any] = {"device": device, "batch_tokens": batch_tokens, "logits_bytes": logits_bytes}
    values |= {f"models.{name}.dtype": dtype for name, model in config.models.items() if model.dtype == "auto"}
    config = replace(config, values)
    read = {"data.path": None if config.data is None else config.data.path}
    for name, model in config.models.items():
        if model.url is None:
            read[f"models.{name}"] = model.model
        read |= {f"models.{name}.tokenizer": model.tokenizer, f"models.{name}.run": model.run}
    check_outside(config.out, read)
    readers = _local_models(config.models, config.teacher, config.data, shown_length)
    if config.data is not None and is_local(config.data.path):
        open_source(config.data)  # which says where it is not there
    benchmarks = _benchmarks(config.tasks, config.out)
    served = {
        name: None if model.tokenizer is None else _tokenizer(name, model)
        for name, model in config.models.items()
        if model.url is not None
    }
    runs = {name: run for name, model in config.models.items() if (run := _run_of(name, model)) is not None}
    return EvaluatePlan(config, readers, served, benchmarks, runs, batch_tokens, logits_bytes)


def open_benchmark(task: AnyTask) -> Benchmark:
    """Reads all that a task needs and asks no model.

    Raises:
        ConfigError: the description cannot be meant; lm-eval knows no such task.
        DataError: an item cannot be asked, with file, line and column.
        MissingError: a file is not there, or lm-eval is not installed.
    """
    return HarnessBenchmark.open(task) if isinstance(task, HarnessTask) else LocalBenchmark.open(task)


def _benchmarks(tasks: Sequence[AnyTask], out: str) -> tuple[Benchmark, ...]:
    """The tasks, opened: each under a name of its own, and none of whose files lies where the results go."""
    found: dict[str, tuple[Benchmark, str]] = {}
    for task in expand(tasks):
        one, given = open_benchmark(task), task.model_dump(exclude_none=True, exclude={"kind"})
        in_short = ", ".join(f"{key}={value}" for key, value in given.items())
        if one.name in found:
            raise ConfigError(
                f"two tasks are called {one.name}",
                {"first": found[one.name][1], "second": in_short},
                why="Results and items are kept by name, so those of one would take the place of the other's.",
                fix="Give one a name of its own: {kind: …, name: …, …}.",
            )
        check_outside(out, {f"{one.name}: {Path(file).name}": file for file in one.files})
        found[one.name] = one, in_short
    return tuple(one for one, _ in found.values())


def _local_models(
    models: Mapping[str, ModelConfig], teacher: str | None, data: DataConfig | None, shown_length: object
) -> tuple[LocalModel, ...]:
    """The models that run in this process, the teacher first."""
    here = {name: model for name, model in models.items() if model.url is None}
    if not here:
        return ()
    first = teacher if teacher in here else next(iter(here))
    here = {first: here[first], **here}
    configs = {
        name: loading.read_config(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
        for name, model in here.items()
    }
    tokenizers = {name: _tokenizer(name, model) for name, model in here.items()}
    widths = {name: found.get_text_config().vocab_size for name, found in configs.items()}
    unlike: dict[str, str | None] = dict.fromkeys(here)
    for name, model in here.items():
        try:
            compare(tokenizers[first], tokenizers[name], (first, name))
        except MismatchError as error:
            unlike[name] = f"its tokenizer is not that of {first}: {error.why}"
        own = model.tokenizer or f"its own, by default ({model.model})"
        fix = f"Set models.{name}.tokenizer to the one that the model was trained with."
        check_vocabulary(tokenizers[name], configs[name], name, tokenizer_name=own, fix=fix)
        if data is not None:
            loading.check_length(data.length, configs[name], name, shown_length)
    compared = {widths[name] for name in here if unlike[name] is None}
    common = compared.pop() if len(compared) == 1 else required_vocab_size(tokenizers[first])
    templates = _templates(data, tokenizers, unlike)
    return tuple(
        LocalModel(
            name,
            model,
            loading.fingerprint(model.model, configs[name]),
            tokenizers[first] if unlike[name] is None else tokenizers[name],
            templates[name],
            common if unlike[name] is None else widths[name],
            unlike[name],
        )
        for name, model in here.items()
    )


def _tokenizer(name: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one that is named makes the same ids as the model's own, where it has one."""
    remote_code = model.trust_remote_code
    if model.tokenizer is None:
        return load_tokenizer(model.model, revision=model.revision, trust_remote_code=remote_code)
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=remote_code)
    if model.url is None and has_tokenizer(model.model, revision=model.revision):
        own = load_tokenizer(model.model, revision=model.revision, trust_remote_code=remote_code)
        fix = f"Leave models.{name}.tokenizer out."
        compare(tokenizer, own, (f"models.{name}.tokenizer", f"{name}'s own"), roles=False, fix=fix)
    return tokenizer


def _templates(
    data: DataConfig | None, tokenizers: Mapping[str, PreTrainedTokenizerBase], unlike: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Returns each model's chat template, which is the same for all that are compared token by token."""
    if data is None or not needs_template(data):
        return dict.fromkeys(tokenizers)
    own = {name: template_of(tokenizer) for name, tokenizer in tokenizers.items()}
    together = {name: template for name, template in own.items() if unlike[name] is None and template is not None}
    first = next(iter(together), None)
    for name, template in together.items():
        if data.template == "auto" and first is not None and template != together[first]:  # pyright: ignore[reportAttributeAccessIssue]
            raise MismatchError(
                f"{first} and {name} have different chat templates",
                {first: template_fingerprint(together[first])[:16], name: template_fingerprint(template)[:16]},
                why="The same conversation would become other tokens for each, so they are not compared on one.",
                fix="Set data.template=teacher to take the teacher's for all.",
            )
    shared = None if first is None else together[first]
    found = {name: shared if unlike[name] is None else own[name] for name in own}
    for name, template in found.items():
        if template is None:
            values = {"tokenizer": tokenizers[name].name_or_path, "data.format": data.format}
            raise no_template(values, of=f"the tokenizer of {name}")
    return found


def _run_of(name: str, model: ModelConfig) -> str | None:
    """The folder of the run that made a model.

    Raises:
        MissingError: one is named that is none.
    """
    if model.run is not None:
        if (Path(model.run) / "run.json").is_file():
            return str(Path(model.run).expanduser().absolute())
        raise MissingError(
            f"models.{name}.run is not the folder of a run",
            {"looked for": Path(model.run) / "run.json", "found": "nothing"},
            why="Its training curves are to be shown.",
            fix="Name the folder that `stillroom distill` wrote as `out`, or leave it out.",
        )
    if model.url is None and is_local(model.model):
        around = Path(model.model).expanduser().absolute().parent
        if (around / "run.json").is_file() and (around / "metrics.jsonl").is_file():
            return str(around)
    return None

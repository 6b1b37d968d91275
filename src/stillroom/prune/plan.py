"""The plan of a cut: every "auto" resolved, everything checked that headers tell. Writes nothing."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import format_setting, is_local, replace
from stillroom.data.config import AnyData
from stillroom.data.dataset import Documents, cache_folder, cache_path, prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError, MismatchError, MissingError
from stillroom.estimates.headers import Headers
from stillroom.estimates.sections import costs_here
from stillroom.models import loading
from stillroom.prune.config import PruneConfig
from stillroom.prune.estimate import BATCH_TOKENS, costs, read_headers
from stillroom.pruning.plan import PruningPlan, plan_pruning
from stillroom.recipe import to_yaml
from stillroom.runs import check_outside, redact
from stillroom.tokenizers import load_tokenizer, required_vocab_size, template_of


@dataclass(frozen=True)
class PrunePlan:
    config: PruneConfig
    """With every "auto" resolved, but for a dtype that is the model's own."""
    cut: PruningPlan
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template that rows go through, where they do."""
    data: AnyData | None
    """What is measured on; None where nothing is measured."""
    held_out: AnyData | None

    def __str__(self) -> str:
        """The resolved settings, what is cut, and what a run reads and writes, as YAML."""
        config = redact(self.config.model_dump(mode="json"))
        files = {"reads": self.reads(), "writes": self.writes()}
        return to_yaml({"config": config, "cut": self.cut.facts(), **files, "costs": self.costs()})

    def costs(self) -> dict[str, Any] | str:
        """Memory, arithmetic and time on the device of the run, and the smaller model's size; or why they are not
        told."""
        device = self.config.device
        return costs_here(
            loading.device_name(device), loading.device_memory(device),
            lambda hardware: costs(self.config, self._known(), hardware),
        )  # fmt: skip

    def _known(self) -> Headers:
        data, held_out = (self._documents(data) for data in (self.data, self.held_out))
        return dataclasses.replace(
            read_headers(self.config),
            num_tokens=None if data is None else float((data.lengths[: self.config.documents] - 1).sum()),
            num_held_out=None if held_out is None else float((held_out.lengths - 1).sum()),
        )

    def _documents(self, data: AnyData | None) -> Documents | None:
        """Those that are tokenised already."""
        if data is None or not is_local(data.path):
            return None
        return prepared(data, self.tokenizer, template=self.template)

    def reads(self) -> dict[str, str]:
        """The models and files that a run reads, by what they are for."""
        found = {"model": self.config.model}
        for name, data in (("data", self.data), ("held_out", self.held_out)):
            if data is not None:
                files = open_source(data).files if is_local(data.path) else []
                found[name] = ", ".join(map(str, files)) or f"{data.path} on the hub"
        return found

    def writes(self) -> dict[str, str]:
        """The files that a run writes, by what they are."""
        out, found = Path(self.config.out), {}
        for name, data in (("tokenised data", self.data), ("tokenised held-out data", self.held_out)):
            if data is not None and is_local(data.path):
                path = cache_path(data, self.tokenizer, self.template)
                found[name] = f"{path} ({'there already' if path.exists() else 'new'})"
        found |= {"run": str(out / "run.json"), "model": str(out / "model")}
        if out.exists():
            found["note"] = f"{out} exists: it needs --resume or --overwrite"
        return found


def make_plan(config: PruneConfig) -> PrunePlan:
    """Resolves and checks a config from headers alone.

    Raises:
        MissingError: a model, a tokenizer, a data file or a device is not there.
        MismatchError: the model cannot be cut so, or has no column for a token of its tokenizer.
        ConfigError: settings contradict what the headers say.
    """
    given, config = config, _resolve(config)
    own = loading.read_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    cut = plan_pruning(config, own, "model")
    if cut.measured and config.data is None:
        raise ConfigError(
            "there is no text to measure on",
            {"data": "null", "to be measured": _what(cut)},
            why="What matters to a model shows on text alone.",
            fix="Give `data`, such as data={path: text.jsonl, format: text, length: 1024}; or name the layers.",
        )
    if not cut.measured and config.data is not None and config.held_out is None:
        raise ConfigError(
            "nothing would read `data`",
            {"data.path": config.data.path, "to be measured": "nothing"},
            why="The layers are known without it, and there is no `held_out` that is read as it is.",
            fix="Leave `data` out, or give `held_out`.",
        )
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    template = None
    if config.data is not None:
        _check_data(config, given, own, tokenizer)
        template = _template(config, tokenizer)
    check_outside(
        config.out,
        {
            "model": config.model,
            "data.path": config.data.path if config.data else None,
            "held_out.path": config.held_out.path if config.held_out else None,
        },
    )
    plan = PrunePlan(config, cut, tokenizer, template, _measured_on(config, cut), config.held_out_data)
    for data in (plan.data, plan.held_out):
        if data is not None and is_local(data.path):
            open_source(data)  # which says where it is not there
    return plan


def _what(cut: PruningPlan) -> str:
    return "layers" if cut.layers is None else "heads and channels"


def _resolve(config: PruneConfig) -> PruneConfig:
    values: dict[str, object] = {"device": loading.resolve_device(config.device, "device")}
    if config.data is not None:
        values["data.cache"] = str(cache_folder(config.data))
        if config.batch_tokens == "auto":
            values["batch_tokens"] = max(config.data.length, BATCH_TOKENS)
    return replace(config, values)


def _check_data(
    config: PruneConfig, given: PruneConfig, own: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert config.data is not None
    loading.check_length(config.data.length, own, "model", format_setting(given, "data.length"))
    if required_vocab_size(tokenizer) > own.vocab_size:
        raise MismatchError(
            "the tokenizer has tokens that the model has no column for",
            {"tokenizer": f"{required_vocab_size(tokenizer)} tokens", "the model's head": f"{own.vocab_size} columns"},
            why="The model would read ids that it does not have.",
            fix="Put the tokenizer that the model was trained with into its folder.",
        )


def _template(config: PruneConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    assert config.data is not None
    if not needs_template(config.data):
        return None
    if (template := template_of(tokenizer)) is None:
        raise MissingError(
            "the tokenizer has no chat template",
            {"tokenizer": config.model, "data.format": config.data.format},
            why="Without one nobody knows how a conversation becomes text for the model.",
            fix="Give the tokenizer a chat_template.jinja, or use data.format=prompt_completion or text.",
        )
    return template


def _measured_on(config: PruneConfig, cut: PruningPlan) -> AnyData | None:
    """The data that are measured on: no more rows of them are read than documents are needed."""
    if config.data is None or not cut.measured:
        return None
    rows = min(config.documents, config.data.max_documents or config.documents)
    return replace(config.data, {"max_documents": rows, "shuffle": False})

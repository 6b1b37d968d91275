"""The plan of a cut: every "auto" resolved, everything checked that headers tell. Writes nothing."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stillroom.config import format_setting, is_local, replace
from stillroom.data.config import AnyData, cache_folder
from stillroom.data.dataset import prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError
from stillroom.estimates.headers import checkpoint_dtype
from stillroom.models import loading
from stillroom.models.safetensors_io import save_promise
from stillroom.prune.config import PruneConfig
from stillroom.prune.estimate import BATCH_TOKENS, costs, read_headers
from stillroom.pruning.plan import PruningPlan, plan_pruning
from stillroom.pruning.prune import promised_mask, write_mask
from stillroom.runs import check_outside
from stillroom.tokenizers import load_tokenizer
from stillroom.verbs import VerbPlan, check_vocabulary, costs_on, files_of, required_template, tokenized_file


@dataclass(frozen=True)
class PrunePlan(VerbPlan[PruneConfig]):
    """The plan of a cut. A dtype that is the model's own stays "auto" in its config."""

    cut: PruningPlan
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template that rows go through, where they do."""
    data: AnyData | None
    """The text that is measured on; None where nothing is measured."""
    held_out: AnyData | None
    batch_tokens: int
    """Tokens that go through the model at once."""

    def details(self) -> dict[str, Any]:
        return {"cut": self.cut.facts()}

    def costs(self) -> dict[str, Any] | str:
        data, held_out = (
            prepared(data, self.tokenizer, template=self.template) if data is not None and is_local(data.path) else None
            for data in (self.data, self.held_out)
        )
        headers = dataclasses.replace(
            read_headers(self.config),
            num_tokens=None if data is None else float((data.lengths[: self.config.documents] - 1).sum()),
            num_held_out=None if held_out is None else float((held_out.lengths - 1).sum()),
        )
        return costs_on(self.config.device, lambda hardware: costs(self.config, headers, hardware))

    def reads(self) -> dict[str, str]:
        named = (("data", self.data), ("held_out", self.held_out))
        return {"model": self.config.model, **{name: files_of(data) for name, data in named if data is not None}}

    def writes(self) -> dict[str, str]:
        named = (("tokenized data", self.data), ("tokenized held-out data", self.held_out))
        tokenized = {
            name: tokenized_file(data, self.tokenizer, self.template)
            for name, data in named
            if data is not None and is_local(data.path)
        }
        out = Path(self.config.out)
        return {**tokenized, "run": str(out / "run.json"), "model": str(out / "model")}

    def promise(self, folder: Path) -> None:
        config, folder = self.config, folder / "model"
        name = config.dtype
        if name == "auto":
            name = checkpoint_dtype(self.cut.teacher, config.model, config.revision)
        dtype = getattr(torch, name)
        save_promise(loading.build_meta_model(self.cut.config, dtype=dtype), folder, dtype)
        self.tokenizer.save_pretrained(folder)
        write_mask(folder, promised_mask(self.cut, loading.fingerprint(config.model, self.cut.teacher)))


def make_plan(config: PruneConfig) -> PrunePlan:
    """Resolves and checks a config from headers alone.

    Raises MissingError where a model, a tokenizer, a data file or a device is not there; MismatchError where the model
    cannot be cut so, or has no column for a token of its tokenizer; ConfigError where settings contradict what the
    headers say.
    """
    given, values, batch_tokens = config, dict[str, object](), config.batch_tokens
    values["device"] = loading.resolve_device(config.device, "device")
    if batch_tokens == "auto":
        batch_tokens = BATCH_TOKENS if config.data is None else max(config.data.length, BATCH_TOKENS)
    if config.data is not None:
        values |= {"data.cache": str(cache_folder(config.data)), "batch_tokens": batch_tokens}
        if config.held_out is not None:
            values["data.hash_range"] = config.held_out.rest(config.data).hash_range
    config = replace(config, values)
    own = loading.read_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    cut = plan_pruning(config, own, "model")
    _check_text(config.data, config.held_out_data, cut)
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    template = measured_on = None
    if config.data is not None:
        loading.check_length(config.data.length, own, "model", format_setting(given, "data.length"))
        fix = "Put the tokenizer that the model was trained with into its folder."
        check_vocabulary(tokenizer, own, "the model", tokenizer_name=config.model, fix=fix)
        if needs_template(config.data):
            template = required_template(tokenizer, config.data, tokenizer_name=config.model)
        if cut.measured:  # no more rows are read than documents are needed
            rows = min(config.documents, config.data.max_documents or config.documents)
            measured_on = replace(config.data, {"max_documents": rows, "shuffle": False})
    named = {"data.path": config.data, "held_out.path": config.held_out}
    paths = {name: None if data is None else data.path for name, data in named.items()}
    check_outside(config.out, {"model": config.model, **paths})
    plan = PrunePlan(config, cut, tokenizer, template, measured_on, config.held_out_data, batch_tokens)
    for data in (plan.data, plan.held_out):
        if data is not None and is_local(data.path):
            open_source(data)  # which says where it is not there
    return plan


def _check_text(data: AnyData | None, held_out: AnyData | None, cut: PruningPlan) -> None:
    """Returns where there is text to measure on if something is measured, and none that nothing would read."""
    if cut.measured and data is None:
        raise ConfigError(
            "there is no text to measure on",
            {"data": "null", "to be measured": "layers" if cut.layers is None else "heads and channels"},
            why="What matters to a model shows on text alone.",
            fix="Give `data`, such as data={path: text.jsonl, format: text, length: 1024}; or name the layers.",
        )
    if not cut.measured and data is not None and held_out is None:
        raise ConfigError(
            "nothing would read `data`",
            {"data.path": data.path, "to be measured": "nothing"},
            why="The layers are known without it, and there is no `held_out` that is read as it is.",
            fix="Leave `data` out, or give `held_out`.",
        )

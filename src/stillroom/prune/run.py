"""`stillroom prune`: model -> smaller model."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.batch import Batch
from stillroom.data.config import AnyData
from stillroom.data.dataset import Documents, prepare
from stillroom.errors import OutOfMemoryError
from stillroom.models import loading
from stillroom.models.hidden_states import verify
from stillroom.models.safetensors_io import new_model_folder
from stillroom.prune.config import PruneConfig
from stillroom.prune.plan import PrunePlan, make_plan
from stillroom.pruning.importance import loss_nats, text_batches
from stillroom.pruning.prune import choose_mask, prune_model, report, write_mask
from stillroom.runs import RunFolder, check_place
from stillroom.tokenizers import fingerprint, template_fingerprint
from stillroom.verbs import Report, recorded

FREE_TO_CHANGE = ("out", "data.cache", "device", "batch_tokens")
"""Settings that change nothing of what is chosen, but for rounding."""


def run(
    config: PruneConfig, *, resume: bool = False, overwrite: bool = False, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Cuts the model and writes ``out/model``; returns what run.json says.

    Args:
        resume: where the run in ``out`` is done, say so; else do it from its beginning.
        overwrite: delete what is in ``out`` first.
        report: is told of what is done.

    Raises:
        StillroomError: something that the user can mend.
        KeyboardInterrupt: Ctrl-C; no model was written.
    """
    check_place(config.out, may_exist=resume or overwrite)
    plan = make_plan(config)
    settings = plan.config.model_dump(mode="json")
    folder = RunFolder(config.out, settings, resume=resume, overwrite=overwrite, free=FREE_TO_CHANGE)
    with folder:
        if folder.done:
            report("note", {"text": f"the cut in {folder.path} is done already"})
            return folder.record
        try:
            with recorded(folder):
                _prune(plan, folder, report)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                "the device has too little memory to measure the model",
                {"batch_tokens": plan.config.batch_tokens, "device": str(error).split(". ")[0][:160]},
                why="The model and what its layers give out must fit.",
                fix="Lower batch_tokens, or set dtype=bfloat16 or device=cpu, and go on with --resume.",
            ) from error
        return folder.record


def _prune(plan: PrunePlan, folder: RunFolder, say: Report) -> None:
    start, config, data = time.monotonic(), plan.config, plan.config.data

    def note(text: str) -> None:
        say("note", {"text": text})

    def read(data: AnyData) -> Documents:
        return prepare(
            data,
            plan.tokenizer,
            template=plan.template,
            report=lambda rows: say("tokenise", {"rows": rows, "path": data.path}),
        )

    named = {"data": plan.data, "held_out_data": plan.held_out}
    texts = {key: read(text) for key, text in named.items() if text is not None}
    model = loading.load_model(
        config.model,
        dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    verify(model, "the model", pack=data is not None and data.pack)
    facts = _facts(config.model, model, plan.tokenizer, plan.template, texts)
    folder.update(status="started", **facts)

    def batches(documents: Documents, number: int | None = None) -> Iterator[Batch]:
        assert data is not None
        pad: Any = plan.tokenizer.pad_token_id
        form = {"length": data.length, "pack": data.pack, "batch_tokens": plan.batch_tokens, "pad_token": pad}
        return text_batches(documents, number=number, **form)

    def losses(model: PreTrainedModel) -> list[tuple[float, int]]:
        return [loss_nats(model, batches(text)) for key, text in texts.items() if key == "held_out_data"]

    measured_on = []
    if "data" in texts:
        measured_on = list(batches(texts["data"], config.documents))
        note(f"measuring on {min(config.documents, len(texts['data']))} documents")
    mask = choose_mask(plan.cut, model, measured_on, teacher=facts["model"]["fingerprint"], say=note)
    before, of_model = loading.num_parameters(model), losses(model)
    smaller = prune_model(model, mask, plan.cut)
    del model
    of_smaller = losses(smaller)
    after = loading.num_parameters(smaller)
    note(f"writing {folder.path / 'model'}")
    with new_model_folder(folder.path / "model") as place:
        smaller.save_pretrained(place)
        plan.tokenizer.save_pretrained(place)
        write_mask(place, mask)
    results: dict[str, Any] = {
        "cut": {"layers": list(mask.layers), "num_parameters": after},
        "report": report(mask, plan.cut, before, after),
        "time_s": round(time.monotonic() - start, 3),
    }
    for (whole, num_tokens), (left, _) in zip(of_model, of_smaller, strict=True):
        found = {"model_cross_entropy_nats": whole, "cut_cross_entropy_nats": left, "num_tokens": num_tokens}
        results["held_out"] = found
    folder.update(status="done", **results)


def _facts(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    texts: Mapping[str, Documents],
) -> dict[str, Any]:
    """Returns what run.json says of the things that went in."""
    number = loading.num_parameters(model)
    return {
        "model": {"fingerprint": loading.fingerprint(name, model.config), "num_parameters": number},
        "tokenizer": {"fingerprint": fingerprint(tokenizer)},
        **{key: {"fingerprint": text.fingerprint, **text.counts} for key, text in texts.items()},
        **({} if template is None else {"template": {"fingerprint": template_fingerprint(template)}}),
    }

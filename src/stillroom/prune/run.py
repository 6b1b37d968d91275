"""`stillroom prune`: model -> smaller model."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel

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
    start, config = time.monotonic(), plan.config

    def note(text: str) -> None:
        say("note", {"text": text})

    documents, held_out = (None if data is None else _prepare(data, plan, say) for data in (plan.data, plan.held_out))
    model = loading.load_model(
        config.model,
        dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    verify(model, "the model", pack=config.data is not None and config.data.pack)
    facts = _facts(plan, model, documents, held_out)
    folder.update(status="started", **facts)
    batches = []
    if documents is not None:
        batches = list(_batches(plan, documents, config.documents))
        note(f"measuring on {min(config.documents, len(documents))} documents")
    cut = choose_mask(plan.cut, model, batches, teacher=facts["model"]["fingerprint"], say=note)
    before = loading.num_parameters(model)
    losses = {"model": _loss(plan, model, held_out)}
    smaller = prune_model(model, cut, plan.cut)
    del model
    losses["cut"] = _loss(plan, smaller, held_out)
    after = loading.num_parameters(smaller)
    note(f"writing {folder.path / 'model'}")
    with new_model_folder(folder.path / "model") as place:
        smaller.save_pretrained(place)
        plan.tokenizer.save_pretrained(place)
        write_mask(place, cut)
    results: dict[str, Any] = {
        "cut": {"layers": list(cut.layers), "num_parameters": after},
        "report": report(cut, plan.cut, before, after),
        "time_s": round(time.monotonic() - start, 3),
    }
    if losses["model"] is not None and losses["cut"] is not None:
        (whole, num_tokens), (left, _) = losses["model"], losses["cut"]
        found = {"model_cross_entropy_nats": whole, "cut_cross_entropy_nats": left, "num_tokens": num_tokens}
        results["held_out"] = found
    folder.update(status="done", **results)


def _prepare(data: AnyData, plan: PrunePlan, say: Report) -> Documents:
    return prepare(
        data,
        plan.tokenizer,
        template=plan.template,
        report=lambda rows: say("tokenise", {"rows": rows, "path": data.path}),
    )


def _batches(plan: PrunePlan, documents: Documents, number: int | None = None):
    data = plan.config.data
    assert data is not None
    return text_batches(
        documents,
        number=number,
        length=data.length,
        pack=data.pack,
        batch_tokens=plan.batch_tokens,
        pad_token=plan.tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )


def _loss(plan: PrunePlan, model: PreTrainedModel, held_out: Documents | None) -> tuple[float, int] | None:
    return None if held_out is None else loss_nats(model, _batches(plan, held_out))


def _facts(
    plan: PrunePlan, model: PreTrainedModel, data: Documents | None, held_out: Documents | None
) -> dict[str, Any]:
    """What run.json says of the things that went in."""
    name = plan.config.model
    facts: dict[str, Any] = {
        "model": {
            "fingerprint": loading.fingerprint(name, model.config),
            "num_parameters": loading.num_parameters(model),
        },
        "tokenizer": {"fingerprint": fingerprint(plan.tokenizer)},
    }
    for key, documents in (("data", data), ("held_out_data", held_out)):
        if documents is not None:
            facts[key] = {"fingerprint": documents.fingerprint, **documents.counts}
    if plan.template is not None:
        facts["template"] = {"fingerprint": template_fingerprint(plan.template)}
    return facts

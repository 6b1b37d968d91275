"""The cut of a student that starts as a part of its teacher: chosen once, and remembered in the run's folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from stillroom.data.dataloader import DocumentSet
from stillroom.distill.plan import DistillPlan
from stillroom.errors import MismatchError
from stillroom.models import loading
from stillroom.pruning.importance import text_batches
from stillroom.pruning.prune import CUT_FILE, PruneMask, choose_mask, prune_model, read_mask, report
from stillroom.runs import write_json


def prune_student(
    plan: DistillPlan,
    teacher: PreTrainedModel | None,
    documents: DocumentSet,
    folder: Path,
    say: Callable[[str], object],
) -> tuple[PreTrainedModel, PruneMask]:
    """The student as a part of its teacher, in float32 on the CPU, and what was kept.

    Args:
        teacher: the live teacher, if it is loaded: it is what is measured, where it is what the student is cut from.
        documents: those that are trained on; the first of them are measured on.
        folder: the run's, which remembers what was chosen: a resumed run has the same student.
        say: is told what is found.

    Raises:
        MismatchError: the run began with a part of another model.
    """
    source, cut_plan = plan.cut_from, plan.cut
    assert source is not None
    assert cut_plan is not None
    student = plan.config.student
    fingerprint = loading.fingerprint(source, cut_plan.teacher)
    whole: Any = loading.load_model(
        source, dtype="auto", revision=_revision(plan), trust_remote_code=student.trust_remote_code
    )
    cut = read_mask(folder)
    if cut is not None and cut.teacher != fingerprint:
        raise MismatchError(
            f"the run in {folder} began with a part of another model",
            {"then": cut.teacher, "now": fingerprint},
            why="What lies there has changed, so the run would be half of one thing and half of another.",
            fix="Put back what was there, or choose another `out`.",
        )
    if cut is None:
        of_its_own = teacher is None or getattr(student.init, "model", None) is not None
        measured: Any = whole if of_its_own else teacher
        cut = choose_mask(
            cut_plan, measured.to(plan.config.device), _batches(plan, documents), teacher=fingerprint, say=say
        )
        write_json(folder / CUT_FILE, cut.to_json())
    part = prune_model(whole, cut, cut_plan).cpu().float()  # pyright: ignore[reportArgumentType]
    say(f"the student is a part of {source}\n" + report(cut, cut_plan, *map(loading.num_parameters, (whole, part))))
    return part, cut


def _revision(plan: DistillPlan) -> str | None:
    """Returns the revision of the model that the student is pruned from."""
    teacher, init = plan.config.teacher, plan.config.student.init
    return getattr(teacher, "revision", None) if getattr(init, "model", None) is None else plan.config.student.revision


def _batches(plan: DistillPlan, documents: DocumentSet) -> list:
    config, cut = plan.config, plan.cut
    assert cut is not None
    if not cut.measured:
        return []
    return list(
        text_batches(
            documents,
            number=cut.cut.documents,
            length=plan.length,
            pack=config.data.pack,
            batch_tokens=plan.micro_tokens,
            pad_token=plan.tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        )
    )

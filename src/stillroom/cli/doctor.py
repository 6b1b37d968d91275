"""``stillroom doctor``."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stillroom.cli.arguments import Arguments, first_key, import_all, refuse_flags
from stillroom.config import explain, load
from stillroom.distill.config import DistillConfig
from stillroom.doctor.findings import Finding, TaskTexts
from stillroom.doctor.run import DoctorConfig, run
from stillroom.terminal import redact, say

USAGE = """\
usage: stillroom doctor [RECIPE.yaml] [key=value …]

Looks at a run of `stillroom distill` before it is paid for: how tokenizers, chat templates and vocabularies fit; how
many tokens are learned; how far the student is from its teacher; whether the data hold what the student will be asked;
and one real optimizer step on the longest rows, so that a lack of memory shows now. Nothing is written. It ends with a
verdict, and exit code 0, or 2 where something is to be changed.

--json prints all of it as JSON. Every setting of `stillroom distill` may be given besides these:

settings"""

Row = tuple[str, str]


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        say(f"{USAGE}\n{explain(DoctorConfig)}")
        return 0
    refuse_flags(
        "doctor",
        arguments.flags,
        ("json", "quiet", "debug", "help"),
        "It writes nothing that could be planned, resumed or overwritten.",
    )
    own = [word for word in arguments.overrides if first_key(word) in DoctorConfig.model_fields]
    config = load(DoctorConfig, None, own)
    recipe = load(DistillConfig, arguments.recipe, [word for word in arguments.overrides if word not in own])

    preflight = import_all("stillroom.distill.preflight")

    from stillroom.cli.progress import Progress
    from stillroom.models.loading import quiet

    quiet()
    try:
        with Progress(quiet="quiet" in arguments.flags) as progress:
            record = run(config, preflight.Preflight(recipe, config.sequences, progress), items_of, progress)
    except KeyboardInterrupt:
        say("\ninterrupted; nothing was written", error=True)
        return 130
    say(json.dumps(redact(record), indent=1) if "json" in arguments.flags else as_text(record))
    return 0 if record["ready"] else 2


def items_of(path: str) -> tuple[str, Iterable[TaskTexts]]:
    """Returns the name of the task that a file describes, and its items as texts: each question with each answer."""
    from stillroom.evaluate.config import LocalTask, read_description
    from stillroom.evaluate.tasks.local import questions

    description = read_description(LocalTask(kind="local", path=path))
    found = questions(description)
    answers = [(one, one.labels or one.answers or ("",)) for one in found]
    return description.name, [TaskTexts(one.id, [f"{one.shown} {text}" for text in texts]) for one, texts in answers]


# --- as text ---------------------------------------------------------------------------------------------------------


def as_text(record: Mapping[str, Any]) -> str:
    """Returns what was found as an aligned table, then each finding in full, then the verdict."""
    rows = [*_rows_of_data(record), *_rows_of_models(record)]
    width = max((len(title) for title, _ in rows), default=0)
    table = "\n".join(f"{title:{width}}  {text}" for title, text in rows)
    blocks = [table, *(str(Finding(**finding)) for finding in record["findings"]), record["verdict"]]
    return "\n\n".join(filter(None, blocks))


LOST = {
    "cut": "cut after data.length",
    "dropped_overlong": "left out as too long",
    "dropped_empty": "left out with nothing to learn",
    "dropped_cut_away": "left out, all to learn lay beyond the cut",
}
STUDENTS = {"new": "random weights", "part": "a part of its teacher, untrained", "trained": "a trained model"}


def _rows_of_data(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yields what is told before a model is loaded."""
    if (fit := record["fit"]) is not None:
        yield "tokenizer", f"{fit['num_tokens']:,} tokens, fingerprint {fit['tokenizer'][:16]}"
        yield "chat template", "none: rows go through none" if fit["template"] is None else fit["template"][:16]
        whose = {"student": "student_columns", "teacher": "teacher_columns", "store": "stored_columns"}
        widths = ", ".join(f"{who} {fit[key]:,}" for who, key in whose.items() if fit[key] is not None)
        yield "vocabulary", f"{fit['columns']:,} columns compared ({widths})"
        yield "device", fit["device"]
    if (data := record["data"]) is not None:
        if "rows" in data:
            which = "all of them" if data["whole"] else "the first; the rest is tokenized by the run"
            yield "rows", f"{data['rows']:,} ({which}), which make {data['documents']:,} documents"
            lost = [f"{data[name]:,} {text}" for name, text in LOST.items() if data[name]]
            split = [f"{data['split']:,} split into several"] if data["split"] else []
            yield "rows lost", ", ".join([*(lost or ["none"]), *split])
        else:
            yield "documents", f"{data['documents']:,} in the store"
        learned, tokens, documents = data["tokens_learnt"], data["tokens"], data["documents"]
        others = tokens - documents - learned
        yield "tokens learned", f"{learned:,} of {tokens:,} ({learned / tokens:.1%})"
        yield "not learned", f"{documents:,} begin a document, {others:,} are of prompts and the like"
        yield "looked at", f"{data['looked_at']:,} documents, drawn by the seed"
    if (overlap := record["overlap"]) is not None:
        number, shared = overlap["num_documents"], overlap["num_shared"]
        share = f"{shared:,} of {number:,} documents ({shared / number:.1%})"
        yield "in the tasks", f"{share} share 13 words in a row with an item"
        for task, items in overlap["num_items"].items():
            short = overlap["num_short"][task]
            too_short = f"; {short:,} are too short to tell" if short else ""
            yield "", f"{task}: {overlap['num_items_shared'][task]:,} of {items:,} items found{too_short}"


def _rows_of_models(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yields what is measured of the models, and of a step."""
    if (measured := record["measures"]) is not None:
        kind, number, trained = (measured[key] for key in ("student", "student_parameters", "student_trained"))
        some = "all" if trained == number else f"{trained:,}"
        yield "student", f"{number:,} parameters, {some} of them trained; {STUDENTS[kind]}"
        if (of_teacher := measured["teacher_parameters"]) is not None:
            yield "teacher", f"{of_teacher:,} parameters"
        keys = {"teacher": "teacher_cross_entropy_nats", "student": "cross_entropy_nats"}
        losses = {who: measured[key] for who, key in keys.items() if key in measured}
        both = ", ".join(f"{who} {'not finite' if x is None else f'{x:.4f}'}" for who, x in losses.items())
        yield "cross-entropy", f"{both} nats a token, over {measured['num_tokens']:,} tokens"
        if kind == "trained" and len(losses) == 2 and all(losses.values()):
            yield "loss ratio", f"{losses['teacher'] / losses['student']:.3f}, teacher's over student's"
        for key, title, form in (
            ("forward_kl_nats", "KL to teacher", "{:.4f} nats a token"),
            ("top1_agreement", "same top token", "{:.1%}"),
            ("accepted_mass", "accepted mass", "{:.1%}"),
        ):
            if measured.get(key) is not None:
                yield title, form.format(measured[key])
    if (own := record["own_text"]) is not None:
        nats, number = own["reverse_kl_nats"], own["num_tokens"]
        yield "its own text", f"KL from teacher {nats:.4f} nats a token, over {number:,} that the student wrote"
        yield "", "(reported of runs that learn from such text: near 0.04 at the start went well, 0.19 collapsed)"
    if (step := record["step"]) is not None:
        micro_batches = f"{step['micro_batches']:,} micro-batch{'es' * (step['micro_batches'] > 1)}"
        yield "one step", f"{step['rows']:,} rows of up to {step['longest_row']:,} tokens, in {micro_batches}"
        yield "", f"loss {step['loss_nats']:.4f} nats, gradient norm {step['grad_norm']:.4f}"
        whole = "how many steps the epochs make is known once the data are tokenized"
        if (number := step["num_steps"]) is not None:
            minutes = number * step["time_s"] / 60
            about = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
            whole = f"{number:,} steps in about {about}"
        yield "its time", f"{step['time_s']:.2f} s ({step['num_tokens'] / step['time_s']:,.0f} tokens/s); {whole}"
        peak, there = step["peak_memory_bytes"], step["memory_bytes"]
        of = " of this process" if there is None else f" of {there / 2**30:.2f} GiB on the device"
        yield "peak memory", f"{peak / 2**30:.2f} GiB{of}"

"""Reading: every model reads the held-out text, and what it makes of it becomes metrics."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from stillroom.data.dataset import CountedDocuments
from stillroom.evaluate.breakdowns import breakdowns, worst_passages
from stillroom.evaluate.config import EvaluateConfig
from stillroom.evaluate.metrics import Measured, Units, differences, measure, no_gap, units_of
from stillroom.evaluate.plan import NO_DISTRIBUTION, EvaluatePlan, ModelReader
from stillroom.evaluate.results import Breakdown, Difference, Number, Passage, Text
from stillroom.evaluate.scoring import Limits, Predicted, Scores, batches, enough_memory, score
from stillroom.evaluate.speed import Speed, measure_speed
from stillroom.models.loading import rope_border
from stillroom.runs import redact
from stillroom.tokenizers import fingerprint

Report = Callable[[str, Mapping[str, Any]], None]

BESIDE_THE_TEACHER = (
    "forward_kl_nats", "forward_kl_p95_nats", "reverse_kl_nats", "reverse_kl_p95_nats", "top1_agreement",
    "top10_overlap", "accepted_mass", "speculative_tokens", "entropy_ratio",
)  # fmt: skip
"""The metrics that compare a model with the teacher, token by token."""

ALONE = ("cross_entropy_nats", "perplexity", "bits_per_byte", "entropy_nats", "calibration_error")


@dataclass(frozen=True)
class Read:
    """What came out of one model's reading."""

    reader: ModelReader
    predicted: Predicted
    units: Units
    num_bytes: np.ndarray | None
    scores: Scores
    speed: Speed


@dataclass(frozen=True)
class TextMetrics:
    """All that the reading of a text tells; the fields are those of the results."""

    text: Text
    metrics: dict[str, dict[str, Number]]
    refused: dict[str, dict[str, str]]
    differences: tuple[Difference, ...]
    breakdowns: tuple[Breakdown, ...]
    worst: dict[str, tuple[Passage, ...]]
    speeds: dict[str, Speed]


class HeldOutEval:
    """The text as it is read by one model after the other: by the teacher first, and by those with the teacher's
    tokenizer beside the teacher, which stays in memory."""

    def __init__(self, plan: EvaluatePlan, report: Report) -> None:
        self.plan, self.report = plan, report
        self.reads: list[Read] = []
        self._texts = _texts(plan, report)
        self._total, self._done = sum(len(predicted) for predicted, _ in self._texts.values()), 0
        self._teacher: PreTrainedModel | None = None

    def read(self, reader: ModelReader, model: PreTrainedModel) -> None:
        """One pass, and before it the measuring of the model's speed."""
        predicted, units = self._texts[reader.name]
        beside = None if reader.unlike is not None else self._teacher
        borders = {b for b in (rope_border(m.config) for m in (model, beside) if m is not None) if b is not None}
        limits, some = _limits(self.plan.config), partial(_batches, self.plan.config, reader, predicted, borders)
        with enough_memory(limits):
            speed = measure_speed(model, some(), limits, columns=reader.columns)
        counted = _Counted(self.report, reader.name, self._done, self._total)
        scores = score(
            model, reader.name, predicted, some(), limits, columns=reader.columns, teacher=beside, report=counted
        )
        self._done += len(predicted)
        self.reads.append(Read(reader, predicted, units, predicted.num_bytes(), scores, speed))
        if reader.name == self.plan.config.teacher:
            self._teacher = model


def summarise(plan: EvaluatePlan, reads: list[Read]) -> TextMetrics:
    """Metrics, differences, breakdowns and worst passages of what was read."""
    config = plan.config
    of = {read.reader.name: read for read in reads}
    alike = [name for name in of if of[name].reader.unlike is None]
    teacher = of.get(config.teacher or "")
    baseline = of[config.baseline] if config.baseline in alike else None
    refused = {name: _refused(plan, of.get(name), reads[0]) for name in config.models}
    measured: dict[str, Measured] = {}
    for name in (name for name in config.models if name in of):
        read = of[name]
        beside = teacher if name in alike and read is not teacher else None
        to_beat = None if baseline is None or read is baseline else baseline
        measured[name] = measure(
            read.scores,
            read.units,
            config.seed,
            num_bytes=None if "bits_per_byte" in refused[name] else read.num_bytes,
            teacher=beside and beside.scores,
            baseline=to_beat and to_beat.scores,
        )
    metrics = {name: dict(one.numbers) for name, one in measured.items()}
    _check_gap(config, measured, metrics, refused)
    for name, numbers in metrics.items():
        for metric in [metric for metric, number in numbers.items() if not np.isfinite(number.value)]:
            refused[name][metric] = "it is beyond the largest number"
            del numbers[metric]
    students = {
        name: of[name].scores["forward_kl"] for name in config.models if "forward_kl_nats" in metrics.get(name, {})
    }
    return TextMetrics(
        _text(config, reads[0]),
        metrics,
        {name: why for name, why in refused.items() if why},
        tuple(differences(measured, alike)),
        breakdowns(teacher.predicted, teacher.scores["entropy"], students) if teacher and students else (),
        {name: worst_passages(of[name].predicted, kl, of[name].reader.tokenizer) for name, kl in students.items()},
        {name: read.speed for name, read in of.items()},
    )


def _texts(plan: EvaluatePlan, report: Report) -> dict[str, tuple[Predicted, Units]]:
    """By model, the text in its tokens; models with one tokenizer share one."""
    data = plan.config.data
    assert data is not None
    known: dict[tuple[str, str | None], tuple[Predicted, Units]] = {}
    found = {}
    for reader in plan.readers:
        key = fingerprint(reader.tokenizer), reader.template
        if key not in known:
            documents = CountedDocuments(
                data,
                reader.tokenizer,
                template=reader.template,
                report=lambda rows: report("tokenise", {"rows": rows, "path": data.path}),
            )
            predicted = Predicted(documents)
            known[key] = predicted, units_of(predicted)
        found[reader.name] = known[key]
    return found


def _limits(config: EvaluateConfig) -> Limits:
    assert config.batch_tokens != "auto"
    assert config.logits_bytes != "auto"
    return Limits(config.batch_tokens, config.logits_bytes, config.device)


def _batches(config: EvaluateConfig, reader: ModelReader, predicted: Predicted, borders: Collection[int]):
    data, pad = config.data, reader.tokenizer.pad_token_id
    assert data is not None
    assert config.batch_tokens != "auto"
    return batches(
        predicted.documents,
        length=data.length,
        pack=data.pack,
        most=config.batch_tokens,
        pad_token=pad if isinstance(pad, int) else 0,
        borders=borders,
    )


class _Counted:
    """Tells how many predicted tokens all models together have done."""

    def __init__(self, report: Report, name: str, before: int, total: int) -> None:
        self.report, self.name, self.done, self.total = report, name, before, total

    def __call__(self, number: int) -> None:
        self.done += number
        self.report("score", {"model": self.name, "done": self.done, "total": self.total})


def _text(config: EvaluateConfig, read: Read) -> Text:
    assert config.data is not None
    documents = read.predicted.documents
    return Text(
        name=str(redact(config.data.path)),
        fingerprint=documents.fingerprint,
        num_documents=len(np.unique(documents.rows)),
        num_tokens=len(read.predicted),
        num_bytes=None if read.num_bytes is None else int(read.num_bytes.sum()),
    )


def _refused(plan: EvaluatePlan, read: Read | None, first: Read) -> dict[str, str]:
    """By metric, why a model does not have it, as far as no number is needed to tell."""
    config = plan.config
    if read is None:
        return dict.fromkeys((*ALONE, *BESIDE_THE_TEACHER, "recovered_gap"), NO_DISTRIBUTION)
    name = read.reader.name
    why: dict[str, str] = {}
    if name != config.teacher:
        reason = plan.not_beside_teacher(read.reader)
        if reason is not None:
            why |= dict.fromkeys((*BESIDE_THE_TEACHER, "recovered_gap"), reason)
    reason = _no_bytes(config, read, first)
    return why if reason is None else {**why, "bits_per_byte": reason}


def _no_bytes(config: EvaluateConfig, read: Read, first: Read) -> str | None:
    """Why a model's bits per byte would not mean what another's do."""
    tokenizer, predicted = read.reader.tokenizer, read.predicted
    if read.num_bytes is None:
        return "its tokenizer drops characters of the text, so its tokens do not stand for all of it"
    unknown = tokenizer.unk_token_id
    if isinstance(unknown, int) and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        number = int((predicted.tokens == unknown).sum())
        if number:
            return f"{number:,} of its tokens are {tokenizer.unk_token}, which may stand for any text"
    if not read.num_bytes.sum():
        return "its predicted tokens stand for no text"
    lost = ("cut", "dropped_overlong", "dropped_cut_away")
    if config.cuts and read.reader.unlike and any(r.predicted.documents.counts[k] for r in (read, first) for k in lost):
        return "long documents lose text, and another part of it by its tokenizer than by that of the others"
    return None


def _check_gap(
    config: EvaluateConfig,
    measured: Mapping[str, Measured],
    metrics: dict[str, dict[str, Number]],
    refused: dict[str, dict[str, str]],
) -> None:
    """Takes back every recovered gap, and says why, where there is none to recover."""
    teacher, baseline = config.teacher, config.baseline
    if teacher is None or teacher not in measured:
        return
    if baseline is None or baseline not in measured:
        reason = "no model is said to be the baseline" if baseline is None else f"{baseline} does not run here"
    elif "recovered_gap" in refused[baseline]:
        reason = f"of {baseline}, {refused[baseline]['recovered_gap']}"
    else:
        reason = no_gap(measured[teacher], measured[baseline])
    for name, numbers in metrics.items():
        if reason is not None and name not in (teacher, baseline):
            numbers.pop("recovered_gap", None)
            refused[name].setdefault("recovered_gap", reason)

"""The held-out evaluation: every model scores the text, and the scores become metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from stillroom.data.config import DataConfig
from stillroom.data.dataset import CountedDocuments
from stillroom.evaluate.metrics import (
    Measured,
    Units,
    breakdowns,
    differences,
    measure,
    no_gap,
    units_of,
    worst_passages,
)
from stillroom.evaluate.plan import NO_DISTRIBUTION, LocalModel
from stillroom.evaluate.results import Text
from stillroom.evaluate.scoring import Limits, Predicted, Scores, Speed, batches, enough_memory, measure_speed, score
from stillroom.models.loading import rope_border
from stillroom.runs import redact
from stillroom.tokenizers import fingerprint
from stillroom.verbs import Report

BESIDE_THE_TEACHER = (
    "forward_kl_nats", "forward_kl_p95_nats", "reverse_kl_nats", "reverse_kl_p95_nats", "top1_agreement",
    "top10_overlap", "accepted_mass", "speculative_tokens", "entropy_ratio",
)  # fmt: skip
"""The metrics that compare a model with the teacher, token by token."""
ALONE = ("cross_entropy_nats", "perplexity", "bits_per_byte", "entropy_nats", "calibration_error")


@dataclass(frozen=True)
class ModelOutput:
    """The scores of one model on the text."""

    model: LocalModel
    predicted: Predicted
    units: Units
    num_bytes: np.ndarray | None
    scores: Scores
    speed: Speed


class HeldOutEval:
    """One model after the other scores the text: the teacher first, and those with the teacher's tokenizer beside the
    teacher, which stays in memory."""

    def __init__(
        self, data: DataConfig, models: Sequence[LocalModel], teacher: str | None, limits: Limits, report: Report
    ) -> None:
        self.data, self.teacher, self.limits, self.report = data, teacher, limits, report
        self.outputs: list[ModelOutput] = []
        self._texts: dict[str, tuple[Predicted, Units]] = {}
        known: dict[tuple[str, str | None], tuple[Predicted, Units]] = {}  # models with one tokenizer share one text
        for model in models:
            key = fingerprint(model.tokenizer), model.template
            if key not in known:
                documents = CountedDocuments(
                    data,
                    model.tokenizer,
                    template=model.template,
                    report=lambda rows: report("tokenise", {"rows": rows, "path": data.path}),
                )
                predicted = Predicted(documents)
                known[key] = predicted, units_of(predicted)
            self._texts[model.name] = known[key]
        self._total, self._done = sum(len(predicted) for predicted, _ in self._texts.values()), 0
        self._beside: PreTrainedModel | None = None

    def score(self, local: LocalModel, model: PreTrainedModel) -> None:
        """Makes one pass over the text, and before it measures the model's speed."""
        predicted, units = self._texts[local.name]
        beside = None if local.mismatch is not None else self._beside
        borders = {b for b in (rope_border(m.config) for m in (model, beside) if m is not None) if b is not None}
        pad = local.tokenizer.pad_token_id
        text = partial(
            batches,
            predicted.documents,
            length=self.data.length,
            pack=self.data.pack,
            most=self.limits.batch_tokens,
            pad_token=pad if isinstance(pad, int) else 0,
            borders=borders,
        )
        with enough_memory(self.limits):
            speed = measure_speed(model, text(), self.limits, vocab_size=local.vocab_size)

        def report(number: int) -> None:
            self._done += number
            self.report("score", {"model": local.name, "done": self._done, "total": self._total})

        scores = score(
            model,
            local.name,
            predicted,
            text(),
            self.limits,
            vocab_size=local.vocab_size,
            teacher=beside,
            report=report,
        )
        self.outputs.append(ModelOutput(local, predicted, units, predicted.num_bytes(), scores, speed))
        if local.name == self.teacher:
            self._beside = model

    def text(self) -> Text:
        """The text as the first model reads it."""
        first = self.outputs[0]
        return Text(
            name=str(redact(self.data.path)),
            fingerprint=first.predicted.documents.fingerprint,
            num_documents=len(np.unique(first.predicted.documents.source_rows)),
            num_tokens=len(first.predicted),
            num_bytes=None if first.num_bytes is None else int(first.num_bytes.sum()),
        )

    def summary(
        self,
        names: Sequence[str],
        not_compared: Mapping[str, str | None],
        *,
        baseline: str | None,
        cuts: bool,
        seed: int,
    ) -> dict[str, Any]:
        """Metrics, differences, breakdowns and worst passages of the text, by the names of the results, once at least
        one model has scored it.

        Args:
            names: all models in order, those behind an address too.
            not_compared: the reason by model why it is not compared with the teacher token by token, or None.
            baseline: the baseline's name, where there is one.
            cuts: whether a long document loses text, and the tokenizer decides where.
            seed: the seed of the bootstrap.
        """
        teacher = self.teacher
        by_name, first = {one.model.name: one for one in self.outputs}, self.outputs[0]
        alike = [name for name in by_name if by_name[name].model.mismatch is None]
        every = (*ALONE, *BESIDE_THE_TEACHER, "recovered_gap")
        refused: dict[str, dict[str, str]] = {name: dict.fromkeys(every, NO_DISTRIBUTION) for name in names}
        for name, output in by_name.items():
            refused[name], reason = {}, not_compared[name]
            if name != teacher and reason is not None:
                refused[name] |= dict.fromkeys((*BESIDE_THE_TEACHER, "recovered_gap"), reason)
            if (reason := _no_bytes(output, first, cuts)) is not None:
                refused[name]["bits_per_byte"] = reason
        the_teacher, to_beat = by_name.get(teacher or ""), by_name[baseline] if baseline in alike else None
        measured: dict[str, Measured] = {}
        for name in (name for name in names if name in by_name):
            output = by_name[name]
            measured[name] = measure(
                output.scores,
                output.units,
                seed,
                num_bytes=None if "bits_per_byte" in refused[name] else output.num_bytes,
                teacher=the_teacher.scores if the_teacher and name in alike and name != teacher else None,
                baseline=to_beat.scores if to_beat and name != baseline else None,
            )
        metrics = {name: dict(one.numbers) for name, one in measured.items()}
        if teacher in measured and (why := no_gap(measured, refused, teacher, baseline)) is not None:
            for name in metrics.keys() - {teacher, baseline}:
                metrics[name].pop("recovered_gap", None)
                refused[name].setdefault("recovered_gap", why)
        for name, numbers in metrics.items():
            for metric in [metric for metric, number in numbers.items() if not np.isfinite(number.value)]:
                refused[name][metric] = "it is beyond the largest number"
                del numbers[metric]
        students = {
            name: by_name[name].scores["forward_kl"] for name in names if "forward_kl_nats" in metrics.get(name, {})
        }
        worst = {}
        for name, kl in students.items():
            worst[name] = worst_passages(by_name[name].predicted, kl, by_name[name].model.tokenizer)
        bins = the_teacher and students and breakdowns(the_teacher.predicted, the_teacher.scores["entropy"], students)
        return {
            "text": self.text(),
            "metrics": metrics,
            "refused": {name: why for name, why in refused.items() if why},
            "differences": tuple(differences(measured, alike)),
            "breakdowns": bins or (),
            "worst": worst,
        }


def _no_bytes(output: ModelOutput, first: ModelOutput, cuts: bool) -> str | None:
    """The reason why a model's bits per byte would not mean what another's do; None where they do."""
    tokenizer, predicted = output.model.tokenizer, output.predicted
    if output.num_bytes is None:
        return "its tokenizer drops characters of the text, so its tokens do not stand for all of it"
    unknown = tokenizer.unk_token_id
    if isinstance(unknown, int) and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        number = int((predicted.tokens == unknown).sum())
        if number:
            return f"{number:,} of its tokens are {tokenizer.unk_token}, which may stand for any text"
    if not output.num_bytes.sum():
        return "its predicted tokens stand for no text"
    lost = ("cut", "dropped_overlong", "dropped_cut_away")
    counts = (predicted.documents.counts, first.predicted.documents.counts)
    if cuts and output.model.mismatch and any(one[key] for one in counts for key in lost):
        return "long documents lose text, and another part of it by its tokenizer than by that of the others"
    return None

"""Evaluations as they come in practice, and as nobody wants them, for the tests of the report."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stillroom.evaluate.results import (
    Breakdown,
    Difference,
    Item,
    ModelAnswer,
    ModelFacts,
    Number,
    Passage,
    Results,
    Role,
    TaskResult,
    Text,
    write_items,
)

ROLES: dict[str, Role] = {"teacher": "teacher", "distilled": "distilled", "baseline": "baseline"}
TASKS = ("blimp", "bbh_causal_judgement", "leaderboard_mmlu_pro", "arc_challenge", "hellaswag", "winogrande",
         "leaderboard_math_hard", "leaderboard_ifeval", "bbh_tracking_shuffled_objects_seven_objects", "gsm8k",
         "truthfulqa_mc2", "leaderboard_gpqa")  # fmt: skip
HOSTILE = (
    "</script><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> \"'&|`*_$x$\x1b[31m\u202e"
)
"""What would do harm where it is taken for HTML, Markdown, mathematics or a terminal's language."""
STORY = re.findall(
    r"\s*\S+", "One day, a little fox found a shiny key.\nShe asked her friend, the old owl, what it opened."
)


def number(value: float, error: float = 0.011) -> Number:
    return Number(value=value, error=error, low=value - 1.96 * error, high=value + 1.96 * error)


def build_evaluation(
    folder: Path, names: Sequence[str] = ("teacher", "distilled", "baseline"), num_tasks: int = 3, text: bool = True,
    suffix: str = "",
) -> Results:  # fmt: skip
    """Results of the models, with the items and runs that they name, in ``folder``, where results.json is written too.

    Args:
        suffix: goes behind every name that comes from files.
    """
    models = tuple(_facts(name, i, suffix) for i, name in enumerate(names))
    students = [facts for facts in models if facts.role != "teacher"]
    quality = {facts.name: 1.0 - 0.13 * i for i, facts in enumerate(models)}
    results = Results(
        models=models,
        text=_text(suffix) if text else None,
        metrics={facts.name: _metrics(facts, quality[facts.name]) for facts in models} if text else {},
        refused=_refused(models[-1], suffix) if text and len(models) > 3 else {},
        differences=tuple(_differences(models, "forward_kl_nats", -0.21)) if text and len(models) > 2 else (),
        tasks=tuple(_task(i, quality, models, folder, suffix) for i in range(num_tasks)),
        breakdowns=_breakdowns(students) if text else (),
        worst={facts.name: _worst(i, suffix) for i, facts in enumerate(students)} if text else {},
        runs={facts.name: str(_run(i, folder)) for i, facts in enumerate(students[:2])} if text else {},
        command=f"stillroom evaluate models.teacher=teacher models.distilled=runs/distilled/model{suffix} out=x",
        versions={"python": "3.11.7", "stillroom": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        machine={"platform": f"Linux-x86_64{suffix}", "num_cores": 2, "device": "cpu"},
    )
    (folder / "results.json").write_text(json.dumps(results.model_dump(mode="json")), encoding="utf-8")
    return results


def _facts(name: str, i: int, suffix: str) -> ModelFacts:
    return ModelFacts(
        name=name + suffix,
        role=ROLES.get(name.split("-")[0], "other"),
        model=f"runs/{name}/model{suffix}",
        fingerprint=f"sha256 {i:016x}",
        tokenizer=f"{i // 4:064x}",
        num_parameters=3_148_224 // (1 + 2 * (i > 0)),
        size_bytes=12_598_896 // (1 + 2 * (i > 0)),
        tokens_per_s=9_939.66 * (1 + 2 * (i > 0)),
        peak_memory_bytes=588_507_008 // (1 + (i > 0)),
    )


def _text(suffix: str) -> Text:
    return Text(
        name=f"valid.jsonl{suffix}", fingerprint="6278", num_documents=300, num_tokens=61_250, num_bytes=237_973
    )


def _metrics(facts: ModelFacts, quality: float) -> dict[str, Number]:
    entropy = 3.4 - 2 * quality
    found = {
        "cross_entropy_nats": number(entropy),
        "perplexity": number(float(np.exp(entropy)), 0.083),
        "bits_per_byte": number(entropy / 2.7, 0.0078),
        "calibration_error": number(0.0141 / quality, 0.0014),
    }
    if facts.role != "teacher":
        found |= {
            "forward_kl_nats": number(1.2 * (1 - quality)),
            "forward_kl_p95_nats": number(4.8 * (1 - quality), 0.043),
            "top1_agreement": number(0.95 * quality, 0.0017),
            "top10_overlap": number(0.9 * quality, 0.0011),
            "accepted_mass": number(0.85 * quality, 0.0009),
            "speculative_tokens": number(3.1 * quality, 0.0012),
        }
    return found | ({"recovered_gap": number(0.74 * quality, 0.02)} if facts.role == "distilled" else {})


def _refused(facts: ModelFacts, suffix: str) -> dict[str, dict[str, str]]:
    why = f"its tokenizer is not that of teacher: 3686 tokens differ{suffix}"
    return {facts.name: {"reverse_kl_nats": why, "entropy_ratio": why}}


def _differences(models: Sequence[ModelFacts], what: str, value: float) -> list[Difference]:
    a, b = models[1].name, models[2].name
    sentence = f"{a} beats {b} by {abs(value):.2f}, 95 % interval {abs(value) - 0.05:.2f} to {abs(value) + 0.05:.2f}"
    return [
        Difference(
            what=what, a=a, b=b, value=value, low=value - 0.05, high=value + 0.05, num_items=300, sentence=sentence,
            p_value=0.0003,
        )
    ]  # fmt: skip


def _task(i: int, quality: dict[str, float], models: Sequence[ModelFacts], folder: Path, suffix: str) -> TaskResult:
    name, metric = TASKS[i] + suffix, "acc" if i % 3 else "acc_norm"
    if i == 2:
        why = f"the task's data could not be fetched{suffix}"
        return TaskResult(
            name=name, source="lm-eval", version="1", shots=0, num_items=0, metric="", failed=why
        )  # fmt: skip
    raw = {one: 0.3 + 0.5 * q / (1 + i % 4) for one, q in quality.items()}
    file = f"items/task-{i}.jsonl"
    _items(folder / file, list(quality), suffix)
    return TaskResult(
        name=name,
        source="local" if i < 2 else "lm-eval",
        version="1",
        shots=i % 4,
        num_items=8,
        metric=metric,
        scores={one: {metric: number(x, 0.028), f"{metric} group{suffix}": number(x, 0.04)} for one, x in raw.items()},
        normalised={one: number(2 * x - 1, 0.056) for one, x in raw.items()} if i % 2 == 0 else {},
        differences=tuple(_differences(models, f"{name} {metric}", 0.07)) if len(models) > 2 else (),
        items=file,
    )


def _items(path: Path, names: Sequence[str], suffix: str) -> None:
    def answer(i: int, m: int) -> ModelAnswer:
        right = (i + m) % 3 > 0
        return ModelAnswer(prediction=f"{'yes' if right else 'no'}{suffix}", scores=(-1.0, -2.0), correct=float(right))

    items = [
        Item(
            id=f"line {i + 1}",
            question=f"Does the owl of story {i} know what the key opens?{suffix}" if i % 2 else "",
            options=("yes", "no"),
            gold=f"yes{suffix}",
            models={name: answer(i, m) for m, name in enumerate(names)},
        )
        for i in range(8)
    ]
    write_items(path, items)


def _breakdowns(students: Sequence[ModelFacts]) -> tuple[Breakdown, ...]:
    def one(by: str, labels: Sequence[str]) -> Breakdown:
        kl = {
            facts.name: tuple(None if k == 1 and m else 0.2 + 0.1 * m + 0.15 * k for k in range(len(labels)))
            for m, facts in enumerate(students)
        }
        return Breakdown(by=by, labels=tuple(labels), num_tokens=(612,) * len(labels), forward_kl_nats=kl)  # pyright: ignore

    return (
        one("token_frequency", [f"{10**k:,}–{10 ** (k + 1) - 1:,}×" for k in range(5)]),
        one("position", ["0–7", "8–15", "16–31", "32–63", "64–127", "128–255"]),
        one("teacher_entropy", ["under 0.1", "0.1–0.5", "0.5–1", "1–2", "2–3", "6 and more"]),
    )


def _worst(seed: int, suffix: str) -> tuple[Passage, ...]:
    generator = np.random.default_rng(seed)
    tokens = tuple(STORY) + ((suffix, "日本", "\x00", "") if suffix else ())
    found = []
    for i in range(10):
        kl = generator.exponential(1.5, len(tokens)).tolist()
        document = f"valid.jsonl line {i}{suffix}"
        found.append(
            Passage(document=document, first=3, mean_kl_nats=sum(kl) / len(kl), tokens=tokens, kl_nats=tuple(kl))
        )
    return tuple(found)


def _run(i: int, folder: Path) -> Path:
    run = folder / f"run-{i}"
    run.mkdir(exist_ok=True)
    generator, lines = np.random.default_rng(i), []
    for step in range(1, 401):
        loss = 1.6 + 0.3 * i + 5 * np.exp(-step / 60) + 0.1 * generator.standard_normal()
        lines.append({"step": step, "loss_nats": loss})
        if step % 50 == 0:
            held_out = {"cross_entropy_nats": loss, "forward_kl_nats": loss - 1, "teacher_cross_entropy_nats": 1.4}
            lines.append({"step": step, "held_out": held_out})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run

"""The Open LLM Leaderboard v2: its official, normalised scores, made of raw ones.

Published at huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization: of each subtask

    normalised = max(0, (raw − chance) / (1 − chance))

with the chance of blind guessing as below, and of BBH and MUSR the plain mean over subtasks. GPQA and MMLU-Pro are
normalised as a whole. MATH-hard and IFEval are generated, so their chance is 0; IFEval is the mean of its strict
accuracies by prompt and by instruction. The leaderboard's average is that of the six.
"""

import math
from collections.abc import Callable, Sequence

from stillroom.evaluate.results import Number
from stillroom.evaluate.tasks.config import LEADERBOARD
from stillroom.evaluate.tasks.summary import normalise
from stillroom.statistics import Z_95

BBH_CHOICES = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
"""The number of answers to choose from, as published."""
MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
CHANCE = {
    **{f"leaderboard_bbh_{name}": 1 / number for name, number in BBH_CHOICES.items()},
    **{f"leaderboard_musr_{name}": 1 / number for name, number in MUSR_CHOICES.items()},
    "leaderboard_gpqa": 0.25,
    "leaderboard_gpqa_diamond": 0.25,
    "leaderboard_gpqa_extended": 0.25,
    "leaderboard_gpqa_main": 0.25,
    "leaderboard_mmlu_pro": 0.1,
    "leaderboard_math_hard": 0.0,
}
METRIC = {"leaderboard_mmlu_pro": "acc", "leaderboard_math_hard": "exact_match"}
"""The raw metric of a task; all others have acc_norm."""

Raw = Callable[[str, str], Number]
"""The raw score of a task by a metric. Raises KeyError where there is none."""


def official(task: str, raw: Raw) -> Number | None:
    """The normalised score of a task or group of the leaderboard; None for any other task.

    Raises:
        KeyError: a raw score that it is made of is missing.
    """
    if task == "leaderboard":
        return _mean([one for name in LEADERBOARD if (one := official(name, raw)) is not None])
    if task in ("leaderboard_ifeval", "leaderboard_instruction_following"):
        return _mean(
            [raw("leaderboard_ifeval", f"{level}_level_strict_acc") for level in ("prompt", "inst")], alike=True
        )
    for group in ("bbh", "musr"):
        if task == f"leaderboard_{group}":
            names = [name for name in CHANCE if name.startswith(f"{task}_")]
            return _mean([one for name in names if (one := official(name, raw)) is not None])
    if task not in CHANCE:
        return None
    return normalise(raw(task, METRIC.get(task, "acc_norm")), CHANCE[task], clip=True)


def _mean(parts: Sequence[Number], *, alike: bool = False) -> Number:
    """The plain mean of independent parts; or of parts that are ``alike``, being of the same answers, whose errors add
    up: at most too large."""
    value = sum(part.value for part in parts) / len(parts)
    errors = [part.error for part in parts if part.error is not None]
    if len(errors) < len(parts):
        return Number(value=value)
    error = (sum(errors) if alike else math.sqrt(sum(error**2 for error in errors))) / len(parts)
    return Number(value=value, error=error, low=value - Z_95 * error, high=value + Z_95 * error)

"""A teacher that runs in this process."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.errors import NonFiniteError
from stillroom.layers import Layer
from stillroom.models import hidden_states
from stillroom.models.generation import Sampling, derived_seed, generate
from stillroom.models.hidden_states import lm_head
from stillroom.signals import Dense, TeacherOutput


class LiveTeacher:
    """A model that never trains: in evaluation mode, without gradients, apart from the student's parameters.

    Args:
        layers: those whose states it gives too.
        attention: the blocks whose queries, keys and values it gives too.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer] = (), attention: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers, self.attention = layers, attention

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        self.layers, self.attention = layers, attention

    def prefetch(self, batch: Batch) -> None:  # noqa: ARG002
        return None

    @torch.no_grad()
    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:  # noqa: ARG002
        """Returns its last hidden states with its head, and the states that are set."""
        last, inner = hidden_states.all_hidden_states(self.model, batch, self.layers, self.attention)
        return TeacherOutput(Dense(last, lm_head(self.model)), inner)

    def answer(
        self,
        prompts: Sequence[tuple[int, np.ndarray]],
        sampling: Sampling,
        *,
        seed: int,
        vocab_size: int,
        pad_token: int,
        batch_tokens: int,
    ) -> list[list[np.ndarray]]:
        """Returns its answers to each prompt as tokens, int32, with the end of sequence where they came to one.

        Args:
            prompts: each with the number of its document.
            vocab_size: no token from here on is drawn.
            batch_tokens: the most positions of prompts and answers that are generated together, or one prompt's.

        Raises NonFiniteError where the logits at a position are no distribution.
        """
        answers: dict[int, list[np.ndarray]] = {}
        num_answers = sampling.num_answers
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]), reverse=True)
        common = {"vocab_size": vocab_size, "pad_token": pad_token}
        while order:
            longest = len(prompts[order[0]][1]) + sampling.max_tokens
            places = order[: max(1, batch_tokens // (longest * num_answers))]
            order = order[len(places) :]
            some = [prompts[i] for i in places for _ in range(num_answers)]  # of each row that is generated

            def check(logits: Tensor, num_written: int, some: Sequence = some) -> None:
                check_finite(logits, lambda row: (some[row][0], len(some[row][1]) + num_written - 1))

            texts, drawn_by = [prompts[i][1] for i in places], derived_seed(seed, "answers", some[0][0])
            found = generate(self.model, texts, sampling, **common, seed=drawn_by, check=check)
            answers |= dict(zip(places, found, strict=True))
        return [answers[i] for i in range(len(prompts))]


def check_finite(logits: Tensor, where: Callable[[int], tuple[int, int]]) -> None:
    """Returns where each row of logits is a distribution: no logit is not a number or +∞, and not all are −∞.

    Args:
        where: gives the document and the position of a row.

    Raises:
        NonFiniteError: a row is none; it names the document.
    """
    rows = (~logits.amax(-1).isfinite()).nonzero()
    if not len(rows):
        return
    row = logits[rows[0, 0]]
    number, position = where(int(rows[0, 0]))
    wrong = row.isnan() | (row == torch.inf)
    kind = "not a number" if row.isnan().any() else "infinite" if wrong.any() else "-infinity"
    raise NonFiniteError(
        f"the teacher's logits are not finite in document {number}",
        {
            "position": f"{position} (from 0)",
            "columns": f"{int(wrong.sum()) or len(row)} of {len(row)} are {kind}",
        },
        why="It says nothing there that a student could learn. What is in whole shards is kept.",
        fix="Check its weights. Where they are good, teacher.engine.dtype=float32 or another teacher.engine.attention "
        "may mend it, with --overwrite; so may leaving out that document, or one that shares its row. --resume goes on "
        "with the same settings, if the fault was the machine's.",
    )

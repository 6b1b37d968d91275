"""The student's own text: how far it is from its teacher on what it writes itself ("on-policy")."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stillroom.data.dataloader import DocumentSet, collate
from stillroom.losses.divergences import reverse_kl
from stillroom.losses.objective import Objective
from stillroom.models.generation import draw_text
from stillroom.teachers.base import prompt_length
from stillroom.teachers.live import LiveTeacher
from stillroom.training.step import StudentStep

MOST_PROMPTS = 16

MOST_TOKENS = 32
"""The most tokens that are written after each prompt."""


@dataclass(frozen=True)
class StudentText:
    """Texts that begin with a prompt; the tokens after it are the targets."""

    texts: Sequence[np.ndarray]
    starts: Sequence[int]

    def tokens(self, index: int) -> np.ndarray:
        return self.texts[index]

    def target_mask(self, index: int) -> np.ndarray:
        return np.arange(len(self.texts[index])) >= self.starts[index]


@torch.no_grad()
def on_policy_kl(
    module: StudentStep,
    teacher: LiveTeacher,
    documents: DocumentSet,
    numbers: Sequence[int],
    *,
    vocab_size: int,
    length: int,
    end: int | None,
    seed: int,
) -> tuple[float, int]:
    """Returns the mean of KL(student ‖ teacher) in nats over the tokens that the student draws at temperature 1 after
    the prompts of some documents, and the number of these tokens.

    Args:
        vocab_size: the columns of both heads that are compared; no other token is drawn.
        length: the most positions of a row.
        end: the token that ends a text.
    """
    module.eval()
    probe = StudentStep(
        module.model,
        [Objective("own_text_kl_nats", reverse_kl)],
        vocab_size=module.vocab_size,
        logits_bytes=module.logits_bytes,
        precision=module.precision,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for number in numbers:
        tokens, size = documents.tokens(number), prompt_length(documents.target_mask(number))
        prompt = tokens[: size if size > 1 else max(1, len(tokens) // 2)]  # half, where all is to be learned
        if len(prompt) < length:
            prompts.append(prompt)
    device = next(module.parameters()).device
    total, num_tokens = 0.0, 0
    for prompt in prompts[:MOST_PROMPTS]:
        max_tokens = min(MOST_TOKENS, length + 1 - len(prompt))
        text = draw_text(module.model, prompt, max_tokens, vocab_size, end, generator)
        batch = collate(StudentText([text], [len(prompt)]), [np.array([0])], 0).to(device)
        total += probe(batch, teacher.forward(batch), 1).sums.item()
        num_tokens += batch.num_kept
    return total / max(1, num_tokens), num_tokens

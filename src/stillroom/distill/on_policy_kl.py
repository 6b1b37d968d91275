"""The student's own text: how far it is from its teacher on what it writes itself ("on-policy")."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from stillroom.data.dataloader import DocumentSet, collate
from stillroom.losses.divergences import reverse_kl
from stillroom.losses.objective import Objective
from stillroom.models.hidden_states import backbone, lm_head
from stillroom.teachers.live import LiveTeacher
from stillroom.training.step import StudentStep

MOST_PROMPTS = 16

MOST_TOKENS = 32
"""That are written after each prompt."""


@dataclass(frozen=True)
class StudentText:
    """Texts that begin with a prompt; the rest is to be learnt."""

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
    columns: int,
    length: int,
    end: int | None,
    seed: int,
) -> tuple[float, int]:
    """The mean of KL(student ‖ teacher) in nats over the tokens that the student draws at temperature 1 after the
    prompts of some documents, and how many these are.

    Args:
        columns: of the heads that are compared; no other token is drawn.
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
    prompts = [p for p in (_prompt(documents, n) for n in numbers) if len(p) < length][:MOST_PROMPTS]
    device = next(module.parameters()).device
    total, num_tokens = 0.0, 0
    for prompt in prompts:
        text = _write(module.model, prompt, min(MOST_TOKENS, length + 1 - len(prompt)), columns, end, generator)
        batch = collate(StudentText([text], [len(prompt)]), [np.array([0])], 0).to(device)
        total += probe(batch, teacher.forward(batch), 1).sums.item()
        num_tokens += batch.num_kept
    return total / max(1, num_tokens), num_tokens


def _prompt(documents: DocumentSet, number: int) -> np.ndarray:
    """All before the last stretch to learn; of a document that is learnt from its beginning on, the first half."""
    tokens, target_mask = documents.tokens(number), documents.target_mask(number)
    edges = np.flatnonzero(np.diff(target_mask.astype(np.int8)) == 1)
    size = int(edges[-1]) + 1 if len(edges) else 0
    return tokens[: size if size > 1 else max(1, len(tokens) // 2)]


def _write(
    model: PreTrainedModel,
    prompt: np.ndarray,
    most: int,
    columns: int,
    end: int | None,
    generator: torch.Generator,
) -> np.ndarray:
    """The prompt with up to ``most`` tokens that the model draws after it, the end of the text with it."""
    device = next(model.parameters()).device
    text = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    unread, cache = text, None
    for _ in range(most):
        said: Any = backbone(model)(input_ids=unread, past_key_values=cache, use_cache=True)
        cache = getattr(said, "past_key_values", None)
        logits = lm_head(model).logits(said[0][0, -1:])  # of the last position alone
        probabilities = logits[0, :columns].softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=generator)[None].to(device)
        text = torch.cat([text, token], 1)
        if token.item() == end:
            break
        unread = text if cache is None else token
    return text[0].cpu().numpy()

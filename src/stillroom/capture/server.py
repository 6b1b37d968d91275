"""ServerTeacher: a teacher behind an address, asked over HTTP."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stillroom.capture.config import VLLM, Generate, OpenAI
from stillroom.capture.model import CapturedSignal
from stillroom.capture.windows import Document
from stillroom.errors import DataError
from stillroom.kernels.selection import Selection, subtracted_rests
from stillroom.store.config import TopK, TopP
from stillroom.store.quantize import quantize
from stillroom.teachers.http.engine import ServerEngine, TopLogProbs


class ServerCaptureTeacher:
    """Asks a server about windows of documents, several at a time, and takes what it says in their order.

    Args:
        columns: the tokens that make up its distribution.
        seed: of its answers.
    """

    def __init__(
        self,
        model: str,
        engine: VLLM | OpenAI,
        signal: TopK | TopP,
        tokenizer: PreTrainedTokenizerBase,
        *,
        columns: int,
        seed: int,
    ) -> None:
        self.signal, self.columns, self.seed = signal, columns, seed
        self.engine = ServerEngine(
            url=engine.url,
            model=model,
            dialect=engine.kind,
            tokenizer=tokenizer,
            top=signal.k if isinstance(signal, TopK) else signal.most,
            concurrency=engine.concurrency,
            retries=engine.retries,
            timeout_s=engine.timeout_s,
            key_variable=engine.key_variable,
        )
        self.prices = engine.prompt_price, engine.completion_price
        self._told: dict[int, TopLogProbs] = {}

    def say(self, documents: Sequence[Document]) -> list[CapturedSignal]:
        """What it says of each document; of its own answers it said it while it wrote them.

        Raises:
            StillroomError: the server gave up, or what it said does not fit what it was asked.
        """
        asked = ((d.number, d.tokens, d.loss_mask[:-1]) for d in documents if d.number not in self._told)
        told = self._told | dict(self.engine.score(asked))
        self._told = {}
        return [self._said(told[document.number], document.number) for document in documents]

    def answer(self, prompts: Sequence[tuple[int, np.ndarray]], generate: Generate) -> list[list[np.ndarray]]:
        """Its answers to each prompt, as tokens. What it says of them while it writes is kept for `say`."""
        found = self.engine.generate(
            prompts,
            max_tokens=generate.max_tokens,
            temperature=generate.temperature,
            top_p=generate.top_p,
            num_answers=generate.answers,
            seed=self.seed,
        )
        answers = dict(found)
        for number, several in answers.items():
            for j, answer in enumerate(several):
                if answer.log_probs is not None:
                    self._told[number * generate.answers + j] = answer.log_probs
        return [[answer.tokens for answer in answers[number]] for number, _ in prompts]

    @property
    def cost(self) -> float:
        """What the tokens so far cost, at the prices of the settings."""
        usage = self.engine.usage
        return (usage.prompt_tokens * self.prices[0] + usage.completion_tokens * self.prices[1]) / 1e6

    def _said(self, top: TopLogProbs, number: int) -> CapturedSignal:
        signal, n = self.signal, len(top.counts)
        if isinstance(signal, TopK) and n and (fewest := int(top.counts.min())) < signal.k:
            raise DataError(
                f"the server told too few tokens of document {number}",
                {"asked for": signal.k, "told": fewest},
                why="Positions with fewer entries would be stored as if the rest were all that was left out.",
                fix="Lower signal.k to what the server tells, or raise its limit (vLLM: --max-logprobs).",
            )
        width = max(1, int(top.counts.max(initial=1)))
        there = np.arange(width) < top.counts[:, None]
        ids, log_probs = np.zeros((n, width), np.int64), np.full((n, width), -np.inf)
        ids[there], log_probs[there] = top.ids, top.log_probs
        if isinstance(signal, TopP):
            before = np.cumsum(np.exp(log_probs), 1) - np.exp(log_probs)
            log_probs[before >= signal.mass] = -np.inf
        kept = torch.from_numpy(log_probs)
        label = torch.from_numpy(top.label_log_probs.astype(np.float32)) if signal.label else None
        if label is not None and not bool(torch.isfinite(label).all()):
            raise DataError(
                f"the server does not tell the log-probability of document {number}'s own tokens",
                {"signal.label": True, "told": "not of every position"},
                why="The teacher's cross-entropy would be that of some positions only.",
                fix="Set signal.label=false.",
            )
        chosen = Selection(
            torch.from_numpy(ids),
            kept,
            {1.0: subtracted_rests(kept, self.columns)},
            label_log_probs=label,
        )
        return CapturedSignal(*quantize(chosen, signal, np.zeros((n, 0), np.float32)))

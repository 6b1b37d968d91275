"""From a teacher's outputs to what a store keeps of them: selected, quantized, with hidden states encoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillroom.batch import Batch
from stillroom.capture.config import Generate
from stillroom.capture.windows import Document, batches
from stillroom.errors import DataError, MismatchError, NonFiniteError
from stillroom.kernels import selection
from stillroom.kernels.selection import Selection
from stillroom.lm_head import accumulator, logits_into
from stillroom.models.generation import Sampling, derived_seed
from stillroom.signals import Dense, HiddenStates
from stillroom.store.config import (
    AnySignal,
    Full,
    HeadAndSample,
    HiddenStatesConfig,
    QuantizedSignal,
    Sampled,
    TopK,
    TopP,
    known_temperatures,
)
from stillroom.store.quantize import MAX_STATE, LogProbCodes, encode_hidden, num_uniforms, quantize
from stillroom.teachers.answers import TopLogProbs
from stillroom.teachers.base import ServerTeacher
from stillroom.teachers.live import LiveTeacher, check_finite

Where = Callable[[int], tuple[int, int]]
"""Gives the document and the position of a row."""


class CapturedSignal(NamedTuple):
    """The signals of one document's kept positions, as a store keeps them."""

    signal: LogProbCodes | np.ndarray
    """Levels; or, for a full store, the logits, float32 [kept, vocab]."""
    error_nats: float
    """The error of quantizing, summed over the positions."""
    hidden: bytes | None = None
    """Its encoded hidden states, where some are kept."""


@dataclass(frozen=True)
class SignalCapture:
    """Asks a teacher about windows of documents, and turns its outputs into what a store keeps."""

    teacher: LiveTeacher | ServerTeacher
    """A live one gives the layers of ``hidden``."""
    signal: AnySignal
    """The part of each distribution that is kept; top_k or top_p from a server."""
    vocab_size: int
    """The tokens that make up its distribution: the first columns of its head."""
    seed: int
    """The seed of draws and answers. A document's draws depend on it and on the document's number alone."""
    length: int
    """The most positions of a row."""
    pack: bool
    pad_token: int = 0
    batch_tokens: int = 0
    """The most positions that go through a live teacher at once, with padding."""
    logits_bytes: int = 0
    """The budget for the logits of a live teacher that are held at a time."""
    hidden: HiddenStatesConfig | None = None

    def answers(self, prompts: Sequence[tuple[int, np.ndarray]], generate: Generate) -> list[list[np.ndarray]]:
        """Returns the teacher's answers to each prompt, given with its document's number, as tokens."""
        sampling = Sampling(generate.max_tokens, generate.temperature, generate.top_p, generate.answers)
        if isinstance(self.teacher, ServerTeacher):
            return self.teacher.answer(prompts, sampling, seed=self.seed)
        return self.teacher.answer(
            prompts,
            sampling,
            seed=self.seed,
            vocab_size=self.vocab_size,
            pad_token=self.pad_token,
            batch_tokens=self.batch_tokens,
        )

    @torch.no_grad()
    def capture(self, documents: Sequence[Document]) -> list[CapturedSignal]:
        """Returns what is kept of each document.

        Raises:
            NonFiniteError: at a kept position the teacher's output is no distribution, or a state is not finite.
            StillroomError: a server gave up, or its answer does not fit the request.
        """
        if isinstance(self.teacher, ServerTeacher):
            found = self.teacher.top_log_probs((d.number, d.tokens, d.loss_mask[:-1]) for d in documents)
            return [self._of_server(found[document.number], document.number) for document in documents]
        captured: dict[int, CapturedSignal] = {}
        for batch in batches(
            documents, length=self.length, pack=self.pack, most=self.batch_tokens, pad_token=self.pad_token
        ):
            captured |= self._of_batch(self.teacher, batch, documents)
        return [captured[place] for place in range(len(documents))]

    def _of_batch(self, teacher: LiveTeacher, batch: Batch, documents: Sequence[Document]) -> dict[int, CapturedSignal]:
        moved = batch.to(teacher.model.device)
        output = teacher.forward(moved)
        assert isinstance(output.signal, Dense)
        places = batch.documents.flatten()[batch.kept].numpy()
        starts = np.flatnonzero(np.append(True, places[1:] != places[:-1])) if len(places) else np.zeros(0, np.int64)
        edges = [*starts.tolist(), len(places)]
        runs = list(zip(places[starts].tolist(), edges[:-1], edges[1:], strict=True))

        def where(row: int) -> tuple[int, int]:
            return documents[int(places[row])].number, int(batch.positions.flatten()[batch.kept[row]])

        def hidden(first: int, stop: int) -> bytes | None:
            if self.hidden is None or output.hidden is None:
                return None
            width = teacher.model.config.get_text_config().hidden_size
            return encoded_hidden(output.hidden, self.hidden, width, slice(first, stop), where)

        if isinstance(self.signal, Full):
            logits = output.signal.head.logits(output.signal.hidden, self.vocab_size)
            check_finite(logits, where)
            return {d: CapturedSignal(logits[a:b].cpu().numpy(), 0.0, hidden(a, b)) for d, a, b in runs}
        random = np.concatenate(
            [np.zeros((0, num_uniforms(self.signal)), np.float32)]
            + [uniforms(self.signal, self.seed, documents[d].number, b - a) for d, a, b in runs]
        )
        labels = moved.labels.flatten()[moved.kept]
        levels, cost = self._quantized(output.signal, self.signal, labels, random, where)
        return {d: CapturedSignal(levels.slice(a, b), cost * (b - a) / len(places), hidden(a, b)) for d, a, b in runs}

    def _quantized(
        self, dense: Dense, signal: QuantizedSignal, labels: Tensor, random: np.ndarray, where: Where
    ) -> tuple[LogProbCodes, float]:
        """Works chunk by chunk: no ``[tokens, vocabulary]`` tensor is held."""
        hidden, head = dense.hidden, dense.head
        size = max(1, self.logits_bytes // (4 * self.vocab_size))
        parts: list[LogProbCodes] = []
        total = 0.0
        room = torch.empty(
            min(size, len(hidden)), self.vocab_size, dtype=accumulator(hidden.dtype), device=hidden.device
        )
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            logits = room[: rows.stop - start]
            logits_into(logits, hidden[rows], head)
            selected = select(logits, signal, labels[rows], random[rows])
            if not selected.is_defined():
                logits_into(logits, hidden[rows], head)  # the selection may have changed them
                check_finite(logits, lambda row, start=start: where(start + row))
            levels, cost = quantize(selected, signal, random[rows])
            parts.append(levels)
            total += cost
        return LogProbCodes.concatenate(parts), total

    def _of_server(self, top: TopLogProbs, number: int) -> CapturedSignal:
        signal = self.signal
        assert isinstance(signal, TopK | TopP)
        if isinstance(signal, TopK) and len(top.counts) and (fewest := int(top.counts.min())) < signal.k:
            raise DataError(
                f"the server told too few tokens of document {number}",
                {"asked for": signal.k, "told": fewest},
                why="Positions with fewer entries would be stored as if the rest were all that was left out.",
                fix="Lower signal.k to what the server tells, or raise its limit (vLLM: --max-logprobs).",
            )
        ids, log_probs = top.padded(np.float64)
        if isinstance(signal, TopP):
            before = np.cumsum(np.exp(log_probs), 1) - np.exp(log_probs)
            log_probs[before >= signal.mass] = -np.inf
        kept = torch.from_numpy(log_probs)
        label = torch.from_numpy(top.label_log_probs) if signal.label else None
        if label is not None and not bool(torch.isfinite(label).all()):
            raise DataError(
                f"the server does not tell the log-probability of document {number}'s own tokens",
                {"signal.label": True, "told": "not of every position"},
                why="The teacher's cross-entropy would be that of some positions only.",
                fix="Set signal.label=false.",
            )
        rests = {1.0: selection.subtracted_rests(kept, self.vocab_size)}
        selected = Selection(torch.from_numpy(ids), kept, rests, label_log_probs=label)
        return CapturedSignal(*quantize(selected, signal, np.zeros((len(ids), 0), np.float32)))


def select(logits: Tensor, signal: QuantizedSignal, labels: Tensor, random: np.ndarray) -> Selection:
    """Returns what is kept of each row of logits, not yet quantized. The logits are changed.

    Args:
        random: float32 [n, `num_uniforms`], from [0, 1).
    """
    label = None
    if signal.label:
        label = logits.gather(1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    entropy = None
    if isinstance(signal, TopK | TopP) and signal.entropy:
        entropy = selection.entropy(logits)
    if isinstance(signal, TopK):
        selected = selection.top_k(logits, signal.k, known_temperatures(signal))
    elif isinstance(signal, TopP):
        selected = selection.top_p(logits, signal.mass, signal.most, known_temperatures(signal))
    else:
        points = torch.from_numpy(random).to(logits.device)
        if isinstance(signal, Sampled):
            selected = selection.sampled(logits, points[:, : signal.draws])
        else:
            selected = selection.head_and_sample(logits, signal.head, signal.draws, signal.least, points[:, 0])
    selected.label_log_probs = label
    selected.entropy = entropy if selected.entropy is None else selected.entropy
    return selected


def uniforms(signal: QuantizedSignal, seed: int, number: int, positions: int) -> np.ndarray:
    """Returns the random numbers of a document, float32 [positions, `num_uniforms`]; none where nothing is drawn."""
    if not isinstance(signal, Sampled | HeadAndSample):
        return np.zeros((positions, 0), np.float32)
    generator = torch.Generator().manual_seed(derived_seed(seed, "draws", number))
    return torch.rand(positions, num_uniforms(signal), generator=generator).numpy()


# --- hidden states ---------------------------------------------------------------------------------------------------


def encoded_hidden(inner: HiddenStates, config: HiddenStatesConfig, width: int, rows: slice, where: Where) -> bytes:
    """Returns the states of one document, rows of a batch's, as a store keeps them.

    Raises:
        NonFiniteError: a state has a channel that is no number, or larger than bfloat16 can be.
        MismatchError: a layer has another width than ``width``, the model's.
    """
    for layer in config.layers:
        if (found := inner.states[layer].shape[-1]) != width:
            raise MismatchError(
                f"layer {layer} of the teacher has another width than its config says",
                {f"layer {layer}": f"{found} channels", "hidden_size": f"{width} channels"},
                why="A store holds states of one width.",
                fix="Leave out that layer of hidden.layers.",
            )
    states = torch.stack([inner.states[layer][rows].float() for layer in config.layers])
    wrong = ~(states.abs() <= MAX_STATE)
    if wrong.any():
        place, row = wrong.any(-1).nonzero()[0].tolist()
        number, position = where(rows.start + row)
        state = states[place, row]
        kind = "not a number" if state.isnan().any() else "infinite or too large for bfloat16"
        raise NonFiniteError(
            f"the teacher's hidden states are not finite in document {number}",
            {
                "position": f"{position} (from 0)",
                "layer": config.layers[place],
                "channels": f"{int(wrong[place, row].sum())} of {len(state)} are {kind}",
            },
            why="There is nothing that a student could learn. What is in whole shards is kept.",
            fix="Check its weights. Where they are good, teacher.engine.dtype=float32 or another "
            "teacher.engine.attention may mend it, with --overwrite; so may leaving out that document or that layer.",
        )
    return encode_hidden(states, config)

"""From documents to what a store keeps of them: windows, batches, the teacher's answers, and its outputs, selected and
quantized, with hidden states encoded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillroom.batch import Batch
from stillroom.capture.config import Generate
from stillroom.data.dataloader import in_batches
from stillroom.data.dataset import Documents
from stillroom.errors import DataError, MismatchError, NonFiniteError
from stillroom.kernels import selection
from stillroom.kernels.selection import Selection
from stillroom.lm_head import accumulator, logits_into
from stillroom.models.generation import Sampling, Stops, derived_seed
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
from stillroom.teachers.base import ServerTeacher, prompt_length
from stillroom.teachers.live import LiveTeacher, check_finite

Where = Callable[[int], tuple[int, int]]
"""Gives the document and the position of a row."""

WINDOW_DOCUMENTS = 256
"""Documents that are batched together at most. Windows begin at multiples of their size, so a resumed capture makes
the same ones."""

WINDOW_BYTES = 2**28
"""The documents of a window have at most so many bytes of hidden states, or there is one of them."""


@dataclass(frozen=True)
class Document:
    """One tokenized document, from the data or written by the teacher."""

    number: int
    """Its number in the store's data."""
    tokens: np.ndarray
    """int32 [n]."""
    target_mask: np.ndarray
    """bool [n]: whether token i is a target."""

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [n]: whether the token after each is a target; False for the last."""
        return np.append(self.target_mask[1:], False)


def window_documents(length: int, generate: Generate | None, bytes_per_position: int) -> int:
    """Returns how many documents of up to ``length`` tokens make a window.

    Args:
        bytes_per_position: the size of a position's hidden states; 0 where none are kept.
    """
    positions = length * (1 if generate is None else generate.answers)
    return max(1, min(WINDOW_DOCUMENTS, WINDOW_BYTES // max(1, positions * bytes_per_position)))


def windows(documents: Documents, first: int, stop: int, size: int) -> Iterator[list[Document]]:
    """Yields the documents ``first`` to ``stop`` (excluded), in lists of up to ``size``."""
    for start in range(first, stop, size):
        numbers = range(start, min(start + size, stop))
        yield [Document(i, documents.tokens(i), documents.target_mask(i)) for i in numbers]


class _Window(list[Document]):
    def tokens(self, index: int) -> np.ndarray:
        return self[index].tokens

    def target_mask(self, index: int) -> np.ndarray:
        return self[index].target_mask


def batches(documents: Sequence[Document], *, length: int, pack: bool, most: int, pad_token: int) -> Iterator[Batch]:
    """Yields the documents in batches of at most ``most`` positions: packed into rows of ``length``, or by length.

    ``Batch.documents`` holds the place of each in ``documents``.
    """
    lengths = np.array([len(document.tokens) for document in documents])
    order = np.arange(len(documents))
    return in_batches(_Window(documents), lengths, order, length=length, pack=pack, most=most, pad_token=pad_token)


# --- answers -------------------------------------------------------------------------------------------------------


def prompts(documents: Sequence[Document], generate: Generate, length: int) -> list[tuple[int, np.ndarray]]:
    """Returns the prompt of each document, with the document's number: all that stands before its last targets.

    Raises:
        DataError: a document begins with its last targets, or its prompt leaves no room for an answer.
    """
    found = []
    for document in documents:
        if generate.prompt_tokens is not None:
            size = min(generate.prompt_tokens, len(document.tokens) - 1)
        else:
            size = prompt_length(document.target_mask)
        if not size:
            raise DataError(
                f"document {document.number} has no prompt",
                {"tokens": len(document.tokens), "before its last answer": 0},
                why="The teacher answers what stands before the last stretch to learn, and here nothing does.",
                fix="Use data.format=chat or prompt_completion, with data.keep at its default.",
            )
        if size + generate.max_tokens > length + 1:
            raise DataError(
                f"the prompt of document {document.number} leaves too little room for an answer",
                {"prompt": f"{size} tokens", "generate.max_tokens": generate.max_tokens, "data.length": length},
                why="Prompt and answer share a row.",
                fix="Raise data.length, lower generate.max_tokens, or leave out such rows.",
            )
        found.append((document.number, document.tokens[:size]))
    return found


def answered(
    asked: Sequence[tuple[int, np.ndarray]], answers: Sequence[Sequence[np.ndarray]], generate: Generate
) -> list[Document]:
    """Returns a document of each prompt with each of its answers; the answer's tokens are the targets.

    Document ``number · answers + j`` is the j-th answer to document ``number``.

    Raises:
        DataError: an answer is empty.
    """
    found = []
    for (number, prompt), several in zip(asked, answers, strict=True):
        for j, answer in enumerate(several):
            if not len(answer):
                raise DataError(
                    f"the teacher's answer to document {number} is empty",
                    {"prompt": f"{len(prompt)} tokens", "answer": "0 tokens"},
                    why="There is nothing in it to learn.",
                    fix="Leave that prompt out, or check the model's chat template.",
                )
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            found.append(Document(number * generate.answers + j, tokens, np.arange(len(tokens)) >= len(prompt)))
    return found


# --- signals -------------------------------------------------------------------------------------------------------


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
    ends: Sequence[int] = ()
    """The tokens that end an answer of a live teacher."""
    stops: Stops | None = None
    """The texts that end one, too."""

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
            ends=self.ends,
            stops=self.stops,
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
        edges = np.flatnonzero(np.diff(places, prepend=-1, append=-1)).tolist()  # where another document begins
        runs = [(int(places[a]), a, b) for a, b in pairwise(edges)]

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
        parts, total = list[LogProbCodes](), 0.0
        shape = min(size, len(hidden)), self.vocab_size
        room = torch.empty(shape, dtype=accumulator(hidden.dtype), device=hidden.device)
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
    label = logits.gather(1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1) if signal.label else None
    entropy = selection.entropy(logits) if isinstance(signal, TopK | TopP) and signal.entropy else None
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

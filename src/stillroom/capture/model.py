"""ModelTeacher: a teacher in this process. It answers prompts, and says what it thinks of documents."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from stillroom.batch import Batch
from stillroom.capture.config import Generate, Transformers
from stillroom.capture.hidden import encoded
from stillroom.capture.windows import Document, batches
from stillroom.errors import NonFiniteError
from stillroom.kernels import selection
from stillroom.kernels.selection import Selection
from stillroom.lm_head import LMHead, accumulator, logits_into
from stillroom.models import hidden_states
from stillroom.models.hidden_states import lm_head
from stillroom.store.config import (
    AnySignal,
    Full,
    HeadAndSample,
    HiddenStatesConfig,
    Sampled,
    TopK,
    TopP,
    known_temperatures,
)
from stillroom.store.quantize import LogProbCodes, num_uniforms, quantize


class CapturedSignal(NamedTuple):
    """What the teacher said of one document's kept positions."""

    signal: LogProbCodes | np.ndarray
    """Levels; or, of a full store, the logits, float32 [kept, columns]."""
    error_nats: float
    """What quantising cost, summed over the positions."""
    hidden: bytes | None = None
    """Its inner states, as a store keeps them, where some are kept."""


class ModelTeacher:
    """A frozen model that is asked about windows of documents.

    Args:
        columns: the columns of its head that make up its distribution.
        seed: of draws and answers. A document's draws depend on it and on the document's number alone, however it is
            batched.
        hidden: the inner states that are kept besides.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Transformers,
        signal: AnySignal,
        *,
        columns: int,
        length: int,
        pack: bool,
        seed: int,
        pad_token: int,
        hidden: HiddenStatesConfig | None = None,
    ) -> None:
        self.model, self.engine, self.signal = model.eval().requires_grad_(False), engine, signal
        self.columns, self.length, self.pack, self.seed, self.pad_token = columns, length, pack, seed, pad_token
        self.hidden, self.width = hidden, model.config.get_text_config().hidden_size

    @torch.no_grad()
    def say(self, documents: Sequence[Document]) -> list[CapturedSignal]:
        """What it says of each document.

        Raises:
            NonFiniteError: at a kept position it says nothing that can be a distribution, or has a state that is no
                number.
        """
        said: dict[int, CapturedSignal] = {}
        most = self.engine.batch_tokens
        assert most != "auto"
        batched = batches(documents, length=self.length, pack=self.pack, most=most, pad_token=self.pad_token)
        for batch in batched:
            said |= self._say_batch(batch, documents)
        return [said[place] for place in range(len(documents))]

    def _say_batch(self, batch: Batch, documents: Sequence[Document]) -> dict[int, CapturedSignal]:
        moved = batch.to(self.engine.device)
        layers = () if self.hidden is None else self.hidden.layers
        hidden, inner = hidden_states.all_hidden_states(self.model, moved, layers)
        head = lm_head(self.model)
        places = batch.documents.flatten()[batch.kept].numpy()
        starts = np.flatnonzero(np.append(True, places[1:] != places[:-1])) if len(places) else np.zeros(0, np.int64)
        edges = [*starts.tolist(), len(places)]
        runs = list(zip(places[starts].tolist(), edges[:-1], edges[1:], strict=True))
        labels = moved.labels.flatten()[moved.kept]

        def where(row: int) -> tuple[int, int]:
            return documents[int(places[row])].number, int(batch.positions.flatten()[batch.kept[row]])

        def check(logits: Tensor, first: int) -> None:
            if (p := _not_finite(logits)) is not None:
                raise _says_nothing(*where(first + p), logits[p])

        def inside(first: int, stop: int) -> bytes | None:
            if self.hidden is None:
                return None
            return encoded(inner, self.hidden, self.width, slice(first, stop), where)

        if isinstance(self.signal, Full):
            logits = head.logits(hidden, self.columns)
            check(logits, 0)
            return {d: CapturedSignal(logits[a:b].cpu().numpy(), 0.0, inside(a, b)) for d, a, b in runs}
        uniforms = np.concatenate(
            [np.zeros((0, num_uniforms(self.signal)), np.float32)]
            + [self._uniforms(documents[d].number, b - a) for d, a, b in runs]
        )
        levels, cost = self._levels(hidden, head, labels, uniforms, check)
        return {d: CapturedSignal(levels.slice(a, b), cost * (b - a) / len(places), inside(a, b)) for d, a, b in runs}

    def _levels(
        self,
        hidden: Tensor,
        head: LMHead,
        labels: Tensor,
        uniforms: np.ndarray,
        check: Callable[[Tensor, int], None],
    ) -> tuple[LogProbCodes, float]:
        """What is stored of each position, chunk by chunk: no ``[tokens, vocabulary]`` tensor is held."""
        assert self.engine.logits_bytes != "auto"
        assert not isinstance(self.signal, Full)
        size = max(1, self.engine.logits_bytes // (4 * self.columns))
        parts: list[LogProbCodes] = []
        total = 0.0
        room = torch.empty(min(size, len(hidden)), self.columns, dtype=accumulator(hidden.dtype), device=hidden.device)
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            logits = room[: rows.stop - start]
            logits_into(logits, hidden[rows], head)
            chosen = self._select(logits, labels[rows], uniforms[rows])
            if not chosen.is_defined():
                logits_into(logits, hidden[rows], head)  # which the selection may have changed
                check(logits, start)
            levels, cost = quantize(chosen, self.signal, uniforms[rows])
            parts.append(levels)
            total += cost
        return LogProbCodes.concatenate(parts), total

    def _select(self, logits: Tensor, labels: Tensor, uniforms: np.ndarray) -> Selection:
        signal = self.signal
        assert not isinstance(signal, Full)
        label = None
        if signal.label:
            label = logits.gather(1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        entropy = None
        if isinstance(signal, TopK | TopP) and signal.entropy:
            entropy = selection.entropy(logits)
        if isinstance(signal, TopK):
            chosen = selection.top_k(logits, signal.k, known_temperatures(signal))
        elif isinstance(signal, TopP):
            chosen = selection.top_p(logits, signal.mass, signal.most, known_temperatures(signal))
        else:
            random = torch.from_numpy(uniforms).to(logits.device)
            if isinstance(signal, Sampled):
                chosen = selection.sampled(logits, random[:, : signal.draws])
            else:
                chosen = selection.head_and_sample(logits, signal.head, signal.draws, signal.least, random[:, 0])
        chosen.label_log_probs = label
        chosen.entropy = entropy if chosen.entropy is None else chosen.entropy
        return chosen

    def _uniforms(self, number: int, positions: int) -> np.ndarray:
        """The random numbers of a document."""
        if not isinstance(self.signal, Sampled | HeadAndSample):
            return np.zeros((positions, 0), np.float32)
        generator = torch.Generator().manual_seed(_seed(self.seed, "draws", number))
        return torch.rand(positions, num_uniforms(self.signal), generator=generator).numpy()

    @torch.no_grad()
    def answer(self, prompts: Sequence[tuple[int, np.ndarray]], generate: Generate) -> list[list[np.ndarray]]:
        """Its answers to each prompt, as tokens, with the end of sequence where it came to one.

        Args:
            prompts: each with the number of its document.
        """
        answers: dict[int, list[np.ndarray]] = {}
        most = self.engine.batch_tokens
        assert most != "auto"
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]), reverse=True)
        while order:
            longest = len(prompts[order[0]][1]) + generate.max_tokens
            some = order[: max(1, most // (longest * generate.answers))]
            order = order[len(some) :]
            found = self._generate([prompts[i] for i in some], generate)
            answers |= dict(zip(some, found, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _generate(self, prompts: Sequence[tuple[int, np.ndarray]], generate: Generate) -> list[list[np.ndarray]]:
        width = max(len(tokens) for _, tokens in prompts)
        ids = np.full((len(prompts), width), self.pad_token, np.int64)
        mask = np.zeros((len(prompts), width), np.int64)
        for row, (_, tokens) in enumerate(prompts):
            ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
        ends = self.model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
        sampling: dict[str, Any] = {"do_sample": False}
        if generate.temperature:
            sampling = {"do_sample": True, "temperature": generate.temperature, "top_p": generate.top_p, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=generate.max_tokens,
            num_return_sequences=generate.answers,
            pad_token_id=self.pad_token,
            eos_token_id=ends,
            suppress_tokens=list(range(self.columns, lm_head(self.model).vocab_size)) or None,
            **sampling,
        )
        device = torch.device(self.engine.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(self.seed, "answers", prompts[0][0]))
            write: Any = self.model.generate
            own, self.model.generation_config = self.model.generation_config, settings  # its own habits do not count
            try:
                written = write(
                    torch.from_numpy(ids).to(device),
                    attention_mask=torch.from_numpy(mask).to(device),
                    logits_processor=LogitsProcessorList([_Sayable(prompts, width, generate.answers)]),
                )
            finally:
                self.model.generation_config = own
        ends = ends if isinstance(ends, list) else [ends]
        rows = [_until(row, ends) for row in written[:, width:].cpu().numpy().astype(np.int32)]
        return [rows[i : i + generate.answers] for i in range(0, len(rows), generate.answers)]


class _Sayable(LogitsProcessor):
    """Changes nothing of what is generated; stops where there is no distribution to take a token from."""

    def __init__(self, prompts: Sequence[tuple[int, np.ndarray]], width: int, answers: int) -> None:
        self.prompts, self.width, self.answers = prompts, width, answers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if (row := _not_finite(scores)) is not None:
            number, prompt = self.prompts[row // self.answers]
            raise _says_nothing(number, len(prompt) + input_ids.shape[1] - self.width - 1, scores[row])
        return scores


def _not_finite(logits: Tensor) -> int | None:
    """The first row that is no distribution: with a logit that is not a number or +∞, or with −∞ alone."""
    wrong = (~logits.amax(-1).isfinite()).nonzero()
    return int(wrong[0]) if len(wrong) else None


def _says_nothing(number: int, position: int, logits: Tensor) -> NonFiniteError:
    wrong = logits.isnan() | (logits == torch.inf)
    return NonFiniteError(
        f"the teacher's logits are not finite in document {number}",
        {
            "position": f"{position} (from 0)",
            "columns": f"{int(wrong.sum()) or len(logits)} of {len(logits)} are "
            f"{'not a number' if logits.isnan().any() else 'infinite' if wrong.any() else '-infinity'}",
        },
        why="It says nothing there that a student could learn. What is in whole shards is kept.",
        fix="Check its weights. Where they are good, teacher.engine.dtype=float32 or another teacher.engine.attention "
        "may mend it, with --overwrite; so may leaving out that document, or one that shares its row. --resume goes on "
        "with the same settings, if the fault was the machine's.",
    )


def _until(tokens: np.ndarray, ends: Sequence[int | None]) -> np.ndarray:
    """The tokens to the first end of sequence, with it."""
    places = np.flatnonzero(np.isin(tokens, [end for end in ends if end is not None]))
    return tokens[: places[0] + 1] if len(places) else tokens


def _seed(seed: int, purpose: str, number: int) -> int:
    digest = hashlib.sha256(f"{purpose} {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

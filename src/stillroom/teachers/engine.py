"""ServerEngine: a model behind an address, in either of two dialects, that scores texts or answers prompts."""

import asyncio
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, StillroomError
from stillroom.teachers.answers import Answer, AnswerReader, TopLogProbs
from stillroom.teachers.client import Connection, Endpoint, connected, in_order
from stillroom.teachers.config import MOST_OPENAI
from stillroom.teachers.vocabulary import Vocabulary

PROBES = (
    ("Once upon a time there was a small dog", "Once upon a time there was a small house"),
    ("The answer is 1 2 3 4 5", "The answer is 1 2 3 4 6"),
    ("aaaa bbbb cccc", "aaaa bbbb dddd"),
)
"""Pairs of texts that part after a common beginning."""

SHIFT = 0.05
"""The share of its mass that a distribution may move by rounding, when a token after it changes."""

Prompt = str | list[dict[str, Any]] | np.ndarray

Request = tuple[int, np.ndarray, np.ndarray]
"""A document's number, its tokens (int [n]) and its loss mask (bool [n − 1]: whether the token after each counts)."""


class ServerEngine:
    """Asks a server for log-probabilities of texts (`score`), and for texts of its own (`generate`).

    The dialect ``vllm`` names tokens by id alone. The dialect ``openai`` is that of every other server: it may take
    token ids or only text, names tokens by their texts, and gives at most 20 of a position. Which of ids and text it
    takes is found out with the first request; a text is sent only where the tokenizer makes the same tokens of it, and
    what the server made of it is compared token by token.

    Args:
        model: the name that the model is served under.
        top: the tokens to request at each position.
        address: of the server, and how it is asked: the settings of `Endpoint`.

    Raises ConfigError; MissingError where the address, the key or ``top`` cannot be used, or httpx is not installed.
    """

    def __init__(
        self,
        *,
        model: str,
        dialect: Literal["vllm", "openai"],
        tokenizer: PreTrainedTokenizerBase,
        top: int,
        **address: Any,
    ) -> None:
        if top < 1 or (dialect == "openai" and top > MOST_OPENAI):
            raise ConfigError(
                "the server cannot be asked for so many tokens of a position",
                {"asked for": top, "possible": f"1 to {MOST_OPENAI}" if dialect == "openai" else "1 or more"},
                why="OpenAI's interface tells no more of them.",
                fix="Set signal.k (or signal.most) to such a number, or use a vLLM server.",
            )
        self.endpoint = Endpoint(**address)
        self.endpoint.key()
        self.model, self.dialect, self.tokenizer, self.top = model, dialect, tokenizer, top
        self.usage, self.vocabulary = self.endpoint.usage, Vocabulary(tokenizer)
        self._as_text: bool | None = False if dialect == "vllm" else None
        self._aligned = False

    def check(self) -> dict[str, Any]:
        """Returns the server's facts: ``model``, ``server`` and ``max_length`` (None where it does not give it).
        Raises MissingError where it cannot be reached, or does not serve the model."""
        with connected(self.endpoint) as (connection, submit):
            payload = submit(connection.ask("/v1/models", None, "its models")).result()
            data = payload.get("data") if isinstance(payload, dict) else None
            models = {m["id"]: m for m in data if isinstance(m, dict) and "id" in m} if isinstance(data, list) else {}
            if self.model not in models:
                raise MissingError(
                    "the server does not serve the model",
                    {"asked for": self.model, "served": ", ".join(map(str, models))[:200] or "none"},
                    why="Another model would be taken for the teacher.",
                    fix="Set teacher.model to a name that is served, and teacher.tokenizer to its tokenizer.",
                )
            server = self.dialect
            if self.dialect == "vllm":
                with suppress(StillroomError):  # a proxy before it may not pass this on
                    version = submit(connection.ask("/version", None, "its version", retries=0)).result()
                    if isinstance(version, dict) and "version" in version:
                        server = f"vllm {version['version']}"
        length = models[self.model].get("max_model_len")
        return {"model": self.model, "server": server, "max_length": length if isinstance(length, int) else None}

    def score(self, documents: Iterable[Request]) -> Iterator[tuple[int, TopLogProbs]]:
        """Yields the top log-probabilities at the kept positions of each document, in the order of the documents.

        The first request of an engine sends two short texts that part at a token, and holds the server to the same
        distribution of that token in both: else it gives at each position the distribution of one position later.

        Args:
            documents: are taken as they are needed, a few times the concurrency in advance.

        Raises:
            StillroomError: it gave up, or its answer does not fit what it was sent; the error names the document.
        """

        async def work(connection: Connection, request: Request) -> tuple[int, TopLogProbs]:
            number, tokens, loss_mask = request
            if len(loss_mask) != max(len(tokens) - 1, 0):
                raise MismatchError(
                    f"document {number} and what is to be learned of it do not fit",
                    {"tokens": len(tokens), "keep": len(loss_mask)},
                    why="Each token but the first is learned or not.",
                    fix="Give one entry of keep for each token after the first.",
                )
            return number, await self._ask_about(connection, f"document {number}", tokens, loss_mask)

        return in_order(self.endpoint, documents, work, lambda connection, _: self._align(connection))

    def generate(
        self,
        prompts: Iterable[tuple[int, Prompt]],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        num_answers: int = 1,
        seed: int | None,
        log_probs: bool = True,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yields its answers to each prompt, in the order of the prompts.

        Each answer has a seed of its own, made of ``seed`` and the prompt's number, so it does not depend on which
        other prompts are asked. The log-probabilities of vLLM and llama.cpp are those at temperature 1.

        Args:
            prompts: number, and a text, a conversation (role and content) or tokens (int [n]).
            log_probs: whether to request the log-probabilities of its own tokens too.

        Raises:
            StillroomError: as for `score`.
        """
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}

        async def first(connection: Connection, item: tuple[int, Prompt]) -> None:
            if isinstance(item[1], np.ndarray):
                await self._negotiate(connection)

        async def work(connection: Connection, item: tuple[int, Prompt]) -> tuple[int, list[Answer]]:
            return item[0], await self._answers(connection, *item, sampling, num_answers, seed, log_probs)

        return in_order(self.endpoint, prompts, work, first)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _ask_about(
        self, connection: Connection, subject: str, tokens: np.ndarray, loss_mask: np.ndarray
    ) -> TopLogProbs:
        reader, vllm = AnswerReader(subject, self.vocabulary, self.top), self.dialect == "vllm"
        if not loss_mask.any():
            return reader.collect([])
        own: dict[str, Any] = {"echo": True, "logprobs": self.top}
        if vllm:
            own = {"prompt_logprobs": self.top, "add_special_tokens": False, "return_token_ids": True}
        payload = await connection.ask("/v1/completions", self._body(tokens, subject) | own, subject)
        (choice,) = reader.choices(payload, 1)
        self._count(payload)
        if vllm:
            return reader.prompt_log_probs(choice, tokens, loss_mask)
        return reader.echoed(choice, tokens, loss_mask, as_text=bool(self._as_text), usage=payload.get("usage"))

    async def _answers(
        self,
        connection: Connection,
        number: int,
        prompt: Prompt,
        sampling: dict[str, Any],
        num_answers: int,
        seed: int | None,
        log_probs: bool,
    ) -> list[Answer]:
        subject = f"prompt {number}"
        reader = AnswerReader(subject, self.vocabulary, self.top)
        chat = isinstance(prompt, list)
        body: dict[str, Any] = {"model": self.model, **sampling}
        body |= {"messages": prompt} if chat else self._prompt(prompt, subject)
        together = self.dialect == "vllm"
        if together:
            body |= {"n": num_answers, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if log_probs or not together:
            top = self.top if log_probs else 1
            body |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
        path = "/v1/chat/completions" if chat else "/v1/completions"

        async def ask(j: int) -> list[Answer]:
            own = {}
            if seed is not None:
                digest = hashlib.sha256(f"answer {seed} {number} {j}".encode()).digest()
                own = {"seed": int.from_bytes(digest[:4], "big") >> 1}
            payload = await connection.ask(path, body | own, subject)
            choices = reader.choices(payload, num_answers if together else 1)
            wrote = self._count(payload)
            wrote = wrote if len(choices) == 1 else None
            return [reader.written(choice, log_probs=log_probs, completion_tokens=wrote) for choice in choices]

        several = await asyncio.gather(*(ask(j) for j in range(1 if together else num_answers)))
        return [answer for some in several for answer in some]

    def _body(self, tokens: np.ndarray, subject: str) -> dict[str, Any]:
        sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        return {"model": self.model, **self._prompt(tokens, subject), **sampling}

    def _prompt(self, prompt: str | np.ndarray, subject: str) -> dict[str, Any]:
        """Returns a text, or the tokens or the text that the server turns into them; it adds the beginning-of-sequence
        token itself. Raises DataError where the tokenizer makes other tokens of that text."""
        if isinstance(prompt, str) or not self._as_text:
            return {"prompt": prompt if isinstance(prompt, str) else prompt.tolist()}
        inner = prompt.tolist()
        if inner and inner[0] == self.tokenizer.bos_token_id:
            inner = inner[1:]
        text: Any = self.tokenizer.decode(inner, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != inner:
            raise DataError(
                f"{subject} cannot be sent to this server",
                {"the server takes": "text alone", "its text": "is tokenized otherwise"},
                why="The server would read other tokens than those that are stored.",
                fix="Use a server that takes token ids, such as vLLM, or leave such rows out.",
            )
        return {"prompt": text}

    def _count(self, payload: dict[str, Any]) -> int | None:
        """Adds to the running count; returns the number of tokens that the server wrote, by its own count."""
        usage = payload.get("usage")
        found = [usage.get(f"{name}_tokens") if isinstance(usage, dict) else None for name in ("prompt", "completion")]
        read, wrote = (value if isinstance(value, int) and value >= 0 else None for value in found)
        self.usage.prompt_tokens += read or 0
        self.usage.completion_tokens += wrote or 0
        return wrote

    # -- finding out about the server ---------------------------------------------------------------------------------

    async def _negotiate(self, connection: Connection) -> None:
        """Finds out whether the server takes token ids or only text.

        Some servers answer 500 to what they do not take, so ids count as not taken where they fail both before and
        after a text that does not.
        """
        if self._as_text is not None:
            return

        async def takes(as_text: bool) -> bool:
            self._as_text = as_text
            body = self._body(self._probe()[0], "a short text")
            with suppress(StillroomError):
                await connection.ask("/v1/completions", body, "a short text", retries=0)
                return True
            return False

        only_text = not await takes(False) and await takes(True) and not await takes(False)
        self._as_text = only_text

    async def _align(self, connection: Connection) -> None:
        """Holds the server to giving a position's distribution as it is before the position is read."""
        if self._aligned:
            return
        await self._negotiate(connection)
        a, b, part = self._probe()
        loss_mask = np.arange(part) == part - 1
        one, other = await asyncio.gather(
            *(self._ask_about(connection, "a short text", tokens, loss_mask) for tokens in (a, b))
        )
        if (moved := moved_mass(one, other)) > SHIFT:
            raise DataError(
                "what the server says of a token depends on that token",
                {"two texts that part at": f"token {part}", "mass that moved there": f"{moved:.2f}"},
                why="So it tells of each position what it thinks one position later, or it answers at random.",
                fix="Use another server or version; llama-cpp-python does so where no beginning of sequence is added.",
            )
        self._aligned = True

    def _probe(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns two short documents that are equal up to a token, and the place of that token, which ends them."""
        for texts in PROBES:
            a, b = (np.array(self.tokenizer(text, verbose=False)["input_ids"], np.int32) for text in texts)
            part = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
            if part >= 2:
                return a[: part + 1], b[: part + 1], part
        raise DataError(
            "the server cannot be tried with this tokenizer",
            {"texts tried": len(PROBES), "that it tells apart": 0},
            why="A short English text is sent first, to see that the server speaks of the right positions.",
            fix="Check teacher.tokenizer.",
        )


def moved_mass(a: TopLogProbs, b: TopLogProbs) -> float:
    """Returns the mass that must move to turn one distribution into the other, by their top tokens: a lower bound."""
    one, other = (dict(zip(x.ids.tolist(), np.exp(x.log_probs.astype(float)), strict=True)) for x in (a, b))
    gained = math.fsum(max(p - other.get(i, min(other.values())), 0) for i, p in one.items())
    lost = math.fsum(max(p - one.get(i, min(one.values())), 0) for i, p in other.items())
    return max(gained, lost)

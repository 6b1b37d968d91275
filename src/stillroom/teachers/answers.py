"""A server's answers, read from their JSON and checked: nothing is lost, guessed or skipped."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.errors import DataError
from stillroom.teachers.vocabulary import Vocabulary

ROUNDING = 1e-3
"""The most by which rounding may lift a log-probability above 0, where it counts as 0, and a mass above 1."""

ENDINGS = ("stop", "length", "eos", "eos_token", "stop_sequence")
"""The reasons why a whole answer ends."""

_TEXT_FIX = (
    "Use a server that tells token ids: vLLM, with teacher.engine.kind=vllm. Otherwise ask for fewer tokens of each "
    "position, or leave such rows out."
)


@dataclass(frozen=True)
class TopLogProbs:
    """The top log-probabilities at ``p`` positions of one document."""

    counts: np.ndarray
    """int32 [p], the number of entries of each position."""
    ids: np.ndarray
    """int32 [e], in falling order of probability, distinct within a position."""
    log_probs: np.ndarray
    """float32 [e], in nats."""
    label_log_probs: np.ndarray
    """float32 [p], of the document's own next token; nan where the server did not give it."""

    @staticmethod
    def concatenate(parts: Sequence["TopLogProbs"]) -> "TopLogProbs":
        """Returns the positions of all the parts in turn."""
        none = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32))
        arrays = zip(none, *((x.counts, x.ids, x.log_probs, x.label_log_probs) for x in parts), strict=True)
        return TopLogProbs(*map(np.concatenate, arrays))

    def padded(self, dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids, int64, and log-probabilities, both [p, k], k at least 1; 0 and −inf where there is none."""
        there = np.arange(max(1, int(self.counts.max(initial=1)))) < self.counts[:, None]
        ids, log_probs = np.zeros(there.shape, np.int64), np.full(there.shape, -np.inf, dtype)
        ids[there], log_probs[there] = self.ids, self.log_probs
        return ids, log_probs


@dataclass(frozen=True)
class Answer:
    """A text that a server wrote."""

    tokens: np.ndarray
    """int32 [m]. The token that ends it is there where the server gives it: vLLM does, most others do not."""
    text: str
    log_probs: TopLogProbs | None
    """Those of its tokens; None where they were not requested."""
    finish_reason: str
    """``stop``: the model ended it. ``length``: it was cut off."""


Position = tuple[dict[int, float], float, int]
"""The log-probabilities given at a position by id, that of its own token (nan where not given), and its own token."""


class AnswerReader:
    """Reads answers to requests about one subject.

    Args:
        subject: what the request was about, for errors: "document 3".
        top: the tokens requested at each position.
    """

    def __init__(self, subject: str, vocabulary: Vocabulary, top: int) -> None:
        self.subject, self.vocabulary, self.top = subject, vocabulary, top

    def choices(self, payload: Any, number: int) -> list[dict[str, Any]]:
        """Returns the ``number`` choices of an answer, in their order."""
        found = payload.get("choices") if isinstance(payload, dict) else None
        found = found if isinstance(found, list) and all(isinstance(choice, dict) for choice in found) else []
        ordered = sorted(found, key=lambda choice: _whole(choice.get("index", 0)) or 0)
        if len(ordered) != number or (number > 1 and [c.get("index") for c in ordered] != list(range(number))):
            raise self.error(
                "the server gave other answers than it was asked for", {"asked for": number, "got": len(found)}
            )
        return ordered

    def prompt_log_probs(self, choice: dict[str, Any], tokens: np.ndarray, loss_mask: np.ndarray) -> TopLogProbs:
        """Returns the kept positions of a prompt, from vLLM's ``prompt_logprobs``."""
        given = choice.get("prompt_logprobs")
        if not isinstance(given, list):
            raise self.error(
                "the server tells no log-probabilities of",
                {"asked for": f"prompt_logprobs={self.top}", "got": "no prompt_logprobs"},
                fix="Use a vLLM server, or teacher.engine.kind=openai for a server that echoes its prompt.",
            )
        self._same_count(len(tokens), len(given))
        read = choice.get("prompt_token_ids")
        if read is not None and read != tokens.tolist():
            raise self._other_tokens("prompt_token_ids")
        found = []
        for i in range(1, len(tokens)):
            own, entries = int(tokens[i]), given[i]
            if not isinstance(entries, dict) or str(own) not in entries:
                raise self._other_tokens(f"position {i}, token {own}")
            if loss_mask[i - 1]:
                by_id = self._by_digits(entries, i)
                found.append((by_id, by_id[own], own))
        return self.collect(found)

    def echoed(
        self, choice: dict[str, Any], tokens: np.ndarray, loss_mask: np.ndarray, *, as_text: bool, usage: Any
    ) -> TopLogProbs:
        """Returns the kept positions of a prompt that the server echoed, from the ``logprobs`` of a completion.

        A server that was sent text may have put the beginning-of-sequence token before it without echoing it; then its
        count of prompt tokens must say so.
        """
        texts, own_values, tops = self._lists(choice)
        hidden = self._hidden(texts, tokens, as_text, usage)
        found = []
        for position in np.flatnonzero(loss_mask):
            i = int(position) + 1 - hidden
            if tops[i] is None or own_values[i] is None:
                raise self.error(
                    "the server does not tell what it expects at the start of",
                    {"position": int(position), "echoed": f"from token {hidden}, with nothing about the first of them"},
                    why="The token after the first one is to be learned, and what the teacher says of it is missing.",
                    fix="Use data in which a prompt comes first (chat, prompt_completion), or a server that takes "
                    "token ids.",
                )
            own = int(tokens[position + 1])
            value = self._value(own_values[i], i)
            found.append((self._by_id(tops[i], i, own, value), value, own))
        return self.collect(found)

    def written(self, choice: dict[str, Any], *, log_probs: bool, completion_tokens: int | None) -> Answer:
        """Returns what the server wrote itself, from a completion or a chat.

        Args:
            completion_tokens: the number of tokens that it wrote, by its own count.
        """
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        reason = choice.get("finish_reason")
        if not isinstance(text, str | None) or not isinstance(reason, str):
            raise self.error(
                "the server's answer has no text, or no reason why it ended, for", {"text": type(text).__name__}
            )
        if reason not in ENDINGS:
            raise self.error(
                "the server broke off its answer to",
                {"finish_reason": reason[:40], "whole answers": ", ".join(ENDINGS)},
                why="Half an answer would be stored as a whole one.",
                fix="See the server's log, and leave such prompts out.",
            )
        given, ids = choice.get("logprobs"), choice.get("token_ids")
        rows = self._rows(given) if isinstance(given, dict) else None
        if isinstance(ids, list) and all(_whole(number) is not None for number in ids):
            tokens = [self._id(number) for number in ids]
        elif rows is not None:
            tokens = [self._resolve(text, data, i) for i, (text, data, _, _) in enumerate(rows)]
        else:
            raise self._none_given()
        missing = 0 if completion_tokens is None else completion_tokens - len(tokens)
        if not 0 <= missing <= (reason != "length"):
            raise self.error(
                "the server told other tokens than it wrote for",
                {"wrote": completion_tokens, "told": len(tokens)},
                fix="Its count of completion tokens must be that of its logprobs; some servers hide special tokens.",
            )
        found = None
        if log_probs:
            if rows is None:
                raise self._none_given()
            self._same_count(len(tokens), len(rows))
            pairs = enumerate(zip(rows, tokens, strict=True))
            found = self.collect([self._row(row, token, i) for i, (row, token) in pairs])
        return Answer(np.array(tokens, np.int32), text or "", found, reason)

    def collect(self, positions: Sequence[Position]) -> TopLogProbs:
        """Returns the positions in arrays, each checked: as many entries as requested, possible probabilities."""
        counts, ids, log_probs, labels = [], [], [], []
        wanted = min(self.top, self.vocabulary.vocab_size)
        for entries, label, own in positions:
            if len(entries) == wanted + 1 and own in entries:  # servers add the own token where it is not at the top
                rest = {number: value for number, value in entries.items() if number != own}
                kept = rest if entries[own] <= min(rest.values(), default=0.0) + ROUNDING else entries
            else:
                kept = entries
            if len(kept) != wanted:
                raise self.error(
                    "the server told another number of tokens than it was asked for of",
                    {"asked for": wanted, "told": len(entries)},
                    why="Positions with fewer entries would be stored as if the rest were all that was left out.",
                    fix="Lower signal.k (or signal.most) to what the server tells, or raise its limit (vLLM: "
                    "--max-logprobs).",
                )
            order = sorted(kept, key=kept.__getitem__, reverse=True)
            if (mass := sum(map(math.exp, kept.values()))) > 1 + ROUNDING:
                raise self.error(
                    "the server tells probabilities that exceed 1 together for", {"sum": f"{mass:.6g}", "most": 1}
                )
            counts.append(len(kept))
            ids.extend(order)
            log_probs.extend(map(kept.__getitem__, order))
            labels.append(label)
        return TopLogProbs(
            np.array(counts, np.int32),
            np.array(ids, np.int32),
            np.array(log_probs, np.float32),
            np.array(labels, np.float32),
        )

    def error(self, what: str, values: dict[str, object], *, why: str = "", fix: str = "") -> DataError:
        """Returns an error about the subject; ``what`` ends where the subject's name follows."""
        return DataError(
            f"{what} {self.subject}",
            values,
            why=why or "A signal must be what the teacher said about exactly these tokens.",
            fix=fix or "Check that the server is of the kind that teacher.engine.kind names, and its log.",
        )

    # -- one position ------------------------------------------------------------------------------------------------

    def _by_digits(self, entries: dict[str, Any], position: int) -> dict[int, float]:
        """Returns vLLM's entries of a position, by id. Most are right, so they are first checked together."""
        try:
            found = {self.vocabulary.by_digits[key]: entry["logprob"] for key, entry in entries.items()}
            values = list(found.values())
            if set(map(type, values)) == {float} and math.isfinite(sum(values)) and max(values) <= 0:
                return found
        except (KeyError, TypeError):
            pass
        return {self._id(key): self._value(entry, position) for key, entry in entries.items()}

    def _by_id(self, entries: Any, position: int, own: int, own_value: float) -> dict[int, float]:
        """Returns the entries of a position, by id: from texts, or from a chat's list of entries.

        An entry with the own token's text and value is the own token, where no other token can hide behind that text.
        Among the ``top`` tokens and the own one, which shares its text with a special token and parts of characters,
        one would be missing. Then there would be fewer than ``top``, or the own one, being outside, the least.
        """
        if isinstance(entries, dict):
            rows = [(text, None, self._value(value, position)) for text, value in entries.items()]
        elif isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            rows = [(entry.get("token"), entry.get("bytes"), self._value(entry, position)) for entry in entries]
        else:
            raise self._unreadable(position)
        values = sorted(value for _, _, value in rows)
        none_hidden = len(values) > self.top or (len(values) == self.top and own_value > values[0])
        found: dict[int, float] = {}
        for text, data, value in rows:
            is_own = none_hidden and value == own_value and self.vocabulary.fits(own, str(text))
            number = own if is_own else self._resolve(text, data, position)
            if number in found:
                raise self._unclear(str(text), position)
            found[number] = value
        return found

    def _row(self, row: tuple[Any, Any, Any, Any], own: int, position: int) -> Position:
        """Returns the position of a token that the server wrote, from (text, bytes, log-probability, top)."""
        text, data, value, top = row
        if not isinstance(text, str) or not (
            self.vocabulary.fits(own, text) or self.vocabulary.id_of(text, data) == own
        ):
            raise self._other_tokens(f"position {position}, token {own}")
        own_value = self._value(value, position)
        return self._by_id(top, position, own, own_value), own_value, own

    def _resolve(self, text: Any, data: Any, position: int) -> int:
        if not isinstance(text, str):
            raise self._unreadable(position)
        number = self.vocabulary.id_of(text, data)
        if number is None:
            raise self._unclear(text, position)
        return number

    def _id(self, value: Any) -> int:
        number = _whole(value)
        if number is None or number not in self.vocabulary.bytes:
            raise self.error(
                "the server names a token that the tokenizer does not have, in",
                {"id": str(value)[:40], "the tokenizer": f"ids below {self.vocabulary.vocab_size}"},
                why="It cannot be stored as one of the tokenizer's, so the server's model has another vocabulary.",
                fix="Set teacher.tokenizer to the tokenizer of the model that is served.",
            )
        return number

    def _value(self, entry: Any, position: int) -> float:
        """Returns a log-probability, given alone or as the ``logprob`` of an entry."""
        value = entry.get("logprob") if isinstance(entry, dict) else entry
        if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= ROUNDING:
            raise self.error(
                "the server tells a log-probability that is none, of",
                {"position": position, "told": str(value)[:40], "possible": "a finite number of at most 0"},
            )
        return min(float(value), 0.0)

    # -- lists of positions ------------------------------------------------------------------------------------------

    def _lists(self, choice: dict[str, Any]) -> tuple[list[str], list[Any], list[Any]]:
        given = choice.get("logprobs")
        names = ("tokens", "token_logprobs", "top_logprobs")
        found = [part for name in names if isinstance(given, dict) and isinstance(part := given.get(name), list)]
        if len(found) < len(names) or len(found[0]) <= 1:
            raise self.error(
                "the server echoes no log-probabilities of",
                {"asked for": f"echo=true, logprobs={self.top}", "got": "none of the prompt"},
                why="It tells those of tokens that it writes itself, not those of a text that it is given.",
                fix="Let it answer first and keep what it says of its own tokens, or use a server with echo, or vLLM.",
            )
        texts, own_values, tops = found
        if not len(texts) == len(own_values) == len(tops) or not all(isinstance(text, str) for text in texts):
            raise self._unreadable(0)
        return texts, own_values, tops

    def _hidden(self, texts: list[str], tokens: np.ndarray, as_text: bool, usage: Any) -> int:
        """Returns how many tokens at the start are not in the echo: 0 or 1."""
        counted = _whole(usage.get("prompt_tokens")) if isinstance(usage, dict) else None
        if counted is not None or as_text:
            self._same_count(len(tokens), counted)
        for hidden in (0, 1) if as_text else (0,):
            num = len(tokens) - hidden
            if len(texts) in (num, num + 1) and all(map(self.vocabulary.fits, tokens[hidden:].tolist(), texts)):
                return hidden
        if len(texts) - len(tokens) not in ((-1, 0, 1) if as_text else (0, 1)):
            self._same_count(len(tokens), len(texts))
        place = next(
            (i for i, (a, b) in enumerate(zip(tokens.tolist(), texts, strict=False)) if not self.vocabulary.fits(a, b)),
            0,
        )
        raise self._other_tokens(f"position {place}, token {int(tokens[place])}")

    def _rows(self, given: dict[str, Any]) -> list[tuple[Any, Any, Any, Any]]:
        """Returns the tokens that a server wrote, as (text, bytes, log-probability, top)."""
        if isinstance(content := given.get("content"), list):
            if not all(isinstance(row, dict) for row in content):
                raise self._unreadable(0)
            return [
                (row.get("token"), row.get("bytes"), row.get("logprob"), row.get("top_logprobs")) for row in content
            ]
        texts, values = given.get("tokens"), given.get("token_logprobs")
        if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
            raise self._none_given()
        tops = given.get("top_logprobs")
        tops = tops if isinstance(tops, list) and len(tops) == len(texts) else [None] * len(texts)
        return [(text, None, value, top) for text, value, top in zip(texts, values, tops, strict=True)]

    def _same_count(self, sent: int, got: int | None) -> None:
        if sent != got:
            raise self.error(
                "the server read another number of tokens than it was sent for",
                {"sent": sent, "the server": "does not say" if got is None else got},
                why="What it says would be joined to the wrong tokens.",
                fix="Set teacher.tokenizer to the tokenizer of the model that is served; a text that is longer than it "
                "takes may have been cut off.",
            )

    def _other_tokens(self, where: str) -> DataError:
        return self.error(
            "the server read other tokens than it was sent for",
            {"first that differs": where},
            why="What it says would be joined to the wrong tokens.",
            fix="Set teacher.tokenizer to the tokenizer of the model that is served.",
        )

    def _unclear(self, text: str, position: int) -> DataError:
        return self.error(
            "a token that the server names by its text could be several, or none, in",
            {"position": position, "text": repr(text[:40])},
            why="A guess would give one token the probability of another.",
            fix=_TEXT_FIX,
        )

    def _unreadable(self, position: int) -> DataError:
        return self.error(
            "the server's log-probabilities are not of the form that was asked for, of", {"from position": position}
        )

    def _none_given(self) -> DataError:
        return self.error(
            "the server does not tell the tokens that it wrote for",
            {"asked for": "logprobs", "got": "none"},
            why="Its text alone does not say which tokens it is made of.",
            fix="Use a server that gives logprobs of the tokens that it writes.",
        )


def _whole(value: Any) -> int | None:
    """Returns a whole number, or its digits, as a number; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"0|[1-9]\d{0,8}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None

"""A server's answers, read from their JSON and checked: nothing is lost, guessed or skipped."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.errors import DataError
from stillroom.teachers.vocabulary import Vocabulary

ROUNDING = 1e-3
"""The most by which rounding may lift a log-probability above 0, where it counts as 0, and a mass above 1."""

ENDINGS = ("stop", "length", "eos", "eos_token", "stop_sequence")
"""The reasons why a whole answer ends."""

_MISREAD = {
    "why": "What it says would be joined to the wrong tokens.",
    "fix": "Set teacher.tokenizer to the tokenizer of the model that is served; a text that is too long may have been "
    "cut off.",
}


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


Row = tuple[Any, Any, Any, Any]
"""A token as a server tells it: text, bytes, log-probability, and the top tokens in its place."""

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
            values = {"asked for": number, "got": len(found)}
            raise self.error("the server gave other answers than it was asked for", values)
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
        by_digits = self.vocabulary.by_digits
        found = []
        for i in range(1, len(tokens)):
            own, entries = int(tokens[i]), given[i]
            if not isinstance(entries, dict) or str(own) not in entries:
                raise self._other_tokens(f"position {i}, token {own}")
            if not loss_mask[i - 1]:
                continue
            by_id, right = dict[int, float](), False
            try:  # most are right, so they are first checked together
                by_id = {by_digits[key]: entry["logprob"] for key, entry in entries.items()}
                values = list(by_id.values())
                right = set(map(type, values)) == {float} and math.isfinite(sum(values)) and max(values) <= 0
            except (KeyError, TypeError):
                pass
            if not right:
                by_id = {self._id(key): self._value(entry, i) for key, entry in entries.items()}
            found.append((by_id, by_id[own], own))
        return self.collect(found)

    def echoed(
        self, choice: dict[str, Any], tokens: np.ndarray, loss_mask: np.ndarray, *, as_text: bool, usage: Any
    ) -> TopLogProbs:
        """Returns the kept positions of a prompt that the server echoed, from the ``logprobs`` of a completion.

        A server that was sent text may have put the beginning-of-sequence token before it without echoing it; then its
        count of prompt tokens must say so.
        """
        rows = self._rows(choice.get("logprobs")) or []
        if len(rows) <= 1 or all(top is None for *_, top in rows):
            raise self.error(
                "the server echoes no log-probabilities of",
                {"asked for": f"echo=true, logprobs={self.top}", "got": "none of the prompt"},
                why="It tells those of tokens that it writes itself, not those of a text that it is given.",
                fix="Let it answer first and keep what it says of its own tokens, or use a server with echo, or vLLM.",
            )
        hidden = self._hidden([text for text, *_ in rows], tokens, as_text, usage)
        found = []
        for position in np.flatnonzero(loss_mask).tolist():
            _, _, value, top = rows[i := position + 1 - hidden]
            if top is None or value is None:
                raise self.error(
                    "the server does not tell what it expects at the start of",
                    {"position": position, "echoed": f"from token {hidden}, with nothing about the first of them"},
                    why="The token after the first one is to be learned, and what the teacher says of it is missing.",
                    fix="Let a prompt come first (chat, prompt_completion), or use a server that takes token ids.",
                )
            own, value = int(tokens[position + 1]), self._value(value, i)
            found.append((self._by_id(top, i, own, value), value, own))
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
            what = "the server's answer has no text, or no reason why it ended, for"
            raise self.error(what, {"text": type(text).__name__})
        if reason not in ENDINGS:
            raise self.error(
                "the server broke off its answer to",
                {"finish_reason": reason[:40], "whole answers": ", ".join(ENDINGS)},
                why="Half an answer would be stored as a whole one.",
                fix="See the server's log, and leave such prompts out.",
            )
        ids, rows = choice.get("token_ids"), self._rows(choice.get("logprobs"))
        if rows is None and (log_probs or not isinstance(ids, list)):
            raise self.error(
                "the server does not tell the tokens that it wrote for",
                {"asked for": "logprobs", "got": "none"},
                why="Its text alone does not say which tokens it is made of.",
                fix="Use a server that gives logprobs of the tokens that it writes.",
            )
        if isinstance(ids, list):
            tokens = [self._id(number) for number in ids]
        else:
            tokens = [self._resolve(text, data, i) for i, (text, data, _, _) in enumerate(rows or [])]
        missing = 0 if completion_tokens is None else completion_tokens - len(tokens)
        if not 0 <= missing <= (reason != "length"):
            raise self.error(
                "the server told other tokens than it wrote for",
                {"wrote": completion_tokens, "told": len(tokens)},
                fix="Its count of completion tokens must be that of its logprobs; some servers hide special tokens.",
            )
        if not log_probs:
            return Answer(np.array(tokens, np.int32), text or "", None, reason)
        self._same_count(len(tokens), len(rows or []))
        found = []
        for i, (own, (told, data, value, top)) in enumerate(zip(tokens, rows or [], strict=True)):
            if not (self.vocabulary.fits(own, told) or self.vocabulary.id_of(told, data) == own):
                raise self._other_tokens(f"position {i}, token {own}")
            found.append((self._by_id(top, i, own, value := self._value(value, i)), value, own))
        return Answer(np.array(tokens, np.int32), text or "", self.collect(found), reason)

    def collect(self, positions: Sequence[Position]) -> TopLogProbs:
        """Returns the positions in arrays, each checked: as many entries as requested, possible probabilities."""
        counts, ids, log_probs, labels = [], [], [], []
        wanted = min(self.top, self.vocabulary.vocab_size)
        for entries, label, own in positions:
            kept = entries
            if len(entries) == wanted + 1 and own in entries:  # servers add the own token where it is not at the top
                rest = {number: value for number, value in entries.items() if number != own}
                kept = rest if entries[own] <= min(rest.values(), default=0.0) + ROUNDING else entries
            if len(kept) != wanted:
                raise self.error(
                    "the server told another number of tokens than it was asked for of",
                    {"asked for": wanted, "told": len(entries)},
                    why="Positions with fewer entries would be stored as if the rest were all that was left out.",
                    fix="Lower signal.k (or signal.most) to what it tells, or raise its limit (vLLM: --max-logprobs).",
                )
            order = sorted(kept, key=kept.__getitem__, reverse=True)
            if (mass := sum(map(math.exp, kept.values()))) > 1 + ROUNDING:
                what = "the server tells probabilities that exceed 1 together for"
                raise self.error(what, {"sum": f"{mass:.6g}", "most": 1})
            counts.append(len(kept))
            ids.extend(order)
            log_probs.extend(map(kept.__getitem__, order))
            labels.append(label)
        whole = (np.array(numbers, np.int32) for numbers in (counts, ids))
        return TopLogProbs(*whole, *(np.array(values, np.float32) for values in (log_probs, labels)))

    def error(self, what: str, values: Mapping[str, object], *, why: str = "", fix: str = "") -> DataError:
        """Returns an error about the subject; ``what`` ends where the subject's name follows."""
        return DataError(
            f"{what} {self.subject}",
            values,
            why=why or "A signal must be what the teacher said about exactly these tokens.",
            fix=fix or "Check that the server is of the kind that teacher.engine.kind names, and its log.",
        )

    # -- one position ------------------------------------------------------------------------------------------------

    def _by_id(self, entries: Any, position: int, own: int, own_value: float) -> dict[int, float]:
        """Returns the entries of a position, by id: from texts, or from a chat's list of entries.

        An entry with the own token's text and value is the own token, where no other token can hide behind that text.
        Among the ``top`` tokens and the own one, which shares its text with a special token and parts of characters,
        one would be missing. Then there would be fewer than ``top``, or the own one, being outside, the least.
        """
        if isinstance(entries, dict):
            rows = [(text, None, self._value(value, position)) for text, value in entries.items()]
        else:
            told = self._told(entries, position)
            rows = [(text, data, self._value(value, position)) for text, data, value, _ in told]
        values = sorted(value for _, _, value in rows)
        none_hidden = len(values) > self.top or (len(values) == self.top and own_value > values[0])
        found: dict[int, float] = {}
        for text, data, value in rows:
            is_own = none_hidden and value == own_value and self.vocabulary.fits(own, text)
            number = own if is_own else self._resolve(text, data, position)
            if number in found:
                raise self._unclear(text, position)
            found[number] = value
        return found

    def _resolve(self, text: str, data: Any, position: int) -> int:
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

    def _hidden(self, texts: list[str], tokens: np.ndarray, as_text: bool, usage: Any) -> int:
        """Returns how many tokens at the start are not in the echo: 0 or 1."""
        counted = _whole(usage.get("prompt_tokens")) if isinstance(usage, dict) else None
        if counted is not None or as_text:
            self._same_count(len(tokens), counted)
        places = (0, 1) if as_text else (0,)
        for hidden in places:
            num = len(tokens) - hidden
            if len(texts) in (num, num + 1) and all(map(self.vocabulary.fits, tokens[hidden:].tolist(), texts)):
                return hidden
        if len(texts) - len(tokens) not in (*(-hidden for hidden in places), 1):
            self._same_count(len(tokens), len(texts))
        fits = list(map(self.vocabulary.fits, tokens.tolist(), texts))
        place = fits.index(False) if False in fits else 0
        raise self._other_tokens(f"position {place}, token {int(tokens[place])}")

    def _rows(self, given: Any) -> list[Row] | None:
        """Returns the tokens of a chat's or a completion's ``logprobs``; None where there are none."""
        if not isinstance(given, dict):
            return None
        if isinstance(content := given.get("content"), list):
            return self._told(content, 0)
        texts, values, tops = (given.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
        if not isinstance(texts, list) or not isinstance(values, list):
            return None
        if len(texts) != len(values) or not all(isinstance(text, str) for text in texts):
            raise self._unreadable(0)
        tops = tops if isinstance(tops, list) and len(tops) == len(texts) else [None] * len(texts)
        return [(text, None, value, top) for text, value, top in zip(texts, values, tops, strict=True)]

    def _told(self, entries: Any, position: int) -> list[Row]:
        """Returns a chat's list of tokens, each an object."""
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("token"), str) for entry in entries
        ):
            raise self._unreadable(position)
        return [(e["token"], e.get("bytes"), e.get("logprob"), e.get("top_logprobs")) for e in entries]

    def _same_count(self, sent: int, got: int | None) -> None:
        if sent != got:
            values = {"sent": sent, "the server": "does not say" if got is None else got}
            raise self.error("the server read another number of tokens than it was sent for", values, **_MISREAD)

    def _other_tokens(self, where: str) -> DataError:
        what = "the server read other tokens than it was sent for"
        return self.error(what, {"first that differs": where}, **_MISREAD)

    def _unclear(self, text: str, position: int) -> DataError:
        return self.error(
            "a token that the server names by its text could be several, or none, in",
            {"position": position, "text": repr(text[:40])},
            why="A guess would give one token the probability of another.",
            fix="Use a server that tells token ids: vLLM, with teacher.engine.kind=vllm. Otherwise ask for fewer "
            "tokens of each position, or leave such rows out.",
        )

    def _unreadable(self, position: int) -> DataError:
        what = "the server's log-probabilities are not of the form that was asked for, of"
        return self.error(what, {"from position": position})


def _whole(value: Any) -> int | None:
    """Returns a whole number, or its digits, as a number; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"0|[1-9]\d{0,8}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None

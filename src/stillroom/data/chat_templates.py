"""Templates that turn rows into text: chat templates, and plain ones with column names in braces."""

import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stillroom.errors import ConfigError, DataError, MissingError, did_you_mean, first_line

Row = dict[str, Any]

Name = Callable[[], str]
"""Gives the row as a message calls it. Finding it may take a while, so it is asked for only where it is needed."""


class Template:
    """A column of each row, or a text with columns in braces: "Question: {question}\\nAnswer: ".

    Args:
        setting: where it was set, for errors.

    Raises ConfigError where it cannot be meant.
    """

    def __init__(self, setting: str, text: str) -> None:
        self.pieces: list[tuple[str, str | None]] = [("", text)]
        """Pairs of what is literal and the column that follows it; a text without braces is the name of a column."""
        if "{" not in text and "}" not in text:
            return
        reason = None
        try:
            parsed = list(Formatter().parse(text))
            if any(column == "" or form or conversion for _, column, form, conversion in parsed):
                reason = "braces must hold the name of a column and nothing else"
            elif all(column is None for _, column, _, _ in parsed):
                reason = "no column is named"
            self.pieces = [(literal, column) for literal, column, _, _ in parsed]
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            raise ConfigError(
                f"the setting `{setting}` is not valid",
                {"text": repr(text), "reason": reason},
                why="It is filled with the columns of each row.",
                fix='Write a column as {column}, as in "Question: {question}\\nAnswer: ", and a brace as {{ or }}.',
            )

    def __call__(self, row: Row, name: Name, hint: str = "") -> str:
        """The text of a row. Raises DataError where it lacks a column, or one does not hold a text."""
        return "".join(
            literal + ("" if column is None else text_in(row, column, name, hint)) for literal, column in self.pieces
        )


def text_in(row: Row, column: str, name: Name, hint: str = "") -> str:
    """The text in a column."""
    value = value_in(row, column, name, hint)
    if isinstance(value, str):
        return value
    raise DataError(
        f"{name()}: the column `{column}` does not hold a text",
        {"expected": "a text", "found": "null" if value is None else f"{value!r:.60} ({type(value).__name__})"},
        why="Nothing is converted or left out, since either would change the data without a word.",
        fix="Mend or delete the row, or name another column.",
    )


def value_in(row: Row, column: str, name: Name, hint: str = "") -> Any:
    """The value in a column; ``hint`` is a setting that would help where it is not there."""
    if column in row:
        return row[column]
    raise DataError(
        f"{name()} has no column `{column}`",
        {"columns there": ", ".join(map(str, row)) or "none", **did_you_mean(column, row)},
        why="Every row must have the columns that the settings name.",
        fix=f"Set {hint}." if hint else "Name the right column in the settings, or mend the row.",
    )


Messages = list[dict[str, Any]]

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "function": "tool"}
"""The roles that are known, those of ShareGPT among them, and what chat templates call them."""


class Rendered(NamedTuple):
    """A row as text, with what of it is to be learned."""

    text: str
    spans: list[tuple[int, int]] | None
    """Spans of characters to learn, ends excluded; None where the whole text is."""


def messages_of(value: object, name: Name) -> Messages:
    """A conversation in the form that chat templates read, from ``role``/``content`` or ShareGPT's ``from``/``value``.

    Raises DataError where it is not a list of messages, or a message has no known role or no text.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _misshapen(name, "has no conversation", {"expected": "a list of messages", "found": found})
    messages: Messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _misshapen(name, f"message {number} is not an object", {"found": type(message).__name__})
        role_key, text_key = ("role", "content") if "role" in message else ("from", "value")
        if role_key not in message:
            raise _misshapen(name, f"message {number} has no role", {"its keys": ", ".join(map(str, message))})
        role, text = message[role_key], message.get(text_key)
        if not isinstance(role, str) or role not in ROLES:
            values = {"found": repr(role), "known": ", ".join(ROLES)}
            raise _misshapen(name, f"message {number} has an unknown role", values)
        if not isinstance(text, str):
            values = {f"expected `{text_key}`": "a text", "found": type(text).__name__}
            raise _misshapen(name, f"message {number} has no text", values)
        rest = {key: item for key, item in message.items() if key not in (role_key, text_key) and item is not None}
        messages.append({"role": ROLES[role], "content": text, **rest})
    return messages


def _misshapen(name: Name, what: str, values: Mapping[str, object]) -> DataError:
    return DataError(
        f"{name()}: {what}",
        values,
        why="A conversation is a list of messages, each with a role and a text.",
        fix='Write each as {"role": "user", "content": "…"} or {"from": "human", "value": "…"}.',
    )


class ChatRenderer:
    """Renders conversations through one chat template and finds the assistant's words in the text.

    A template with ``{% generation %}`` marks says itself what the assistant wrote. Any other is asked turn by turn:
    the assistant's turn i begins where the messages before it, with the generation prompt, end, and ends where the
    messages up to it end, white space after the end of turn left out. That holds only where each of these texts is
    a beginning of the whole, which is checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, keep_all: bool) -> None:
        """Raises MissingError where there is no template."""
        if template is None:
            raise MissingError(
                "there is no chat template for chat data",
                {"tokenizer": tokenizer.name_or_path or "unnamed", "its template": "none"},
                why="Only a template says how roles and turns are written, and a guessed one would teach a wrong form.",
                fix="Use one with a template, add chat_template.jinja to it, or use `format: prompt_completion`.",
            )
        self.tokenizer, self.template, self.keep_all = tokenizer, template, keep_all
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def __call__(self, messages: Messages, name: Name) -> Rendered:
        """The whole conversation as text, with its spans to learn; no span where the assistant said nothing."""
        if self.keep_all:
            return self._render(messages, name)
        if not any(message["content"] for message in messages if message["role"] == "assistant"):
            return Rendered(self._render(messages, name).text, [])
        if self.marked:
            return self._render(messages, name, marked=True)
        text = self._render(messages, name).text
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return Rendered(text, [self._span(text, messages, turn, name) for turn in turns])

    def _render(self, messages: Messages, name: Name, prompt: bool = False, marked: bool = False) -> Rendered:
        """The text, with the spans that the template's own marks give."""
        try:
            if marked:
                special_tokens: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
                texts, spans = render_jinja_template(
                    [messages], chat_template=self.template, return_assistant_tokens_mask=True, **special_tokens
                )
                return Rendered(texts[0], [(int(start), int(end)) for start, end in spans[0]])
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
            return Rendered(str(text), None)
        except Exception as error:
            raise DataError(
                f"{name()}: the chat template refuses the conversation",
                {"reason": first_line(error)},
                why="A template may demand an order of roles, or that a system message is absent.",
                fix="Mend the conversation, or use another template.",
            ) from None

    def _span(self, text: str, messages: Messages, turn: int, name: Name) -> tuple[int, int]:
        """The characters of an assistant's turn. Where it begins the conversation, what is written before its words is
        told by the header that the generation prompt adds to another conversation."""
        if turn:
            before = self._render(messages[:turn], name, prompt=True).text
        else:
            user = [{"role": "user", "content": "?"}]
            asked, prompted = (self._render(user, name, prompt=prompt).text for prompt in (False, True))
            header, first = prompted.removeprefix(asked), self._render(messages[:1], name).text
            if not header or not prompted.startswith(asked) or header not in first:
                raise DataError(
                    f"{name()}: the conversation begins with the assistant",
                    {"generation prompt": repr(header or "none")},
                    why="The chat template does not show where the assistant's first words begin.",
                    fix="Use a template with {% generation %} marks, let the user speak first, or set data.keep=all.",
                )
            before = first[: first.index(header) + len(header)]
        through = text if turn + 1 == len(messages) else self._render(messages[: turn + 1], name).text
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{name()}: the chat template rewrites earlier turns",
                {"the assistant's turn": f"message {turn + 1} of {len(messages)}"},
                why="The text of the first messages does not begin the whole, so the assistant's words are not found.",
                fix="Use a template with {% generation %} marks around the assistant's words, or set data.keep=all.",
            )
        return len(before), max(len(before), len(through.rstrip()))

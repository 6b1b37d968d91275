"""Templates that turn rows into text: chat templates, and plain ones with column names in braces."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from string import Formatter
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stillroom.errors import ConfigError, DataError, MissingError, did_you_mean, first_line
from stillroom.recipe import parse_json

Row = dict[str, Any]

Name = Callable[[], str]
"""Gives the row as a message calls it. Finding it may take a while, so it is asked for only where it is needed."""


class Template:
    """A column of each row, or a text with columns in braces: "Question: {question}\\nAnswer: ".

    A column with a question mark, as in "{instruction}\\n{input?}\\n", may be absent, null or empty: it is written as
    nothing then, and a line that holds nothing else is left out.

    Args:
        setting: where it was set, for errors.

    Raises ConfigError where it cannot be meant.
    """

    def __init__(self, setting: str, text: str) -> None:
        self.lines: list[list[tuple[str, str | None]]] = [[("", text)]]
        """Of each line, pairs of what is literal and the column that follows it; a text without braces is the name of a
        column."""
        if "{" not in text and "}" not in text:
            return
        reason = None
        try:
            lines = [list(Formatter().parse(line)) for line in re.findall("[^\n]*\n|[^\n]+", text)]
            parsed = [piece for line in lines for piece in line]
            if any(column in ("", "?") or form or conversion for _, column, form, conversion in parsed):
                reason = "braces must hold the name of a column and nothing else"
            elif all(column is None for _, column, _, _ in parsed):
                reason = "no column is named"
            self.lines = [[(literal, column) for literal, column, _, _ in line] for line in lines]
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            raise ConfigError(
                f"the setting `{setting}` is not valid",
                {"text": repr(text), "reason": reason},
                why="It is filled with the columns of each row.",
                fix='Write a column as {column}, as in "Question: {question}\\nAnswer: ", one that may be absent as '
                "{column?}, and a brace as {{ or }}.",
            )

    @property
    def columns(self) -> set[str]:
        """The columns that it names."""
        return {column.removesuffix("?") for line in self.lines for _, column in line if column is not None}

    def __call__(self, row: Row, name: Name, hint: str = "") -> str:
        """The text of a row. Raises DataError where it lacks a column, or one does not hold a text."""
        text = ""
        for line in self.lines:
            words = [literal + self._filled(row, column, name, hint) for literal, column in line]
            optional = any(column is not None and column[-1:] == "?" for _, column in line)
            text += "" if optional and not "".join(words).strip() else "".join(words)
        return text

    def _filled(self, row: Row, column: str | None, name: Name, hint: str) -> str:  # kept: for the cases of a column
        if column is None or (column[-1:] == "?" and row.get(column[:-1]) is None):
            return ""
        return text_in(row, column.removesuffix("?"), name, hint)


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


class Conversation(NamedTuple):
    """What a chat template is given of a row."""

    messages: Messages
    learned: tuple[bool, ...]
    """Whether the words of each message are to be learned, where it is the assistant's."""
    rest: dict[str, Any] = {}  # noqa: RUF012
    """What the row holds besides for the template: tools, documents and the template's own settings."""


ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "function": "tool"}
"""The roles that are known, those of ShareGPT among them, and what chat templates call them."""


class Rendered(NamedTuple):
    """A row as text, with what of it is to be learned."""

    text: str
    spans: list[tuple[int, int]] | None
    """Spans of characters to learn, ends excluded; None where the whole text is."""


LEARNED = ("weight", "train", "loss_mask")
"""Keys by which a message says whether it is learned: OpenAI's, and others'."""


def conversation_of(row: Row, column: str, name: Name, roles: Mapping[str, str] = ROLES) -> Conversation:
    """The conversation in a column of a row, with what else the row holds for the template: ``tools``, ``documents``,
    ``chat_template_kwargs``, and a ``system`` text that stands before the messages.

    Args:
        roles: the words for roles that may be found, and what chat templates call them.

    Raises DataError where one of these is not what it should be, or would be passed over.
    """
    messages, learned = messages_of(value_in(row, column, name), name, roles)
    rest: dict[str, Any] = {}
    for key in ("tools", "documents"):
        value = row.get(key)
        with suppress(ValueError):
            value = parse_json(value) if isinstance(value, str) else value  # many data sets keep it as a text
        if value not in (None, [], ""):
            if not isinstance(value, list):
                found = f"{value!r:.60} ({type(value).__name__})"
                raise _misshapen(name, f"its `{key}` are no list", {"expected": "a list of objects", "found": found})
            rest[key] = value
    if isinstance(kwargs := row.get("chat_template_kwargs"), dict):
        rest |= kwargs
    system = row.get("system")
    if isinstance(system, str) and system:
        if messages[0]["role"] == "system" and messages[0]["content"] != system:
            values = {"column `system`": f"{system!r:.60}", "first message": f"{messages[0]['content']!r:.60}"}
            raise _misshapen(name, "it has two system messages", values)
        if messages[0]["role"] != "system":
            messages, learned = [{"role": "system", "content": system}, *messages], (True, *learned)
    if functions := row.get("functions"):
        raise _misshapen(name, "`functions` are not read", {"found": f"{functions!r:.60}", "read": "tools"})
    return Conversation(messages, learned, rest)


def messages_of(value: object, name: Name, roles: Mapping[str, str] = ROLES) -> tuple[Messages, tuple[bool, ...]]:
    """Messages in the form that chat templates read, from ``role``/``content`` or ShareGPT's ``from``/``value``, and
    whether each may be learned.

    Raises DataError where it is not a list of messages, or a message has no known role or no text.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _misshapen(name, "has no conversation", {"expected": "a list of messages", "found": found})
    messages: Messages = []
    learned: list[bool] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _misshapen(name, f"message {number} is not an object", {"found": type(message).__name__})
        role_key, text_key = ("role", "content") if "role" in message else ("from", "value")
        if role_key not in message:
            raise _misshapen(name, f"message {number} has no role", {"its keys": ", ".join(map(str, message))})
        role, text = message[role_key], message.get(text_key)
        if not isinstance(role, str) or role not in roles:
            values = {"found": repr(role), "known": ", ".join(roles), "others are named in": "data.roles"}
            raise _misshapen(name, f"message {number} has an unknown role", values)
        rest = {key: item for key, item in message.items() if key not in (role_key, text_key) and item is not None}
        if calls := rest.get("tool_calls"):
            rest["tool_calls"] = _tool_calls(calls, name, number)
        if "function_call" in rest:
            values = {"found": "function_call", "read": "tool_calls"}
            raise _misshapen(name, f"message {number} calls a function in a way that is not read", values)
        if text is None and calls:
            text = ""  # as OpenAI's own form has it
        if isinstance(text, list):
            text = _joined(text, name, number)
        if not isinstance(text, str):
            values = {f"expected `{text_key}`": "a text", "found": type(text).__name__}
            raise _misshapen(name, f"message {number} has no text", values)
        said = {key: rest.pop(key) for key in LEARNED if key in rest}
        if wrong := {f"message {number}, `{key}`": item for key, item in said.items() if item not in (0, 1)}:
            raise _misshapen(name, f"message {number} does not say whether it is learned", {**wrong, "read": "0 or 1"})
        if any(said.values()) and roles[role] != "assistant":
            found = ", ".join(f"{key}={item}" for key, item in said.items())
            raise _misshapen(name, f"message {number} is to be learned, and is not the assistant's", {"found": found})
        learned.append(all(said.values()))
        messages.append({"role": roles[role], "content": text, **rest})
    return messages, tuple(learned)


def _joined(parts: list[Any], name: Name, number: int) -> str:
    """The text of a message whose content is given in parts, as OpenAI's form has it."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            values = {"found": f"a part of type {kind!r:.40}", "read": '{"type": "text", "text": "…"}'}
            raise _misshapen(name, f"message {number} has a part that is not text, and only text is read", values)
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: object, name: Name, number: int) -> list[Any]:
    """Tool calls whose arguments are objects, as templates read them, whether they came so or as the text of one."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        found = f"{calls!r:.60}"
        raise _misshapen(name, f"message {number} has tool calls that are no list of objects", {"found": found})
    read: list[Any] = []
    for call in calls:
        inner = call.get("function")
        function = inner if isinstance(inner, dict) else call
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments or "{}")
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                values = {"found": f"{function['arguments']!r:.60}", "expected": "an object, or the text of one"}
                raise _misshapen(name, f"message {number} calls a tool with arguments that are no object", values)
            function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if inner is not None else function)
    return read


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

    def __call__(self, conversation: Conversation, name: Name) -> Rendered:
        """The whole conversation as text, with its spans to learn; no span where the assistant said nothing."""
        messages, learned, rest = conversation
        text = self._render(messages, name, rest).text
        self._check_all_used(text, conversation, name)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.keep_all:
            if not all(learned):
                values = {"data.keep": "all", "not to be learned": f"message {learned.index(False) + 1}"}
                raise _misshapen(name, "a message is not to be learned, and data.keep says that all is", values)
            return Rendered(text, None)
        if not any(messages[turn]["content"] or messages[turn].get("tool_calls") for turn in turns):
            return Rendered(text, [])
        if not self.marked:
            return Rendered(text, [self._span(text, messages, turn, name, rest) for turn in turns if learned[turn]])
        rendered = self._render(messages, name, rest, marked=True)
        if all(learned[turn] for turn in turns):
            return rendered
        spans = rendered.spans or []
        if len(spans) != len(turns):
            values = {"assistant's messages": len(turns), "spans that the template marks": len(spans)}
            raise _misshapen(name, "which marked words belong to which message is not known", values)
        return Rendered(text, [span for span, turn in zip(spans, turns, strict=True) if learned[turn]])

    def _check_all_used(self, text: str, conversation: Conversation, name: Name) -> None:
        """Raises DataError where the template passes over tools, documents or tool calls."""
        messages, _, rest = conversation
        without = [{key: item for key, item in message.items() if key != "tool_calls"} for message in messages]
        others = {key: (messages, {k: v for k, v in rest.items() if k != key}) for key in ("tools", "documents")}
        others["tool_calls"] = (without, rest)
        for key, (other, left) in others.items():
            if (other, left) != (messages, rest) and self._render(other, name, left).text == text:
                raise DataError(
                    f"{name()}: the chat template has no place for `{key}`",
                    {"the row has": key, "the template": "writes the same text without"},
                    why="The model would learn an answer to something that it was not shown.",
                    fix=f"Use a template that writes {key}, or take them out of the data.",
                )

    def _render(
        self, messages: Messages, name: Name, rest: dict[str, Any], prompt: bool = False, marked: bool = False
    ) -> Rendered:
        """The text, with the spans that the template's own marks give."""
        try:
            if marked:
                special_tokens: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
                texts, spans = render_jinja_template(
                    [messages],
                    chat_template=self.template,
                    return_assistant_tokens_mask=True,
                    **{**special_tokens, **rest},
                )
                return Rendered(texts[0], [(int(start), int(end)) for start, end in spans[0]])
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt, **rest
            )
            return Rendered(str(text), None)
        except Exception as error:
            raise DataError(
                f"{name()}: the chat template refuses the conversation",
                {"reason": first_line(error)},
                why="A template may demand an order of roles, or that a system message is absent.",
                fix="Mend the conversation, or use another template.",
            ) from None

    def _span(self, text: str, messages: Messages, turn: int, name: Name, rest: dict[str, Any]) -> tuple[int, int]:
        """The characters of an assistant's turn. Where it begins the conversation, what is written before its words is
        told by the header that the generation prompt adds to another conversation."""
        if turn:
            before = self._render(messages[:turn], name, rest, prompt=True).text
        else:
            user = [{"role": "user", "content": "?"}]
            asked, prompted = (self._render(user, name, rest, prompt=prompt).text for prompt in (False, True))
            header, first = prompted.removeprefix(asked), self._render(messages[:1], name, rest).text
            if not header or not prompted.startswith(asked) or header not in first:
                raise DataError(
                    f"{name()}: the conversation begins with the assistant",
                    {"generation prompt": repr(header or "none")},
                    why="The chat template does not show where the assistant's first words begin.",
                    fix="Use a template with {% generation %} marks, let the user speak first, or set data.keep=all.",
                )
            before = first[: first.index(header) + len(header)]
        through = text if turn + 1 == len(messages) else self._render(messages[: turn + 1], name, rest).text
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{name()}: the chat template rewrites earlier turns",
                {"the assistant's turn": f"message {turn + 1} of {len(messages)}"},
                why="The text of the first messages does not begin the whole, so the assistant's words are not found.",
                fix="Use a template with {% generation %} marks around the assistant's words, or set data.keep=all.",
            )
        return len(before), max(len(before), len(through.rstrip()))


_WORDS = "Stillroom"
_PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _WORDS}]


NEVER_STOPS = "no turn of the chat template has an end that is learned, so the student never learns to stop"


def learns_to_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool | None:
    """Whether what is learned of an assistant's turn has an end besides its words, by which a student learns to stop;
    None where there is no template, or it refuses the conversation that this is tried with."""
    if template is None:
        return None
    try:
        text, spans = ChatRenderer(tokenizer, template, keep_all=False)(Conversation(_PROBE, (True, True)), str)
    except DataError:
        return None
    return any(text[start:end].rpartition(_WORDS)[2].strip() for start, end in spans or [])


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """What a template writes after an assistant's words, white space around it left out; None where that is nothing,
    or the template refuses the conversation that this is tried with."""
    if template is None:
        return None
    try:
        renderer = ChatRenderer(tokenizer, template, keep_all=True)
        text = renderer(Conversation(_PROBE, (True, True)), str).text
    except DataError:
        return None
    before, _, after = text.rpartition(_WORDS)
    return after.strip() or None if before else None

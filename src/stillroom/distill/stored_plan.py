"""Offline: whether a store fits the run that is to learn from it, told by its manifest and its tokenizer alone."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import format_setting
from stillroom.data.config import AnyData, StoredDataConfig
from stillroom.errors import ConfigError, DataError, MismatchError
from stillroom.losses.block import check_sparse
from stillroom.losses.config import LOSSES, HiddenObjective, ObjectiveConfig
from stillroom.runs import same_model
from stillroom.store.config import SAMPLED, Full, QuantizedSignal, known_temperatures, side_columns
from stillroom.store.reader import Store
from stillroom.tokenizers import fingerprint, load_tokenizer, required_vocab_size, template_fingerprint, template_of
from stillroom.training.config import BatchConfig
from stillroom.verbs import check_row


def open_stores(
    teacher: str,
    held_out: str | None,
    objectives: Sequence[ObjectiveConfig],
    data: StoredDataConfig,
    batch: BatchConfig,
) -> tuple[Store, Store | None, int]:
    """Returns the store that is learned from, the held-out one, and the tokens of a row, after a look at whether their
    signals serve the objectives and their documents fit into the rows.

    Args:
        teacher, held_out: the stores' places.
        data, batch: the settings as they were loaded, which errors quote.

    Raises:
        MissingError: there is none.
        DataError: it is damaged, or not complete.
        MismatchError: an objective cannot be learned from such signals, or the held-out store is of another teacher or
            vocabulary, or holds the training data.
        ConfigError: its documents are longer than data.length, or `missing` is given for a full store.
    """
    store = _open(teacher, objectives, data.length, data, batch)
    for objective in objectives:
        missing = getattr(objective, "missing", "bucket")
        if missing != "bucket" and isinstance(store.signal_config, Full):
            raise ConfigError(
                f"{objective.kind}.missing has no meaning for a full store",
                {"missing": missing, str(store.path): "signal.kind=full"},
                why="Nothing was left out, so that nobody would read it.",
                fix="Leave out `missing`.",
            )
    length = store.manifest.length if data.length == "auto" else data.length
    if held_out is None:
        return store, None, length
    beside = _open(held_out, objectives, length, data, batch)
    _check_held_out(store, beside)
    return store, beside, length


def _open(
    path: str,
    objectives: Sequence[ObjectiveConfig],
    length: int | Literal["auto"],
    data: StoredDataConfig,
    batch: BatchConfig,
) -> Store:
    store = Store(path)
    if not len(store) and not store.manifest.promised:
        raise DataError(
            f"the store {path} is empty",
            {"documents": 0, "needed": "at least 1"},
            why="There is nothing to learn from or to measure on.",
            fix="Capture more text, or fewer parts.",
        )
    signal = store.signal_config
    if not isinstance(signal, Full):
        check_objectives(objectives, signal, f"the store {path}")
    if length != "auto" and length < (longest := int(store.lengths.max(initial=1)) - 1):
        raise ConfigError(
            "data.length is less than a document of the store",
            {"data.length": shown_length(length, data), f"the longest in {path}": longest},
            why="A document's signals belong to the whole of it; cut, they would speak of what the student cannot see.",
            fix=f"Set data.length to at least {longest}" + ("." if data.length == "auto" else ", or leave it at auto."),
        )
    row = store.manifest.length if length == "auto" else length
    for name, tokens in (("tokens", batch.tokens), ("micro_tokens", batch.micro_tokens)):
        if isinstance(tokens, int):
            check_row(f"batch.{name}", tokens, row, f"{row}, of {path}")
    return store


def shown_length(length: int | Literal["auto"], given: AnyData | StoredDataConfig) -> object:
    """Returns data.length as an error quotes it, by the data's settings as they were loaded."""
    of_store = given.length == "auto" and length != "auto"
    return f"{length}, the teacher's store's" if of_store else format_setting(given, "length")


def check_objectives(objectives: Sequence[ObjectiveConfig], signal: QuantizedSignal, name: str) -> None:
    """Raises MismatchError where one of the objectives cannot be learned from such a signal of ``name``."""
    for objective in objectives:
        if isinstance(objective, HiddenObjective):
            continue
        first, *others = objective.temperatures
        if others and LOSSES[objective.kind].signal != "none":
            raise MismatchError(
                f"{name} cannot follow a temperature that changes",
                {f"{objective.kind}.temperature": f"{first} to {others[0]}", "signal.kind": signal.kind},
                why="What was left out is known at the temperatures that were stored, and at none between them.",
                fix="Give the objective one stored temperature, use a live teacher, or a store of signal.kind=full.",
            )
        check_sparse(
            objective.kind,
            first,
            sampled=signal.kind in SAMPLED,
            temperatures=known_temperatures(signal),
            missing=getattr(objective, "missing", "bucket"),
            name=name,
        )
        has_entropy = "entropy" in side_columns(signal) and signal.kind not in SAMPLED
        if getattr(objective.token_weight, "kind", None) == "teacher_entropy" and not has_entropy:
            raise MismatchError(
                f"{name} does not hold the teacher's entropy",
                {"token_weight": "teacher_entropy", "signal.kind": signal.kind},
                why="From draws it comes with the noise of the loss itself, so that their product is biased; a "
                "truncated signal does not tell it unless it was asked for.",
                fix="Capture with signal.kind=top_k signal.entropy=true, or weigh by student_entropy.",
            )


def _check_held_out(store: Store, held_out: Store) -> None:
    """Raises MismatchError where a held-out store is of another teacher or vocabulary, or holds the training data."""
    ours, theirs = store.manifest, held_out.manifest
    for name in ("teacher", "tokenizer", "num_columns"):
        one, other = (getattr(getattr(m, name), "fingerprint", getattr(m, name)) for m in (ours, theirs))
        if not same_model(one, other):
            raise MismatchError(
                f"the held-out store has another {name.replace('_', ' ')}",
                {"teacher.path": one, "held_out.path": other},
                why="The student would be measured against something else than it learns from.",
                fix="Capture the held-out text with the same teacher.",
            )
    for (data, (i, of)), (other, (j, others)) in product(ours.origins, theirs.origins):
        shared = i * others < (j + 1) * of and j * of < (i + 1) * others  # [i, i + 1) / of meets [j, j + 1) / others
        if data.fingerprint == other.fingerprint and shared:
            raise MismatchError(
                "the held-out store holds the data that are trained on",
                {
                    "teacher.path": f"part {i} of {of} of {data.name}",
                    "held_out.path": f"part {j} of {others} of the same data",
                },
                why="What is measured must not be trained on.",
                fix="Capture other text for held_out"
                + (", or merge the store that is learned from anew without it." if ours.merged else "."),
            )


def load_stored_tokenizer(store: Store) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that a store's documents were made with.

    Raises:
        MismatchError: it, or the chat template that the documents went through, is not the one that the manifest names.
    """
    with TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(store.fetch_tokenizer(Path(folder)))
    named = {"tokenizer": (store.manifest.tokenizer.fingerprint, fingerprint(tokenizer))}
    if store.manifest.template != "none":
        named["chat template"] = store.manifest.template, template_fingerprint(template_of(tokenizer))
    for name, (expected, found) in named.items():
        if found != expected:
            raise MismatchError(
                f"the {name} in the store {store.path} is not the one that it was captured with",
                {"manifest": expected[:16], "found": found[:16]},
                why="The student would be served with another than it was trained on, or read other text.",
                fix="Copy the store again; `stillroom store check` names all that is wrong.",
            )
    return tokenizer


def check_columns(store: Store, student: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Raises MismatchError where the student's head lacks some of the store's columns, or its tokenizer (``whose``, as
    an error names it) needs more."""
    stored, width = store.manifest.num_columns, student.get_text_config().vocab_size
    if not required_vocab_size(tokenizer) <= stored <= width:
        raise MismatchError(
            "the store and the student have different vocabularies",
            {
                "store": f"{stored} columns",
                "student's head": f"{width} columns",
                "tokenizer": f"{required_vocab_size(tokenizer)} tokens: {whose}",
            },
            why="The teacher's distribution is over the store's columns: each must be in the student's head, and each "
            "token must have one.",
            fix="Use a student of the teacher's vocabulary, or capture with teacher.columns that fits both.",
        )

"""Stores that are whole: with the tokenizer that their manifest names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stillroom.store.config import HiddenStatesConfig
from stillroom.store.format import SourceInfo
from stillroom.store.writer import StoreWriter
from stillroom.tokenizers import fingerprint

from .stores import EVERY, add, build_documents, build_manifest, hidden_changes, with_hidden

COLUMNS = 304
LENGTHS = (9, 1, 14, 2, 7, 12, 30, 3)


def make_store(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "head_and_sample",
    /,
    *,
    lengths: Sequence[int] = LENGTHS,
    said: int = 0,
    first: int = 0,
    shard_positions: int = 20,
    complete: bool = True,
    hidden: HiddenStatesConfig | None = None,
    **changes: Any,
) -> Path:
    """A store of a random teacher (another for each ``said``); documents are numbered ``first`` + 10, 13, 16 …"""
    documents = build_documents(EVERY[kind], lengths, columns=COLUMNS, seed=said)
    for document in documents:
        object.__setattr__(document, "number", document.number + first)
    documents = documents if hidden is None else with_hidden(documents, hidden)
    changes |= hidden_changes(hidden)
    named = {
        "tokenizer": SourceInfo(name="tiny", fingerprint=fingerprint(tokenizer)),
        "num_columns": COLUMNS,
        **changes,
    }
    with StoreWriter(path, build_manifest(EVERY[kind], **named), shard_positions=shard_positions) as writer:
        tokenizer.save_pretrained(path / "tokenizer")
        add(writer, documents)
        writer.finish() if complete else writer.flush()
    return path

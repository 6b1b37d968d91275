"""Import: files of top-k log-probabilities that something else wrote, to a store of kind top_k."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stillroom.errors import ConfigError, DataError, MismatchError, MissingError
from stillroom.kernels.selection import Selection, subtracted_rests
from stillroom.recipe import parse_json
from stillroom.runs import versions
from stillroom.store.config import SAMPLED, ImportConfig, TopK, side_columns
from stillroom.store.format import FORMAT, METADATA, TOKENIZER, Manifest, SourceInfo
from stillroom.store.layouts import (
    NAMES,
    Compression,
    ForeignRow,
    LegacyCompression,
    bad,
    name_of,
    opened,
    read_batches,
    read_compression,
    read_rows,
)
from stillroom.store.quantize import quantize
from stillroom.store.writer import StoreWriter, check_out, new_store
from stillroom.tokenizers import fingerprint, load_tokenizer, required_vocab_size

MOST_ENTRIES = 65536


@dataclass
class Imported:
    """The result of an import."""

    manifest: Manifest
    notes: Counter[str] = field(default_factory=Counter)
    """The numbers of positions that were sorted, dropped, or had no next token."""
    labels_kept: int = 0
    """Positions whose next token is among the entries."""

    def __str__(self) -> str:
        m = self.manifest
        share = 100 * self.labels_kept / max(1, m.positions)
        lines = [
            f"imported  {m.documents:,} documents, {m.positions:,} positions, "
            f"{m.entries / max(1, m.positions):.1f} entries a position",
            f"size      {m.size_bytes / 2**20:.1f} MiB, {m.size_bytes / max(1, m.positions):.1f} bytes a position; "
            f"storing cost {m.codec_error_nats:.1e} nats",
            f"fits      the text's own next token is among the entries of {share:.1f}% of the positions",
        ]
        return "\n".join([*lines, *(f"note      {what}: {number:,} positions" for what, number in self.notes.items())])


def import_files(
    paths: Sequence[str],
    config: ImportConfig,
    *,
    overwrite: bool = False,
    report: Callable[[str], object] = lambda _: None,
) -> Imported:
    """Makes the store ``config.out``; it appears when all is read and right, and not before.

    Raises:
        MissingError: a file is not there.
        DataError: a file is damaged, or holds what cannot be log-probabilities.
        MismatchError: the files, the compression settings and the tokenizer do not fit together.
        StorageError: ``out`` exists, or cannot be written.
    """
    check_out(config.out, overwrite=overwrite)
    tokenizer = load_tokenizer(config.tokenizer)
    scanned = scan(paths)
    vocab_size = _vocab_size(config.num_columns, tokenizer, scanned.metadata)
    settings, most_entries = None, scanned.most_entries
    kind = next((kind for kind in (Compression, LegacyCompression) if set(kind.columns) <= scanned.columns), None)
    if config.layout == "plain" or (config.layout == "auto" and kind is None):
        if missing := [" or ".join(known) for name, known in NAMES.items() if not name_of(name, scanned.columns)]:
            raise bad(scanned.files[0], f"there is no column {', '.join(missing)}", sorted(scanned.columns))
    elif kind is None:
        raise MismatchError(
            "the files do not have DistillKit's columns",
            {"found": ", ".join(sorted(scanned.columns)), "wanted": ", ".join(Compression.columns)},
            why="Nothing in them could be decoded.",
            fix="Set layout=plain, or auto.",
        )
    else:
        beside = scanned.files[0].with_name("compression_config.yaml")
        path = beside if config.compression == "auto" else Path(config.compression)
        settings = read_compression(path, kind, vocab_size)
        most_entries = settings.k
    if not 0 < most_entries <= MOST_ENTRIES:
        raise bad(scanned.files[0], f"positions have 1 to {MOST_ENTRIES} entries", most_entries)
    imported = Imported(_manifest(config, scanned, fingerprint(tokenizer), vocab_size, most_entries))
    with new_store(config.out, overwrite=overwrite) as folder, StoreWriter(folder, imported.manifest) as writer:
        tokenizer.save_pretrained(folder / TOKENIZER)
        for number, row in enumerate(read_rows(scanned.files, scanned.columns, settings)):
            report(f"imported {number:,} of {scanned.num_rows:,} rows")
            _add(writer, number, row, config, imported)
        if not writer.num_positions:
            notes = {"rows": scanned.num_rows, **imported.notes}
            fix = "Check the files, and whether `invalid=drop` left out everything."
            raise DataError("no position was imported", notes, why="An empty store teaches nothing.", fix=fix)
        imported.manifest = writer.finish()
    return imported


@dataclass
class Scan:
    """The facts of all the files that are known before any is read whole."""

    files: list[Path] = field(default_factory=list)
    columns: frozenset[str] = frozenset()
    metadata: dict[str, Any] = field(default_factory=dict)
    """The manifest of the store that they were exported from, or nothing."""
    fingerprint: str = ""
    num_rows: int = 0
    most_tokens: int = 0
    most_entries: int = 0
    """The most entries of a position; 0 where the columns do not tell."""


def scan(paths: Sequence[str]) -> Scan:
    """Reads the headers, lengths and checksums of files, and of the .parquet files of folders.

    Raises:
        MissingError: a file is not there.
        DataError: one is not Parquet, or has other columns than the first.
    """
    digest, found = hashlib.sha256(), Scan()
    for path in map(Path, paths):
        found.files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for path in found.files or map(Path, paths):
        if not path.is_file():
            raise MissingError(
                f"{path} is not there" if not path.is_dir() else f"the folder {path} has no .parquet files",
                {"looked for": path.absolute()},
                why="A store is made of what these files hold.",
                fix="Name Parquet files, or a folder of them: `stillroom store import FILE… out=DIR tokenizer=PATH`.",
            )
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        with opened(path) as parquet:
            here, notes = frozenset(parquet.schema_arrow.names), (parquet.schema_arrow.metadata or {}).get(METADATA)
            try:
                notes = {} if notes is None else dict(parse_json(notes))
            except (ValueError, TypeError):
                raise bad(path, "its note of the store that it came from is broken", str(notes)[:60]) from None
            if not found.columns:
                found.columns, found.metadata = here, notes
            if (here, notes) != (found.columns, found.metadata):
                raise bad(path, "columns or their notes differ from those of the first file", sorted(here))
            tokens, ids = name_of("tokens", here), name_of("ids", here)
            if tokens is None:
                raise bad(path, "there is no column of tokens", sorted(here))
            found.num_rows += parquet.metadata.num_rows
            for batch in read_batches(parquet, path, [tokens, *([ids] if ids else [])]):
                found.most_tokens = max([found.most_tokens, *batch[tokens].value_lengths().to_pylist()])
                if ids:
                    found.most_entries = max([found.most_entries, *batch[ids].values.value_lengths().to_pylist()])
    found.fingerprint = digest.hexdigest()[:32]
    return found


def _vocab_size(wanted: int | Literal["auto"], tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> int:
    """The vocabulary of the store; files that were exported from a store must be such that they can be one again."""
    kind, source = ((metadata.get(key) or {}) for key in ("signal", "tokenizer"))
    if kind.get("kind") in SAMPLED:
        raise MismatchError(
            "the files hold a sample of the teacher's distribution",
            {"signal.kind": kind["kind"], "can be imported": "top_k, top_p, full"},
            why="Its weights sum to 1 on average only; taken for the likeliest tokens they would be wrong.",
            fix="Use the store that they were exported from.",
        )
    if metadata and source.get("fingerprint") != fingerprint(tokenizer):
        raise MismatchError(
            "the files are of another tokenizer",
            {"files": str(source.get("fingerprint"))[:32], "tokenizer": fingerprint(tokenizer)[:32]},
            why="Their token ids would be taken for other tokens.",
            fix=f"Use the tokenizer {source.get('name')}.",
        )
    needed = required_vocab_size(tokenizer)
    vocab_size = metadata.get("num_columns", needed) if wanted == "auto" else wanted
    if not isinstance(vocab_size, int) or not needed <= vocab_size < 2**24:
        raise ConfigError(
            f"num_columns={vocab_size} is not possible",
            {"the tokenizer needs": needed, "asked for": vocab_size},
            why="Each of its tokens is a column of the teacher's distribution.",
            fix="Set num_columns=auto, or to the number of columns of the teacher's head.",
        )
    return vocab_size


def _manifest(
    config: ImportConfig, scanned: Scan, tokenizer_fingerprint: str, vocab_size: int, most_entries: int
) -> Manifest:
    known = scanned.metadata
    teacher = known.get("teacher") or {"name": "unknown", "fingerprint": "unknown"}
    data = known.get("data") or {"name": scanned.files[0].name}
    signal = TopK(
        kind="top_k",
        k=most_entries,
        step=config.step,
        label="label_log_prob" in scanned.columns,
        entropy="entropy" in scanned.columns,
        temperatures=tuple(float(c.partition("@")[2]) for c in scanned.columns if c.startswith("log_rest@")),
    )
    return Manifest(
        format=FORMAT,
        complete=False,
        teacher=SourceInfo(**(teacher if not config.teacher else dict.fromkeys(teacher, config.teacher))),
        engine="import",
        tokenizer=SourceInfo(name=config.tokenizer, fingerprint=tokenizer_fingerprint),
        template=known.get("template", "none"),
        data=SourceInfo(name=config.data or data["name"], fingerprint=scanned.fingerprint),
        num_columns=vocab_size,
        length=max(1, scanned.most_tokens - 1),
        signal=signal,
        side=tuple(side_columns(signal)),
        seed=0,
        versions=versions(),
    )


def _wrong(row: ForeignRow, what: str, found: object, possible: object) -> MismatchError:
    return MismatchError(
        f"{row.where} has {what} that cannot be",
        {"found": found, "possible": possible},
        why="The file is of another vocabulary, or is read by other settings than it was written by; so all is wrong.",
        fix="Use the tokenizer, num_columns and compression settings of the capture.",
    )


def _add(writer: StoreWriter, number: int, row: ForeignRow, config: ImportConfig, imported: Imported) -> None:
    """Puts one row into the store; wrong ids and wrong numbers of positions are errors always."""
    signal, vocab_size = writer.manifest.signal, writer.manifest.num_columns
    assert isinstance(signal, TopK)
    places, chosen = _places(row, imported.notes)
    present = np.arange(max(1, int(row.counts.max(initial=0)))) < row.counts[:, None]
    ids, log_probs = np.zeros(present.shape, np.int64), np.full(present.shape, -np.inf)
    ids[present], log_probs[present] = row.ids, row.log_probs
    _check_ids(row, ids, ~np.isneginf(log_probs), vocab_size)  # an entry of probability 0 may have any id
    ids, log_probs = ids[chosen], log_probs[chosen]
    further = {name: values[chosen] for name, values in row.further.items()}
    wrong = _invalid(row, places, log_probs, further, config, vocab_size)
    if wrong.any():
        imported.notes["left out, since what they say cannot be a distribution"] += int(wrong.sum())
        places, ids, log_probs = places[~wrong], ids[~wrong], log_probs[~wrong]
        further = {name: values[~wrong] for name, values in further.items()}
    order = np.argsort(-log_probs, axis=1, kind="stable")
    if unsorted := int((order != np.arange(order.shape[1])).any(1).sum()):
        imported.notes["in another order than their log-probabilities as read, now sorted by those"] += unsorted
    ids, log_probs = np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1)
    labels = row.tokens[places + 1]
    imported.labels_kept += int(((ids == labels[:, None]) & np.isfinite(log_probs)).any(1).sum())
    kept, columns = torch.from_numpy(log_probs), {name: torch.from_numpy(values) for name, values in further.items()}
    rests = {float(name.partition("@")[2] or 1): values for name, values in columns.items() if "log_rest" in name}
    if 1.0 not in rests:  # the file does not state the residual mass, so it is 1 − the mass of the entries
        rests[1.0] = subtracted_rests(kept, vocab_size)
    others = {"entropy": columns.get("entropy"), "label_log_probs": columns.get("label_log_prob")}
    selection = Selection(torch.from_numpy(ids), kept, rests, **others)
    codes, error = quantize(selection, signal, np.zeros((len(ids), 0), np.float32))
    loss_mask = np.zeros(len(row.tokens), bool)
    loss_mask[places] = True
    writer.add(number if row.document is None else row.document, row.tokens.astype(np.int32), loss_mask, codes, error)


def _check_ids(row: ForeignRow, ids: np.ndarray, present: np.ndarray, vocab_size: int) -> None:
    """Raises MismatchError where a token or an id [p, k] is of another vocabulary, or an id is there twice."""
    for name, values in (("tokens", row.tokens), ("ids", ids[present])):
        if len(values) and not 0 <= values.min() <= values.max() < vocab_size:
            raise _wrong(row, name, f"{values.min()} to {values.max()}", f"0 to {vocab_size - 1}")
    pairs = (np.arange(len(ids))[:, None] * vocab_size + ids)[present]
    if len(np.unique(pairs)) < len(pairs):
        raise _wrong(row, "ids", "one twice within a position", "each once")


def _places(row: ForeignRow, notes: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """The positions whose next token is a target, and the index of each one's signal in the row.

    The signals are of these positions; or of all that have a next token; or of all, and then the last one is about a
    token that is not there.
    """
    n, p = len(row.tokens), len(row.counts)
    if row.loss_mask is not None and (len(row.loss_mask) != n or row.loss_mask[-1:].any()):
        raise _wrong(row, "keep or labels", f"{len(row.loss_mask)} values", f"{n}, False for the last")
    target_mask = np.arange(n) < n - 1 if row.loss_mask is None else row.loss_mask
    if row.loss_mask is not None and int(target_mask.sum()) == p:
        return np.flatnonzero(target_mask), np.arange(p)
    if p == n and n:
        notes["of a last token, whose next one is not there, left out"] += 1
    elif p != max(0, n - 1):
        targets = int(target_mask.sum())
        possible = f"{n - 1}, for {n} tokens" if row.loss_mask is None else f"{targets}, which are to be learned"
        raise _wrong(row, "a number of positions", p, possible)
    if others := n - 1 - int(target_mask.sum()):
        notes["not to be learned, left out"] += others
    return np.flatnonzero(target_mask), np.flatnonzero(target_mask)


def _invalid(
    row: ForeignRow,
    places: np.ndarray,
    log_probs: np.ndarray,
    further: Mapping[str, np.ndarray],
    config: ImportConfig,
    vocab_size: int,
) -> np.ndarray:
    """Whether the entries of each position can be of no distribution, bool [p]; DataError where none may be.

    The residual mass lies on tokens no likelier than the entries, so it is at most ``vocab_size`` times as much as the
    middle one of them (the lowest may be an ill fit, or the text's own token; and twice that is let pass).
    """
    falling = -np.sort(-log_probs, axis=1)
    middle = np.maximum(np.isfinite(log_probs).sum(1) - 1, 0) // 2  # of two the larger; −inf where there are none
    middle = np.take_along_axis(falling, middle[:, None], 1)[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):
        mass = np.exp(log_probs).sum(1)
        rising = np.diff(log_probs[:, : row.num_ordered], axis=1) > 1e-6
        wrong = ~(mass <= 1 + config.tolerance) | ~(mass > 0) | rising.any(1)
        wrong |= 1 - mass - config.tolerance > 2 * vocab_size * np.exp(middle)
        for name, values in further.items():
            low, high = (0.0, np.inf) if name == "entropy" else (-np.inf, 1e-6)
            wrong |= ~((values >= low - 1e-6) & (values <= high))
            if not name.startswith("log_rest"):
                wrong |= np.isinf(values)
        if "log_rest" in further:
            wrong |= ~(np.abs(mass + np.exp(further["log_rest"]) - 1) <= max(config.tolerance, 1e-6))
    if config.invalid == "refuse" and wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        values = log_probs[first]
        shown = ", ".join(f"{value:.3g}" for value in values[:6])
        most = f"at most {1 + config.tolerance:g}"
        raise DataError(
            f"{row.where} has log-probabilities that cannot be",
            {
                f"position {places[first]}": f"{shown}{', …' if len(values) > 6 else ''}; mass {mass[first]:.4g}",
                "possible": f"falling, of a mass of {most}, and no more left out than fits below them",
                "wrong in this row": f"{int(wrong.sum())} of {len(wrong)} positions",
            },
            why="They are logits or are read by other settings than they were written by; or the fit that they come "
            "from went wrong.",
            fix="Check the layout and the compression settings; invalid=drop leaves out and counts such positions.",
        )
    return wrong

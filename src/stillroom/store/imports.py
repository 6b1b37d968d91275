"""Import: files of top-k log-probabilities that something else wrote, to a store of kind top_k."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stillroom import tokenizers
from stillroom.errors import ConfigError, DataError, MismatchError
from stillroom.kernels.selection import Selection, subtracted_rests
from stillroom.store.config import SAMPLED, ImportConfig, TopK, side_columns
from stillroom.store.distillkit import CONFIG_FILE, check_vocabulary, read_compression
from stillroom.store.format import FORMAT, TOKENIZER, Manifest, SourceInfo
from stillroom.store.layouts import (
    PACKED,
    PACKED_BEFORE,
    ForeignRow,
    Scan,
    distillkit_rows,
    plain_names,
    plain_rows,
    scan,
)
from stillroom.store.quantize import quantize
from stillroom.store.writer import StoreWriter, check_out, new_store

MOST_ENTRIES = 65536


@dataclass
class Imported:
    """What an import did."""

    manifest: Manifest
    notes: Counter[str] = field(default_factory=Counter)
    """How many positions were sorted, dropped, or had no next token."""
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
    versions: Mapping[str, str] | None = None,
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
    tokenizer = tokenizers.load_tokenizer(config.tokenizer)
    scanned = scan(paths)
    num_columns = _num_columns(config, tokenizer, scanned.metadata)
    rows, most_entries = _read(config, scanned, num_columns)
    signal = _signal(config, scanned, most_entries)
    manifest = _manifest(config, scanned, tokenizer, num_columns, signal, versions)
    imported = Imported(manifest)
    with new_store(config.out, overwrite=overwrite) as folder, StoreWriter(folder, manifest) as writer:
        tokenizer.save_pretrained(folder / TOKENIZER)
        for number, row in enumerate(rows):
            report(f"imported {number:,} of {scanned.num_rows:,} rows")
            _add(writer, number, row, config, signal, imported)
        if not writer.num_positions:
            raise DataError(
                "no position was imported",
                {"rows": scanned.num_rows, **dict(imported.notes)},
                why="An empty store teaches nothing.",
                fix="Check the files, and whether `invalid=drop` left out everything.",
            )
        imported.manifest = writer.finish()
    return imported


def _num_columns(config: ImportConfig, tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> int:
    needed = tokenizers.required_vocab_size(tokenizer)
    if metadata:
        _check_metadata(metadata, tokenizer)
    columns = config.num_columns
    if columns == "auto":
        columns = metadata.get("num_columns", needed)
    if not isinstance(columns, int) or not needed <= columns < 2**24:
        raise ConfigError(
            f"num_columns={columns} is not possible",
            {"the tokenizer needs": needed, "asked for": columns},
            why="Each of its tokens is a column of the teacher's distribution.",
            fix="Set num_columns=auto, or to the number of columns of the teacher's head.",
        )
    return columns


def _check_metadata(metadata: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Of files that were exported from a store: whether they can become one again."""
    kind = (metadata.get("signal") or {}).get("kind")
    if kind in SAMPLED:
        raise MismatchError(
            "the files hold a sample of the teacher's distribution",
            {"signal.kind": kind, "can be imported": "top_k, top_p, full"},
            why="Its weights sum to 1 on average only; taken for the likeliest tokens they would be wrong.",
            fix="Use the store that they were exported from.",
        )
    here = tokenizers.fingerprint(tokenizer)
    there = (metadata.get("tokenizer") or {}).get("fingerprint")
    if there != here:
        raise MismatchError(
            "the files are of another tokenizer",
            {"files": str(there)[:32], "tokenizer": here[:32]},
            why="Their token ids would be taken for other tokens.",
            fix=f"Use the tokenizer {(metadata.get('tokenizer') or {}).get('name')}.",
        )


def _read(config: ImportConfig, scanned: Scan, num_columns: int) -> tuple[Iterator[ForeignRow], int]:
    """The rows, and how many entries a position has at the most."""
    packed, legacy = (set(names) <= scanned.columns for names in (PACKED, PACKED_BEFORE))
    layout = config.layout
    if layout == "auto":
        layout = "distillkit" if packed or legacy else "plain"
    if layout == "plain":
        plain_names(scanned)  # which says where one is not there
        return checked(plain_rows(scanned), num_columns), scanned.most_entries
    if not (packed or legacy):
        raise MismatchError(
            "the files do not have DistillKit's columns",
            {"found": ", ".join(sorted(scanned.columns)), "wanted": ", ".join(PACKED)},
            why="Nothing in them could be decoded.",
            fix="Set layout=plain, or auto.",
        )
    place = scanned.files[0].with_name(CONFIG_FILE) if config.compression == "auto" else Path(config.compression)
    settings = read_compression(place, legacy=not packed)
    check_vocabulary(settings, num_columns)
    return checked(distillkit_rows(scanned, settings), num_columns), settings.k


def _signal(config: ImportConfig, scanned: Scan, most_entries: int) -> TopK:
    if not 0 < most_entries <= MOST_ENTRIES:
        raise DataError(
            "the files cannot be imported as top-k log-probabilities",
            {"entries of a position": most_entries, "possible": f"1 to {MOST_ENTRIES}"},
            why="A position says at least one token, and not all of a large vocabulary.",
            fix="Check that the files hold lists of ids and log-probabilities.",
        )
    temperatures = tuple(float(c.removeprefix("log_rest@")) for c in scanned.columns if c.startswith("log_rest@"))
    return TopK(
        kind="top_k",
        k=most_entries,
        step=config.step,
        label="label_log_prob" in scanned.columns,
        entropy="entropy" in scanned.columns,
        temperatures=temperatures,
    )


def _manifest(
    config: ImportConfig,
    scanned: Scan,
    tokenizer: PreTrainedTokenizerBase,
    num_columns: int,
    signal: TopK,
    versions: Mapping[str, str] | None,
) -> Manifest:
    known = scanned.metadata
    teacher = known.get("teacher") or {"name": "unknown", "fingerprint": "unknown"}
    data = known.get("data") or {"name": scanned.files[0].name}
    return Manifest(
        format=FORMAT,
        complete=False,
        teacher=SourceInfo(
            name=config.teacher or teacher["name"], fingerprint=config.teacher or teacher["fingerprint"]
        ),
        engine="import",
        tokenizer=SourceInfo(name=config.tokenizer, fingerprint=tokenizers.fingerprint(tokenizer)),
        template=known.get("template", "none"),
        data=SourceInfo(name=config.data or data["name"], fingerprint=scanned.fingerprint),
        num_columns=num_columns,
        length=max(1, scanned.most_tokens - 1),
        signal=signal,
        side=tuple(side_columns(signal)),
        seed=0,
        versions=dict(versions or {}),
    )


def checked(rows: Iterator[ForeignRow], num_columns: int) -> Iterator[ForeignRow]:
    """The rows, each found possible; wrong ids and wrong numbers of positions are errors."""
    for row in rows:
        if len(row.tokens) and not 0 <= row.tokens.min() <= row.tokens.max() < num_columns:
            raise _wrong(row, "tokens", f"{row.tokens.min()} to {row.tokens.max()}", f"0 to {num_columns - 1}")
        there = np.isfinite(row.log_probs) | np.isnan(row.log_probs)  # an entry of probability 0 may have any id
        ids, owner = row.ids[there], _owners(row)[there]
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_columns:
            raise _wrong(row, "ids", f"{ids.min()} to {ids.max()}", f"0 to {num_columns - 1}")
        pairs = np.unique(owner * num_columns + ids)
        if len(pairs) < len(ids):
            raise _wrong(row, "ids", "one twice within a position", "each once")
        if row.loss_mask is not None and (len(row.loss_mask) != len(row.tokens) or row.loss_mask[-1:].any()):
            raise _wrong(
                row, "keep or labels", f"{len(row.loss_mask)} values", f"{len(row.tokens)}, False for the last"
            )
        yield row


def _wrong(row: ForeignRow, what: str, found: object, possible: object) -> MismatchError:
    return MismatchError(
        f"{row.where} has {what} that cannot be",
        {"found": found, "possible": possible},
        why="The file is of another vocabulary, or is read by other settings than it was written by; so all is wrong.",
        fix="Use the tokenizer, num_columns and compression settings of the capture.",
    )


def _owners(row: ForeignRow) -> np.ndarray:
    return np.repeat(np.arange(len(row.counts)), row.counts)


def _add(
    writer: StoreWriter, number: int, row: ForeignRow, config: ImportConfig, signal: TopK, imported: Imported
) -> None:
    """Puts one row into the store."""
    places, said = _places(row, imported.notes)
    ids, log_probs = (table[said] for table in _tables(row))
    further = {name: values[said] for name, values in row.further.items()}
    wrong = _invalid(row.num_ordered, log_probs, further, config.tolerance, writer.manifest.num_columns)
    if wrong.any():
        if config.invalid == "refuse":
            raise _refused(row, places, log_probs, wrong, config.tolerance)
        imported.notes["left out, since what they say cannot be a distribution"] += int(wrong.sum())
        places, ids, log_probs = places[~wrong], ids[~wrong], log_probs[~wrong]
        further = {name: values[~wrong] for name, values in further.items()}
    order = np.argsort(-log_probs, axis=1, kind="stable")
    if unsorted := int((order != np.arange(order.shape[1])).any(1).sum()):
        imported.notes["in another order than their log-probabilities as read, now sorted by those"] += unsorted
    ids, log_probs = np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1)
    labels = row.tokens[places + 1]
    imported.labels_kept += int(((ids == labels[:, None]) & np.isfinite(log_probs)).any(1).sum())
    nothing = np.zeros((len(ids), 0), np.float32)
    levels, error = quantize(_selection(ids, log_probs, further, writer.manifest.num_columns), signal, nothing)
    loss_mask = np.zeros(len(row.tokens), bool)
    loss_mask[places] = True
    document = number if row.document is None else row.document
    writer.add(document, row.tokens.astype(np.int32), loss_mask, levels, error)


def _places(row: ForeignRow, notes: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """The positions that are to be learnt, and which of the row's signals is of each.

    The signals are of the positions that are to be learnt; or of all that have a next token; or of all, and then the
    last one speaks of a token that is not there.
    """
    n, p = len(row.tokens), len(row.counts)
    target_mask = np.arange(n) < n - 1 if row.loss_mask is None else row.loss_mask
    if row.loss_mask is not None and int(target_mask.sum()) == p:
        return np.flatnonzero(target_mask), np.arange(p)
    if p == n and n:
        notes["of a last token, whose next one is not there, left out"] += 1
    elif p != max(0, n - 1):
        possible = (
            f"{n - 1}, for {n} tokens" if row.loss_mask is None else f"{int(target_mask.sum())}, which are to be learnt"
        )
        raise _wrong(row, "a number of positions", p, possible)
    if others := n - 1 - int(target_mask.sum()):
        notes["not to be learnt, left out"] += others
    return np.flatnonzero(target_mask), np.flatnonzero(target_mask)


def _tables(row: ForeignRow) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int64 [p, k], and log-probabilities, float64 [p, k]; −inf where a position has fewer."""
    width = max(1, int(row.counts.max(initial=0)))
    there = np.arange(width) < row.counts[:, None]
    ids, log_probs = np.zeros(there.shape, np.int64), np.full(there.shape, -np.inf)
    ids[there], log_probs[there] = row.ids, row.log_probs
    return ids, log_probs


def _invalid(
    num_ordered: int | None,
    log_probs: np.ndarray,
    further: Mapping[str, np.ndarray],
    tolerance: float,
    num_columns: int,
) -> np.ndarray:
    """Which positions say what no distribution can, bool [p].

    What is left out lies on tokens no likelier than the entries, so it is at most ``num_columns`` times as much as the
    middle one of them (the lowest may be an ill fit, or the text's own token; and twice that is let pass).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        mass = np.exp(log_probs).sum(1)
        rising = np.diff(log_probs[:, :num_ordered], axis=1) > 1e-6
        wrong = ~(mass <= 1 + tolerance) | ~(mass > 0) | rising.any(1)
        wrong |= 1 - mass - tolerance > 2 * num_columns * np.exp(_middle(log_probs))
        for name, values in further.items():
            low, high = (0.0, np.inf) if name == "entropy" else (-np.inf, 1e-6)
            wrong |= ~((values >= low - 1e-6) & (values <= high))
            if not name.startswith("log_rest"):
                wrong |= np.isinf(values)
        if "log_rest" in further:
            wrong |= ~(np.abs(mass + np.exp(further["log_rest"]) - 1) <= max(tolerance, 1e-6))
    return wrong


def _middle(log_probs: np.ndarray) -> np.ndarray:
    """The middle one of each position's log-probabilities by size, of two the larger; −inf where there are none."""
    falling = -np.sort(-log_probs, axis=1)
    middle = np.maximum(np.isfinite(log_probs).sum(1) - 1, 0) // 2
    return np.take_along_axis(falling, middle[:, None], 1)[:, 0]


def _refused(
    row: ForeignRow, places: np.ndarray, log_probs: np.ndarray, wrong: np.ndarray, tolerance: float
) -> DataError:
    """The error of the first position that is wrong."""
    first = int(np.flatnonzero(wrong)[0])
    values = log_probs[first]
    with np.errstate(over="ignore"):
        mass = np.exp(values).sum()
    shown = ", ".join(f"{value:.3g}" for value in values[:6])
    return DataError(
        f"{row.where} has log-probabilities that cannot be",
        {
            f"position {places[first]}": f"{shown}{', …' if len(values) > 6 else ''}; mass {mass:.4g}",
            "possible": f"falling, of a mass of at most {1 + tolerance:g}, and no more left out than fits below them",
            "wrong in this row": f"{int(wrong.sum())} of {len(wrong)} positions",
        },
        why="They are logits or are read by other settings than they were written by; or the fit that they come from "
        "went wrong.",
        fix="Check the layout and the compression settings; invalid=drop leaves such positions out and counts them.",
    )


def _selection(
    ids: np.ndarray, log_probs: np.ndarray, further: Mapping[str, np.ndarray], num_columns: int
) -> Selection:
    """The entries, and the mass that they leave out: what the file says of it, or else 1 − their mass."""
    told = {name: torch.from_numpy(values) for name, values in further.items()}
    kept = torch.from_numpy(log_probs)
    rests = {float(name.partition("@")[2] or 1): values for name, values in told.items() if "log_rest" in name}
    if 1.0 not in rests:
        rests[1.0] = subtracted_rests(kept, num_columns)
    return Selection(
        torch.from_numpy(ids),
        kept,
        rests,
        entropy=told.get("entropy"),
        label_log_probs=told.get("label_log_prob"),
    )

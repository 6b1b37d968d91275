"""Show and export: what is in a store, as text for a terminal, with nothing in it that a terminal would obey; and as
plain columns of one Parquet file, which any program reads."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from stillroom.errors import StorageError
from stillroom.runs import writing
from stillroom.store.config import SAMPLED, Full, known_temperatures, side_columns
from stillroom.store.format import METADATA, Manifest, list_array, synced_file
from stillroom.store.quantize import LogProbCodes, hidden_bytes_per_position, log_unit_of, to_sparse
from stillroom.store.reader import Store
from stillroom.terminal import escaped, fitted, width

COLUMNS = 100
SAMPLE_POSITIONS = 50_000
"""Positions over which the histogram is taken."""
CANDIDATES = 8
"""Tokens that are named of each position."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""The numbers at which the histogram's bars begin, where there are too many for a bar each."""
ENTRIES_AT_ONCE = 1 << 20
"""Entries that are in memory at a time in an export."""


def entries_of(
    store: Store, rows: Sequence[int]
) -> tuple[LogProbCodes | None, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """All that some documents say of their kept positions, as flat arrays.

    Returns:
        the codes, which a full store does not have; the number of entries of each position; their ids; their
        log-probabilities, the highest exact ones first; and numbers of each position by name: ``log_rest``, ….
    """
    config = store.signal_config
    if isinstance(config, Full):
        logits = store.logits(rows).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        order = np.argsort(-log_probs, axis=-1, kind="stable")
        counts = np.full(len(logits), logits.shape[1], np.int64)
        return None, counts, order.ravel(), np.take_along_axis(log_probs, order, -1).ravel(), {}
    codes = store.levels(rows)
    sparse = to_sparse(codes, config)
    counts = (codes.counts + codes.sample_counts).astype(np.int64)
    present = np.arange(sparse.ids.shape[1]) < counts[:, None]
    further = {rest_name(temperature): values.numpy() for temperature, values in sparse.log_rests.items()}
    for name, values in (("entropy", sparse.entropy), ("label_log_prob", sparse.label_log_probs)):
        if values is not None:
            further[name] = values.numpy()
    return codes, counts, sparse.ids.numpy()[present], sparse.log_targets()[0].numpy()[present], further


def rest_name(temperature: float) -> str:
    """The column of the log of the residual mass at a temperature."""
    return "log_rest" if temperature == 1.0 else f"log_rest@{temperature!r}"


# --- show ------------------------------------------------------------------------------------------------------------


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function that gives the text of a token in quotation marks; an id that has none is shown by its number."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}

    @lru_cache(1 << 16)
    def text_of(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"<{token}>"
        if piece in special:
            return escaped(piece)
        text = tokenizer.decode([token])
        assert isinstance(text, str)
        if not text or "\ufffd" in text:  # a part of a character
            return f"<{escaped(piece)}>"
        if piece.startswith("▁") and not text[0].isspace():
            text = f" {text}"
        return f"'{escaped(text)}'"

    return text_of


def describe(store: Store) -> str:
    """The store in words: what it is of, its sizes, and a histogram of the entries of a position."""
    m = store.manifest
    n = max(1, m.positions)
    tables = sum(shard.tables_bytes for shard in m.shards)
    tokens = m.tokens * (2 if m.num_columns <= 2**16 else 4)
    columns = [batch["signal"] for shard in store.shards for batch in shard.batches if len(batch)]
    offsets = [np.frombuffer(column.buffers()[1], np.int64, len(column) + 1) for column in columns]
    signal = tables + sum(int(each[-1] - each[0]) for each in offsets)
    part = "" if m.part[1] == 1 else f", part {m.part[0]} of {m.part[1]} (counted from 0)"
    settings = {k: v for k, v in m.signal.model_dump(mode="json").items() if k != "kind" and v not in (False, [])}
    shown = ", ".join(f"{k} {v if v is not True else 'on'}" for k, v in settings.items())
    entries = f"{m.entries / n:.2f} a position"
    if m.signal.kind in SAMPLED:
        entries = f"{m.entries / n:.2f} exact and {m.draws / n:.2f} drawn a position"
    lines = {
        "store": f"{store.path} (format {m.format}, {'complete' if m.complete else 'NOT COMPLETE'})",
        "teacher": f"{m.teacher.name} ({m.teacher.fingerprint[:16]}), {m.num_columns:,} columns, asked by {m.engine}",
        "tokenizer": f"{m.tokenizer.name} ({m.tokenizer.fingerprint[:16]})",
        "template": "none" if m.template == "none" else m.template[:16],
        "data": f"{m.data.name} ({m.data.fingerprint[:16]}){part}, at most {m.length:,} positions a document",
        "signal": f"{m.signal.kind}{f' ({shown})' if shown else ''}; seed {m.seed}",
        "holds": f"{m.documents:,} documents, {m.tokens:,} tokens, {m.positions:,} positions with a signal",
        "hidden": None,
        "shards": f"{len(m.shards)}, {_size(m.size_bytes)} in all",
        "bytes": f"{signal / n:.2f} a position for the signal ({tables / n:.2f} of them tables), "
        f"{tokens / n:.2f} for tokens, {m.size_bytes / n:.2f} in all",
        "entries": entries,
        "error": f"{m.codec_error_nats:.2e} nats a position, by which storing changed what the teacher said",
        "written by": ", ".join(f"{name} {version}" for name, version in m.versions.items()) or None,
    }
    if m.hidden is not None:
        each = hidden_bytes_per_position(m.hidden, m.hidden_width)
        text = f"{m.hidden_width:,} channels of layers {', '.join(map(str, m.hidden.layers))} in {m.hidden.format}"
        lines["hidden"] = f"{text}: {each:,} bytes a position, {_size(each * m.positions)} in all"
    text = "\n".join(x for name, value in lines.items() if value for x in _wrapped(f"{name:12}", escaped(value)))
    if isinstance(m.signal, Full) or not m.positions:
        return text  # all have as many entries by definition
    share = min(1.0, SAMPLE_POSITIONS / m.positions)  # some documents at even distances, if there are very many
    some = np.unique(np.linspace(0, len(store) - 1, max(1, int(len(store) * share))).astype(np.int64)).tolist()
    counts = np.concatenate([codes.counts + codes.sample_counts for codes in (store.levels([row]) for row in some)])
    of = "all" if len(counts) == m.positions else f"{len(counts):,}"
    return "\n".join([text, "", f"entries of a position, over {of} positions", *histogram(counts, COLUMNS)])


def show_row(store: Store, index: int, text_of: Callable[[int], str] | None = None) -> str:
    """A document: each token, and for each kept position what the teacher expected next.

    Args:
        text_of: gives a token's text; by default by the store's own tokenizer.

    Raises:
        IndexError: there is no such document.
    """
    if text_of is None:
        from stillroom.tokenizers import load_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            text_of = token_texts(load_tokenizer(store.fetch_tokenizer(Path(folder))))
    tokens, loss_mask = store.tokens(index), store.loss_mask(index)
    kept = int(loss_mask.sum())
    head = (
        f"document {store.document(index)} of {escaped(store.manifest.data.name)} (row {index} of {len(store)}): "
        f"{len(tokens):,} tokens, {kept:,} positions with a signal in {store.signal_bytes(index):,} bytes"
    )
    candidates = _candidates(store, index, text_of)
    lines = _wrapped("", head)
    if states := store.hidden([index]):
        sizes = [f"{k}: {np.sqrt(np.square(v).mean()):.3g}" if v.size else f"{k}: none" for k, v in states.items()]
        lines += _wrapped("", f"RMS of its hidden states by layer: {', '.join(sizes)}")
    lines.append("")
    for position, token in enumerate(tokens.tolist()):
        text = f"{position:6}  {fitted(text_of(token), 30)}"
        if not loss_mask[position]:
            lines.append(text.rstrip())
            continue
        entries, label, notes = next(candidates)
        lines.append(f"{text} → {fitted(text_of(int(tokens[position + 1])), 30)}  {label}".rstrip())
        lines += _flowed([*entries, f"[{notes}]"], indent=10)
    return "\n".join(lines)


def _candidates(store: Store, index: int, text_of: Callable[[int], str]) -> Iterator[tuple[list[str], str, str]]:
    """Each kept position's most likely tokens with their probabilities, the label's, and further notes."""
    codes, counts, ids, log_probs, further = entries_of(store, [index])
    sampled, about = codes if store.signal_config.kind in SAMPLED else None, ""
    units = np.zeros(0)
    if sampled is not None:
        assert not isinstance(store.signal_config, Full)
        units, about = log_unit_of(sampled.side[:, 0], store.signal_config), "about "
    stops = np.cumsum(counts).tolist()
    for p, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        exact = stop if codes is None else start + int(codes.counts[p])
        best = start + np.argsort(-log_probs[start:stop], kind="stable")[:CANDIDATES]
        names = [f"{text_of(int(ids[i]))} {'~' * (i >= exact)}{_share(log_probs[i])}" for i in map(int, best)]
        if codes is not None and stop - start > CANDIDATES:
            names.append(f"and {stop - start - CANDIDATES} more")
        rests = {name.partition("@")[2]: values[p] for name, values in further.items() if name.startswith("log_rest")}
        notes = [f"rest{at and f' at T={float(at):g}'} {_share(float(value))}" for at, value in rests.items()]
        if sampled is not None:
            notes.append(f"a draw {_share(float(units[p]))}" if sampled.sample_counts[p] else "no draws")
        entropy = further["entropy"][p] if "entropy" in further else None
        if codes is None:
            kept = log_probs[start:stop]
            entropy = -(np.exp(kept) * np.where(np.isfinite(kept), kept, 0)).sum()
        if entropy is not None:
            notes.append(f"entropy {about}{entropy:.2f}")
        label = _share(float(further["label_log_prob"][p])) if "label_log_prob" in further else ""
        yield names, label, ", ".join(notes)


def _share(log_prob: float) -> str:
    """A probability as a percentage."""
    share = 100 * float(np.exp(log_prob))
    if share >= 1 or share == 0:
        return f"{share:.1f}%"
    return f"{share:.2f}%" if share >= 0.01 else "<0.01%"


def _size(size_bytes: int) -> str:
    if size_bytes < 1024:
        return f"{size_bytes} bytes"
    for power, unit in ((1, "KiB"), (2, "MiB")):
        if size_bytes < 1024 ** (power + 1):
            return f"{size_bytes / 1024**power:.1f} {unit}"
    return f"{size_bytes / 2**30:,.1f} GiB"


def histogram(counts: np.ndarray, columns: int) -> list[str]:
    """Bars of text over whole numbers, one line a number, or a range of them where there are many."""
    if not len(counts):
        return []
    low, high = int(counts.min()), int(counts.max())
    starts = list(range(low, high + 1)) if high - low < 24 else [low, *(s for s in SIZES if low < s <= high)]
    tally = np.histogram(counts, [*starts, high + 1])[0]
    names = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in zip(starts, [*starts[1:], high + 1], strict=True)]
    room = columns - 24
    lines = []
    for name, number in zip(names, tally.tolist(), strict=True):
        bar = "█" * round(room * number / int(tally.max())) or ("▏" if number else "")
        lines.append(f"  {name:>9} {100 * number / len(counts):6.2f}%  {bar}".rstrip())
    return lines


def _wrapped(name: str, text: str) -> list[str]:
    """A line with its name; what does not fit goes on below it."""
    return [
        (name if i == 0 else " " * len(name)) + line.strip()
        for i, line in enumerate(_flowed(text.split(" "), 0, COLUMNS - len(name), gap=" "))
    ]


def _flowed(words: Sequence[str], indent: int, columns: int = COLUMNS, gap: str = "   ") -> list[str]:
    """Words in lines of at most so many columns."""
    lines: list[str] = []
    line = ""
    for word in words:
        if line and indent + width(line) + len(gap) + width(word) > columns:
            lines.append(" " * indent + line)
            line = word
        else:
            line = f"{line}{gap}{word}" if line else word
        while indent + width(line) > columns:
            cut = columns - indent
            lines.append(" " * indent + line[:cut])
            line = line[cut:]
    return [*lines, " " * indent + line] if line else lines


# --- export ----------------------------------------------------------------------------------------------------------


def export(
    store: Store, out: str | Path, *, overwrite: bool = False, report: Callable[[str], object] = lambda _: None
) -> int:
    """Writes one row a document, under a temporary name, synced and renamed; returns the file's size in bytes.

    ``ids`` and ``log_probs`` hold one list for each kept position, the most likely exact entries first; those of a
    truncated signal and its ``log_rest`` sum to 1. Those of a sampled one are weights, which sum to 1 on average.
    Hidden states are left out (``left_out``).

    Raises:
        StorageError: the file exists and ``overwrite`` is off, or it cannot be written.
        DataError: the store is damaged.
    """
    path, m = Path(out), store.manifest
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    columns = export_schema(m)
    sizes = np.cumsum(store.lengths * ((m.entries + m.draws) / max(1, m.tokens)))
    with synced_file(path) as file, pq.ParquetWriter(file, columns, compression="zstd") as writer:
        check_file(path, overwrite=overwrite)
        first = 0
        while first < len(store):  # as many documents at a time as have ``ENTRIES_AT_ONCE`` entries, about
            before = sizes[first - 1] if first else 0
            stop = max(first + 1, int(np.searchsorted(sizes, before + ENTRIES_AT_ONCE, side="right")))
            report(f"exported {first:,} of {len(store):,} documents")
            rows, first = range(first, stop), stop
            tokens, loss_masks = [store.tokens(row) for row in rows], [store.loss_mask(row) for row in rows]
            lengths, kept = [len(each) for each in tokens], [int(mask.sum()) for mask in loss_masks]
            _, counts, ids, log_probs, further = entries_of(store, rows)
            arrays = [
                pa.array([store.document(row) for row in rows], pa.int64()),
                list_array(pa.array(np.concatenate(tokens), pa.int32()), lengths),
                list_array(pa.array(np.concatenate(loss_masks), pa.bool_()), lengths),
                list_array(list_array(pa.array(ids, pa.int32()), counts), kept),
                list_array(list_array(pa.array(log_probs, pa.float32()), counts), kept),
                *(list_array(pa.array(further[name], pa.float32()), kept) for name in columns.names[5:]),
            ]
            with writing(path):
                writer.write_table(pa.table(arrays, schema=columns))
    return path.stat().st_size


def left_out(store: Store) -> str | None:
    """The contents of the store that an export does not hold, in words; None where there are none."""
    if not store.layers:
        return None
    return f"the hidden states of layers {', '.join(map(str, store.layers))}: plain columns have no place for them"


def check_file(out: str | Path, *, overwrite: bool) -> None:
    """Raises StorageError where a file must not be written there."""
    path = Path(out)
    if path.is_dir() or (path.exists() and not overwrite):
        raise StorageError(
            f"{path} exists",
            {"out": path, "it is": "a folder" if path.is_dir() else f"a file of {path.stat().st_size:,} bytes"},
            why="Nothing that is there is lost unless you say so.",
            fix="Choose another name." if path.is_dir() else "Use --overwrite, or choose another name.",
        )


def export_schema(manifest: Manifest) -> pa.Schema:
    """The columns of an exported file, with the manifest in its metadata."""
    signal = manifest.signal
    further = [rest_name(temperature) for temperature in known_temperatures(signal)]
    further += ["entropy"] * (signal.kind in SAMPLED or "entropy" in side_columns(signal))
    further += ["label_log_prob"] * ("label" in side_columns(signal))
    fields = [
        ("document", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("keep", pa.list_(pa.bool_())),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("log_probs", pa.list_(pa.list_(pa.float32()))),
        *((name, pa.list_(pa.float32())) for name in further),
    ]
    return pa.schema(fields, metadata={METADATA: manifest.model_copy(update={"shards": ()}).model_dump_json().encode()})

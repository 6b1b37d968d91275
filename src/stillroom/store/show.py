"""Show: what is in a store, as text that a terminal can show, with nothing in it that a terminal would obey."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.store.config import SAMPLED, Full, QuantizedSignal, side_columns
from stillroom.store.quantize import LogProbCodes, hidden_bytes_per_position, log_unit_of, to_sparse
from stillroom.store.reader import Store
from stillroom.terminal import escaped, fitted, width


class TokenTexts:
    """The texts of a tokenizer's tokens, each in quotation marks, by id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.text = lru_cache(1 << 16)(self._text)

    def _text(self, token: int) -> str:
        """The text of a token; an id that has none is shown by its number."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"<{token}>"
        if piece in self._special:
            return escaped(piece)
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        if not text or "\ufffd" in text:  # a part of a character
            return f"<{escaped(piece)}>"
        if piece.startswith("▁") and not text[0].isspace():
            text = f" {text}"
        return f"'{escaped(text)}'"


COLUMNS = 100

SAMPLE_POSITIONS = 50_000
"""Positions over which the histogram is taken."""

CANDIDATES = 8
"""Tokens that are named of each position."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""The numbers at which the histogram's bars begin, where there are too many for a bar each."""


def describe(store: Store) -> str:
    """What the store is, its sizes, and a histogram of the entries of a position."""
    m = store.manifest
    n = max(1, m.positions)
    tables = sum(shard.tables_bytes for shard in m.shards)
    tokens = m.tokens * (2 if m.num_columns <= 2**16 else 4)
    signal = tables
    for batch in (batch for shard in store.shards for batch in shard.batches if len(batch)):
        offsets = np.frombuffer(batch["signal"].buffers()[1], np.int64, len(batch) + 1)
        signal += int(offsets[-1] - offsets[0])
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
    return "\n\n".join([text, *_histogram(store)])


def show_row(store: Store, index: int) -> str:
    """A document in the words of the store's own tokenizer; see ``describe_row``."""
    from stillroom.tokenizers import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return describe_row(store, index, TokenTexts(load_tokenizer(store.fetch_tokenizer(Path(folder)))))


def describe_row(store: Store, index: int, texts: TokenTexts) -> str:
    """A document: each token, and for each kept position what the teacher expected next.

    Raises:
        IndexError: there is no such document.
    """
    tokens, loss_mask = store.tokens(index), store.loss_mask(index)
    kept = int(loss_mask.sum())
    head = (
        f"document {store.document(index)} of {escaped(store.manifest.data.name)} (row {index} of {len(store)}): "
        f"{len(tokens):,} tokens, {kept:,} positions with a signal in {store.signal_bytes(index):,} bytes"
    )
    candidates = _candidates(store, index, texts)
    lines = _wrapped("", head)
    if states := store.hidden([index]):
        sizes = [f"{k}: {np.sqrt(np.square(v).mean()):.3g}" if v.size else f"{k}: none" for k, v in states.items()]
        lines += _wrapped("", f"RMS of its hidden states by layer: {', '.join(sizes)}")
    lines.append("")
    for position, token in enumerate(tokens.tolist()):
        text = f"{position:6}  {fitted(texts.text(token), 30)}"
        if not loss_mask[position]:
            lines.append(text.rstrip())
            continue
        entries, label, notes = next(candidates)
        lines.append(f"{text} → {fitted(texts.text(int(tokens[position + 1])), 30)}  {label}".rstrip())
        lines += _flowed([*entries, f"[{notes}]"], indent=10)
    return "\n".join(lines)


def _candidates(store: Store, index: int, texts: TokenTexts) -> Iterator[tuple[list[str], str, str]]:
    """Each kept position's most likely tokens with their probabilities, the label's, and further notes."""
    config = store.signal_config
    if isinstance(config, Full):
        for logits in store.logits([index]).astype(np.float64):
            log_probs = logits - logits.max()
            log_probs -= np.log(np.exp(log_probs).sum())
            best = np.argsort(-log_probs, kind="stable")[:CANDIDATES]
            entropy = -(np.exp(log_probs) * np.where(np.isfinite(log_probs), log_probs, 0)).sum()
            yield [f"{texts.text(int(i))} {_share(log_probs[i])}" for i in best], "", f"entropy {entropy:.2f}"
        return
    codes = store.levels([index])
    sparse = to_sparse(codes, config)
    log_probs, notes = sparse.log_targets()[0].numpy(), _notes(codes, config)
    for p in range(len(codes)):
        exact, total = int(codes.counts[p]), int(codes.counts[p] + codes.sample_counts[p])
        order = np.argsort(-log_probs[p, :total], kind="stable")
        names = [
            f"{texts.text(int(sparse.ids[p, i]))} {'~' if i >= exact else ''}{_share(log_probs[p, i])}"
            for i in order[:CANDIDATES].tolist()
        ]
        if total > CANDIDATES:
            names.append(f"and {total - CANDIDATES} more")
        label = "" if sparse.label_log_probs is None else _share(float(sparse.label_log_probs[p]))
        yield names, label, notes[p]


def _notes(codes: LogProbCodes, config: QuantizedSignal) -> list[str]:
    """Each position's residual mass or the weight of a sample, and its entropy."""
    sparse, names = to_sparse(codes, config), side_columns(config)
    columns: list[list[str]] = []
    for temperature, residual in sparse.log_rests.items():
        at = "" if temperature == 1.0 else f" at T={temperature:g}"
        columns.append([f"rest{at} {_share(value)}" for value in residual.tolist()])
    if "unit" in names:
        units = zip(log_unit_of(codes.side[:, names.index("unit")], config), codes.sample_counts, strict=True)
        columns.append([f"a draw {_share(unit)}" if sampled else "no draws" for unit, sampled in units])
    if sparse.entropy is not None:
        about = "about " if sparse.sampled else ""
        columns.append([f"entropy {about}{value:.2f}" for value in sparse.entropy.tolist()])
    return [", ".join(parts) for parts in zip(*columns, strict=True)]


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


def _histogram(store: Store) -> list[str]:
    """The numbers of entries of the positions, as bars of text; nothing where all have as many by definition.

    The documents are some at even distances if there are very many.
    """
    if isinstance(store.signal_config, Full) or not store.manifest.positions:
        return []
    share = min(1.0, SAMPLE_POSITIONS / store.manifest.positions)
    rows = np.unique(np.linspace(0, len(store) - 1, max(1, int(len(store) * share))).astype(np.int64)).tolist()
    levels = (store.levels([row]) for row in rows)
    counts = np.concatenate([(each.counts + each.sample_counts).astype(np.int64) for each in levels])
    of = "all" if len(counts) == store.manifest.positions else f"{len(counts):,}"
    return ["\n".join([f"entries of a position, over {of} positions", *histogram(counts, COLUMNS)])]


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

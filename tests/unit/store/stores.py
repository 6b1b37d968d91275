"""Tiny stores: signals of every kind of random teachers, documents, and folders of shards."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stillroom.errors import StillroomError
from stillroom.kernels.selection import Selection, head_and_sample, sampled, top_k, top_p
from stillroom.runs import seal
from stillroom.store.check import check_shard
from stillroom.store.config import AnySignal, Full, HeadAndSample, HiddenStatesConfig, Sampled, TopK, TopP, side_columns
from stillroom.store.format import Manifest, SourceInfo, format_of
from stillroom.store.quantize import LogProbCodes, encode_hidden, num_uniforms, quantize
from stillroom.store.reader import Store
from stillroom.store.writer import StoreWriter

CONFIGS: dict[str, AnySignal] = {
    "top_k": TopK(kind="top_k", k=6, entropy=True, temperatures=(2.0,), label=True),
    "top_p": TopP(kind="top_p", mass=0.9, most=7),
    "sampled": Sampled(kind="sampled", draws=5, label=True),
    "head_and_sample": HeadAndSample(kind="head_and_sample", head=4, draws=3),
    "all_head_and_sample": HeadAndSample(kind="head_and_sample", head=4, draws=3, least=0.0),
}
"""Of the kinds that are quantised."""
FULL = Full(kind="full")
EVERY: dict[str, AnySignal] = {**CONFIGS, "full": FULL}
COLUMNS = 23
WIDTH, NUM_LAYERS = 6, 3
"""Of the teacher's inner states, where there are some."""
INT8 = HiddenStatesConfig(layers=("final_norm", 1, "embeddings"))
BFLOAT16 = HiddenStatesConfig(layers=(2, 0), format="bfloat16")


def random_logits(n: int, v: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


def random_uniforms(n: int, config: AnySignal, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, num_uniforms(config)), np.float32)


def select(logits: torch.Tensor, config: AnySignal, uniforms: np.ndarray) -> Selection:
    """What a config keeps of some logits, with entropy and labels (column 0) known."""
    logs, logits = logits.log_softmax(-1), logits.clone()
    match config:
        case TopK():
            selection = top_k(logits, config.k, (1.0, *config.temperatures))
        case TopP():
            selection = top_p(logits, config.mass, config.most, (1.0, *config.temperatures))
        case Sampled():
            selection = sampled(logits, torch.from_numpy(uniforms[:, : config.draws].copy()))
        case HeadAndSample():
            first = torch.from_numpy(uniforms[:, 0].copy())
            selection = head_and_sample(logits, config.head, config.draws, config.least, first)
        case _:
            raise AssertionError(config)
    entropy = torch.special.entr(logs.exp()).sum(-1)
    return dataclasses.replace(selection, entropy=entropy, label_log_probs=logs[:, 0])


@dataclass(frozen=True)
class Document:
    """What a writer is given of one document."""

    number: int
    tokens: np.ndarray
    loss_mask: np.ndarray
    signal: LogProbCodes | np.ndarray
    error_nats: float
    hidden: bytes | None = None


def build_documents(
    config: AnySignal, lengths: Sequence[int] = (9, 1, 14, 2, 7, 12, 30, 3), *, columns: int = COLUMNS, seed: int = 0
) -> list[Document]:
    """Documents of random tokens; the first third of each is not learned, and of a document of one token nothing is."""
    generator, documents = np.random.default_rng(seed), []
    for number, length in enumerate(lengths):
        tokens = generator.integers(0, columns, length, dtype=np.int32)
        loss_mask = np.arange(length) >= length // 3
        loss_mask[-1:] = False
        logits = random_logits(int(loss_mask.sum()), columns, seed=1000 * seed + number)
        if isinstance(config, Full):
            signal, error = logits.numpy(), 0.0
        elif len(logits):
            uniforms = random_uniforms(len(logits), config, seed=number)
            signal, error = quantize(select(logits, config, uniforms), config, uniforms)
        else:
            none, side = np.zeros(0, np.int32), np.zeros((0, len(side_columns(config))), np.int32)
            signal, error = LogProbCodes(none, none, none, none, none, none, side), 0.0
        documents.append(Document(10 + 3 * number, tokens, loss_mask, signal, error))
    return documents


def build_states(document: Document, config: HiddenStatesConfig) -> torch.Tensor:
    """Inner states of its kept positions, float32 [layers, kept, WIDTH], of very different sizes."""
    generator = torch.Generator().manual_seed(document.number)
    shape = len(config.layers), int(document.loss_mask.sum())
    states = torch.randn(*shape, WIDTH, generator=generator)
    return states * torch.randn(*shape, 1, generator=generator).mul(3).exp()


def with_hidden(documents: Sequence[Document], config: HiddenStatesConfig) -> list[Document]:
    """The same documents, with inner states."""
    return [dataclasses.replace(d, hidden=encode_hidden(build_states(d, config), config)) for d in documents]


def hidden_changes(config: HiddenStatesConfig | None) -> dict[str, Any]:
    """What differs in the manifest of a store with inner states."""
    return {} if config is None else {"hidden": config, "hidden_width": WIDTH, "num_layers": NUM_LAYERS}


def build_manifest(config: AnySignal, **changes: Any) -> Manifest:
    """Of a store that is not yet written."""
    values: dict[str, Any] = {
        "format": format_of(changes.get("hidden")),
        "complete": False,
        "teacher": SourceInfo(name="a teacher", fingerprint="11"),
        "engine": "transformers",
        "tokenizer": SourceInfo(name="a tokenizer", fingerprint="22"),
        "template": "none",
        "data": SourceInfo(name="text.jsonl", fingerprint="33"),
        "num_columns": COLUMNS,
        "length": 64,
        "signal": config,
        "side": tuple(side_columns(config)),
        "seed": 5,
        "versions": {"stillroom": "0"},
    }
    return Manifest(**{**values, **changes})


def write(
    path: Path, config: AnySignal, documents: Sequence[Document], shard_positions: int = 10, **changes: Any
) -> Path:
    """A complete store."""
    with StoreWriter(path, build_manifest(config, **changes), shard_positions=shard_positions) as writer:
        add(writer, documents)
        writer.finish()
    return path


def add(writer: StoreWriter, documents: Sequence[Document]) -> None:
    for d in documents:
        writer.add(d.number, d.tokens, d.loss_mask, d.signal, d.error_nats, d.hidden)


def equal(a: LogProbCodes | np.ndarray, b: LogProbCodes | np.ndarray) -> bool:
    """Whether two signals say the same; the order of draws has no meaning."""
    if not (isinstance(a, LogProbCodes) and isinstance(b, LogProbCodes)):
        return np.array_equal(a, b)
    return all(np.array_equal(x, y) for x, y in zip(_in_order(a), _in_order(b), strict=True))


def _in_order(levels: LogProbCodes) -> tuple[np.ndarray, ...]:
    owner = np.repeat(np.arange(len(levels)), levels.sample_counts)
    order = np.lexsort((levels.sample_ids, owner))
    plain = (levels.counts, levels.ids, levels.levels, levels.sample_counts, levels.side)
    return (*plain, levels.sample_ids[order], levels.sample_repeats[order])


def signal_of(store: Store, index: int) -> LogProbCodes | np.ndarray:
    return store.logits([index]) if isinstance(store.signal_config, Full) else store.levels([index])


def says(store: Store, documents: Sequence[Document]) -> bool:
    """Whether a store holds exactly these documents."""
    if len(store) != len(documents):
        return False
    for i, d in enumerate(documents):
        signal = signal_of(store, i)
        same = store.document(i) == d.number and np.array_equal(store.tokens(i), d.tokens)
        if not (same and np.array_equal(store.loss_mask(i), d.loss_mask) and equal(signal, d.signal)):
            return False
    return True


def files(path: Path) -> dict[str, bytes]:
    """All files of a folder but the lock."""
    return {f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.name != ".lock"}


def change_manifest(path: Path, change: Any) -> None:
    """Applies ``change`` to the manifest's JSON values, as somebody would who means harm: all else fits."""
    file = path / "manifest.json"
    values = json.loads(file.read_bytes())
    change(values)
    file.write_text(json.dumps(seal(values)))


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Puts other bytes in the place of a shard's file, and their size and checksum into the manifest."""
    (path / name).write_bytes(data)
    number, kind = name.split(".")
    size, checksum = ("size_bytes", "crc32") if kind == "arrow" else ("tables_bytes", "tables_crc32")

    def change(values: dict[str, Any]) -> None:
        values["shards"][int(number)].update({size: len(data), checksum: zlib.crc32(data)})

    change_manifest(path, change)


def read_table(path: Path, name: str = "00000.arrow") -> pa.Table:
    with pa.ipc.open_file((path / name).read_bytes()) as reader:
        return reader.read_all()


def arrow_bytes(table: pa.Table, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def verify(store: Store, number: int) -> None:
    """Raises the first thing that a check finds wrong with a shard."""
    problems: list[StillroomError] = []
    check_shard(store.files, store.manifest, number, problems)
    for problem in problems:
        raise problem

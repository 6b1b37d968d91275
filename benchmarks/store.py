"""The store: bytes, exactness, speed, and what capturing and reading it cost, beside plain top-k in bfloat16.

Teacher stories3M, tinystories_valid, length 256; and a random-weight head of 128,256 columns. One run measures all, so
that every ratio is of numbers taken on the same machine at the same time.

    python benchmarks/store.py [--documents 1191] [--repeats 5]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import data_folder, machine, save

from stillroom.capture.signals import Document, SignalCapture, batches, windows
from stillroom.data.config import TextData
from stillroom.data.dataset import Documents, prepare
from stillroom.kernels import selection
from stillroom.lm_head import LMHead
from stillroom.losses.config import LOSSES
from stillroom.losses.objective import Objective
from stillroom.models import loading
from stillroom.models.hidden_states import last_hidden_states, lm_head
from stillroom.store.codec import Codec
from stillroom.store.config import HeadAndSample, TopK, side_columns
from stillroom.store.format import FORMAT, Manifest, SourceInfo
from stillroom.store.quantize import LogProbCodes, num_uniforms, quantize, to_sparse
from stillroom.store.reader import Store
from stillroom.store.writer import StoreWriter
from stillroom.teachers.live import LiveTeacher
from stillroom.tokenizers import load_tokenizer

TOP_K, DEFAULT = TopK(kind="top_k"), HeadAndSample(kind="head_and_sample")
FIXED = HeadAndSample(kind="head_and_sample", head=16, draws=8, least=0.0)
"""24 entries at every position, which the bars of speed are for."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=1191)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-large", action="store_true")
    options = parser.parse_args()
    loading.quiet()
    data = data_folder()
    tokenizer = load_tokenizer(str(data / "models/stories3M"))
    settings = TextData(format="text", path=str(data / "text/tinystories_valid.jsonl"), length=256)
    documents = prepare(settings, tokenizer)
    model = loading.load_model(str(data / "models/stories3M"), dtype=torch.float32)
    stop = min(len(documents), options.documents)
    result: dict[str, Any] = {"machine": machine(), "documents": stop, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        for name, signal in (("top_k 50", TOP_K), ("default", DEFAULT)):
            store = capture(model, documents, stop, signal, Path(folder) / name)
            result[name] = sizes(store) | exactness(model, documents, store)
            print(name, result[name], flush=True)
    result["unbiasedness"] = unbiasedness(model, documents)
    print("unbiasedness", result["unbiasedness"], flush=True)
    result["codec"] = codec_speed(model, documents, options.repeats)
    print("codec", result["codec"], flush=True)
    result["capture"] = capture_overhead(model, documents, stop, options.repeats)
    print("capture", result["capture"], flush=True)
    result["training"] = step_time(model, documents, options.repeats)
    print("training", result["training"], flush=True)
    if not options.skip_large:
        result["128,256 columns"] = large_vocabulary(options.repeats)
        print("large", result["128,256 columns"], flush=True)
    save(__file__, result)


def teacher_of(model: Any, signal: Any) -> SignalCapture:
    return SignalCapture(
        LiveTeacher(model), signal, vocab_size=4096, seed=0, length=256, pack=True, batch_tokens=16384,
        logits_bytes=8 * 2**20,
    )  # fmt: skip


def capture(model: Any, documents: Documents, stop: int, signal: Any, path: Path) -> Store:
    some = SourceInfo(name="stories3M", fingerprint="0")
    manifest = Manifest(
        format=FORMAT, complete=False, teacher=some, engine="transformers", tokenizer=some, template="none", data=some,
        vocab_size=4096, length=256, signal=signal, side=tuple(side_columns(signal)), seed=0,
    )  # fmt: skip
    teacher = teacher_of(model, signal)
    with StoreWriter(path, manifest) as writer:
        for window in windows(documents, 0, stop):
            for document, (levels, error) in zip(window, teacher.capture(window), strict=True):
                writer.add(document.number, document.tokens, document.loss_mask, levels, error)
        writer.finish()
    return Store(path)


def sizes(store: Store) -> dict[str, Any]:
    m = store.manifest
    signal = sum(store.signal_bytes(i) for i in range(len(store)))
    tables = sum(shard.tables_bytes for shard in m.shards)
    return {
        "positions": m.positions,
        "bytes_per_position": m.size_bytes / m.positions,
        "of_which": {
            "signal": signal / m.positions,
            "tables": tables / m.positions,
            "tokens, keep and Arrow": (m.size_bytes - signal - tables) / m.positions,
        },
        "entries_per_position": (m.entries + m.draws) / m.positions,
        "codec_error_nats": m.codec_error_nats,
    }


def exactness(model: Any, documents: Documents, store: Store, most: int = 200) -> dict[str, Any]:
    """What is read back, against the teacher's own logits: the KL with the bucket, and positions whose order broke."""
    total, broken, positions = 0.0, 0, 0
    for window in windows(documents, 0, min(most, len(store))):
        for document, logits in zip(window, logits_of(model, window), strict=True):
            read = to_sparse(store.levels([document.number]), store.signal_config)
            log_p = torch.log_softmax(logits.double(), -1)
            if not read.sampled:
                log_t = log_p.gather(1, read.ids)
                rest = log_p.scatter(1, read.ids, -torch.inf).logsumexp(-1)
                log_read, rest_read = (x.double() for x in read.log_targets())
                total += float((log_t.exp() * (log_t - log_read)).sum())
                total += float((rest.exp() * (rest - rest_read)).nan_to_num(0).sum())
                broken += int(((log_t.diff(dim=1) > 1e-5) | (log_read.diff(dim=1) > 0)).any(1).sum())
            positions += len(log_p)
    if store.signal_config.kind != "top_k":
        return {}
    return {"kl_with_bucket_nats": total / positions, "positions_with_broken_order": broken, "compared": positions}


@torch.no_grad()
def logits_of(model: Any, window: list[Document]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch in batches(window, length=256, pack=True, most=16384, pad_token=0):
        hidden = last_hidden_states(model, batch).flatten(0, 1)[batch.kept]
        places = batch.documents.flatten()[batch.kept]
        for place in places.unique().tolist():
            found[place] = lm_head(model).logits(hidden[places == place])
    return [found[place] for place in range(len(window))]


def unbiasedness(model: Any, documents: Documents, captures: int = 10_000) -> dict[str, Any]:
    """Mean target over many captures of one position, in standard errors from the teacher's probability."""
    (window,) = windows(documents, 0, 1)
    logits = logits_of(model, [window[0]])[0]
    entropies = selection.entropy(logits)
    position = int(entropies.argmax())
    p = torch.softmax(logits[position].double(), -1)
    random = torch.rand(captures, num_uniforms(DEFAULT), generator=torch.Generator().manual_seed(1))
    total, squares = torch.zeros(4096, dtype=torch.float64), torch.zeros(4096, dtype=torch.float64)
    for start in range(0, captures, 1000):
        some = random[start : start + 1000]
        chosen = selection.head_and_sample(
            logits[position].repeat(len(some), 1), DEFAULT.head, DEFAULT.draws, DEFAULT.least, some[:, 0]
        )
        read = to_sparse(quantize(chosen, DEFAULT, some.numpy())[0], DEFAULT)
        target = torch.zeros(len(some), 4096, dtype=torch.float64).scatter_add_(
            1, read.ids, read.log_probs.double().exp()
        )
        total, squares = total + target.sum(0), squares + target.square().sum(0)
        unit = chosen.log_unit.double().exp()[0] if chosen.log_unit is not None else 0.0
    mean = total / captures
    seen = (squares / captures - mean**2).clamp(min=0)
    expected = torch.where(p < DEFAULT.least, p * unit, 0)  # of a token that was never drawn none was seen
    z = (mean - p).abs() / (torch.maximum(seen, expected) / captures).sqrt().clamp(min=1e-9)
    return {
        "captures": captures,
        "entropy_nats": float(entropies[position]),
        "tokens": 4096,
        "tokens_beyond_3_standard_errors": int((z > 3).sum()),
        "expected_by_chance": 4096 * 0.0027,
        "furthest_in_standard_errors": float(z.max()),
        "total_mass": float(mean.sum()),
    }


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Medians of wall and CPU seconds, after one call that is not counted."""
    work()
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return statistics.median(wall), statistics.median(cpu)


Times = list[tuple[float, float]]
"""Seconds by the clock and of the processor, of each round."""


def local_rank0_first(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Every job once to warm up, then in every round each once: so that what disturbs the machine disturbs all."""
    for job in jobs.values():
        job()
    times: dict[str, Times] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def medians(times: Times) -> tuple[float, float]:
    wall, cpu = (statistics.median(x) for x in zip(*times, strict=True))
    return wall, cpu


def ratios(one: Times, other: Times) -> tuple[float, float]:
    """The medians of the rounds' own ratios."""
    wall, cpu = medians([(a / c, b / d) for (a, b), (c, d) in zip(one, other, strict=True)])
    return wall, cpu


def codec_speed(model: Any, documents: Documents, repeats: int) -> dict[str, Any]:
    """Positions a second of one core, coded with 24 entries; and plain columns of top-32 in bfloat16 through Arrow."""
    torch.set_num_threads(1)
    (window,) = windows(documents, 0, 128)
    said = teacher_of(model, FIXED).capture(window)
    levels = LogProbCodes.concatenate([signal for signal, _ in said])
    tokens = np.concatenate([document.tokens[document.loss_mask] for document in window]).astype(np.int32)
    offsets = np.cumsum([0, *(int(document.loss_mask.sum()) for document in window)], dtype=np.int64)
    codec = Codec.train(tokens, levels, 4096)
    rows = codec.encode(tokens, levels, offsets)
    values, ids = torch.cat(logits_of(model, window)).log_softmax(-1).topk(32)
    n = len(tokens)
    result: dict[str, Any] = {"positions": n, "bytes_per_position": sum(map(len, rows)) / n}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.arrow"
        jobs = {
            "train tables": lambda: Codec.train(tokens, levels, 4096),
            "encode": lambda: codec.encode(tokens, levels, offsets),
            "decode": lambda: codec.decode(rows, tokens, offsets),
            "decode to tensors": lambda: to_sparse(codec.decode(rows, tokens, offsets), FIXED),
            "plain write": lambda: plain_write(path, ids, values, offsets),
            "plain read": lambda: plain_read(path),
        }
        for name, job in jobs.items():
            wall, cpu = timed(job, repeats)
            result[name] = {"positions_per_s": n / wall, "positions_per_cpu_s": n / cpu}
        result["plain bytes_per_position"] = path.stat().st_size / n
    result["encode of plain write"] = (
        result["encode"]["positions_per_cpu_s"] / result["plain write"]["positions_per_cpu_s"]
    )
    result["decode of plain read"] = (
        result["decode"]["positions_per_cpu_s"] / result["plain read"]["positions_per_cpu_s"]
    )
    torch.set_num_threads(2)
    return result


def plain_write(path: Path, ids: torch.Tensor, values: torch.Tensor, offsets: np.ndarray) -> None:
    """Top-k as everyone stores it: a row of ids (two bytes) and of log-probabilities in bfloat16 for each document."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink:
        schema = pa.schema([("ids", pa.list_(pa.uint16())), ("log_probs", pa.list_(pa.uint16()))])
        with pa.ipc.new_file(sink, schema) as writer:
            for start, end in pairwise(offsets):
                row = slice(int(start), int(end))
                columns = [
                    ids[row].flatten().numpy().astype(np.uint16),
                    values[row].flatten().bfloat16().view(torch.uint16).numpy(),
                ]
                writer.write_batch(
                    pa.record_batch(
                        [pa.ListArray.from_arrays(pa.array([0, len(c)], pa.int32()), pa.array(c)) for c in columns],
                        schema=schema,
                    )
                )


def plain_read(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import pyarrow as pa

    file = pa.ipc.open_file(pa.memory_map(str(path)))
    found = []
    for i in range(file.num_record_batches):
        batch = file.get_batch(i)
        ids = torch.from_numpy(batch["ids"].values.to_numpy().astype(np.int64))
        bits = torch.from_numpy(batch["log_probs"].values.to_numpy().copy())
        found.append((ids.view(-1, 32), bits.view(torch.bfloat16).float().view(-1, 32)))
    return found


@torch.no_grad()
def capture_overhead(model: Any, documents: Documents, stop: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of a whole capture, against the teacher's bare forward pass: backbone and head."""
    all_windows = list(windows(documents, 0, stop))
    n = sum(int(document.loss_mask.sum()) for window in all_windows for document in window)
    head = lm_head(model)

    def bare() -> None:
        for window in all_windows:
            for batch in batches(window, length=256, pack=True, most=16384, pad_token=0):
                hidden = last_hidden_states(model, batch).flatten(0, 1)[batch.kept]
                for start in range(0, len(hidden), 512):
                    head.logits(hidden[start : start + 512])

    def say() -> None:
        teacher = teacher_of(model, DEFAULT)
        for window in all_windows:
            teacher.capture(window)

    result: dict[str, Any] = {"positions": n}
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**6))
        jobs = {
            "bare forward": bare,
            "forward and selection": say,
            "capture": lambda: capture(model, documents, stop, DEFAULT, Path(folder) / str(next(numbers))),
        }
        times = local_rank0_first(jobs, repeats)
    for name in jobs:
        wall, cpu = medians(times[name])
        result[name] = {"positions_per_s": n / wall, "positions_per_cpu_s": n / cpu}
    wall, cpu = ratios(times["bare forward"], times["capture"])
    result["capture of bare forward"] = {"positions_per_s": wall, "positions_per_cpu_s": cpu}
    return result


def step_time(model: Any, documents: Documents, repeats: int) -> dict[str, Any]:
    """The student's fused loss from sparse targets, against hard labels with the same fused loss: whole steps."""
    from transformers import AutoConfig

    from stillroom.data.dataloader import BatchStream
    from stillroom.teachers.base import StoredTeacher
    from stillroom.training.prefetch import Prefetcher
    from stillroom.training.step import StudentStep

    config = AutoConfig.from_pretrained(data_folder() / "models/stories3M")
    config.update({"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 344, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 32})  # fmt: skip
    student = loading.build_model(config, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        store = capture(model, documents, 400, DEFAULT, Path(folder) / "store")

        def epoch(name: str) -> Callable[[], None]:
            objective = Objective(name, LOSSES[name].load())
            step = StudentStep(student, (objective,), vocab_size=4096, logits_bytes=256 * 2**20)
            teacher = StoredTeacher(store) if name == "forward_kl" else None

            def run() -> None:
                stream = BatchStream(store, length=256, pack=True, shuffle=False, tokens=4096, micro_tokens=4096,
                                     seed=0, epochs=1)  # fmt: skip
                ahead = Prefetcher(stream, teacher)
                for micro_batches in ahead:
                    for batch, read in micro_batches:
                        step(batch, read, batch.num_kept).loss.backward()
                        step.zero_grad()
                ahead.close()

            return run

        result: dict[str, Any] = {"positions": int(sum(store.loss_mask(i).sum() for i in range(len(store))))}
        jobs = {"hard labels": epoch("cross_entropy"), "from the store": epoch("forward_kl")}
        times = local_rank0_first(jobs, repeats)
    for name in jobs:
        wall, cpu = medians(times[name])
        result[name] = {"positions_per_s": result["positions"] / wall, "positions_per_cpu_s": result["positions"] / cpu}
    wall, cpu = ratios(times["from the store"], times["hard labels"])
    return result | {
        "time of hard labels', by positions_per_s": wall,
        "time of hard labels', by positions_per_cpu_s": cpu,
    }


def large_vocabulary(repeats: int, columns: int = 128_256, n: int = 4096) -> dict[str, Any]:
    """A random-weight head of 128,256 columns whose logits are scaled to about 2 nats of entropy."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    head = LMHead(torch.randn(columns, 64, generator=generator) / 8, scale=4.2)
    tokens = (torch.rand(n, generator=generator) ** 4 * 2000).int().numpy()
    centres = torch.randn(2000, 64, generator=generator)
    hidden = centres[torch.from_numpy(tokens).long()] + 0.4 * torch.randn(n, 64, generator=generator)
    hidden *= 8 / hidden.norm(dim=-1, keepdim=True)
    uniforms = torch.rand(n, num_uniforms(DEFAULT), generator=generator).numpy()
    result: dict[str, Any] = {"positions": n, "plain top-32 in bfloat16, bytes_per_position": 32 * (4 + 2)}
    for name, signal in (("top_k 50", TOP_K), ("default", DEFAULT)):
        parts, entropies, seconds = [], [], 0.0
        for start in range(0, n, 128):
            logits = head.logits(hidden[start : start + 128])
            entropies.append(selection.entropy(logits))
            begun = time.perf_counter()
            some = uniforms[start : start + 128]
            if isinstance(signal, TopK):
                chosen = selection.top_k(logits, signal.k)
            else:
                random = torch.from_numpy(some[:, 0].copy())
                chosen = selection.head_and_sample(logits, signal.head, signal.draws, signal.least, random)
            parts.append(quantize(chosen, signal, some)[0])
            seconds += time.perf_counter() - begun
        levels = LogProbCodes.concatenate(parts)
        offsets = np.arange(0, n + 1, 128)
        codec = Codec.train(tokens, levels, columns)
        rows = codec.encode(tokens, levels, offsets)
        encode, _ = timed(lambda c=codec, x=levels, o=offsets: c.encode(tokens, x, o), repeats)
        decode, _ = timed(lambda c=codec, r=rows, o=offsets: c.decode(r, tokens, o), repeats)
        result[name] = {
            "entropy_nats": float(torch.cat(entropies).mean()),
            "entries_per_position": (len(levels.ids) + len(levels.sample_ids)) / n,
            "bytes_per_position": sum(map(len, rows)) / n,
            "tables_bytes_per_position": len(codec.to_bytes()) / n,
            "select_positions_per_s": n / seconds,
            "encode_positions_per_s": n / encode,
            "decode_positions_per_s": n / decode,
        }
    torch.set_num_threads(2)
    return result


if __name__ == "__main__":
    main()

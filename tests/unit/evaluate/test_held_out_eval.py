"""The held-out evaluation: every metric equals a naive float64 formula, however the text is batched and chunked."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from conftest import build_tokenizer
from stillroom.evaluate.config import EvaluateConfig
from stillroom.evaluate.run import run
from stillroom.models import loading

VOCAB_SIZE = 304
METRICS = {
    "cross_entropy_nats", "perplexity", "bits_per_byte", "entropy_nats", "calibration_error", "forward_kl_nats",
    "forward_kl_p95_nats", "reverse_kl_nats", "reverse_kl_p95_nats", "top1_agreement", "top10_overlap",
    "accepted_mass", "speculative_tokens", "entropy_ratio",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(saved_model) -> dict[str, str]:
    """A teacher, a student that is nearer to it than the baseline is, and the baseline."""
    return {
        name: str(saved_model("llama", seed=seed)) for name, seed in (("teacher", 1), ("distilled", 2), ("baseline", 3))
    }


def evaluate(folders, text_files, out: Path, **settings):
    values = {
        "models": folders, "out": str(out),
        "data": {"path": f"{text_files}/train.jsonl", "format": "text", "length": 32, **settings.pop("data", {})},
        **settings,
    }  # fmt: skip
    record = run(EvaluateConfig.model_validate(values))
    return record, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def found(folders, text_files, tmp_path_factory):
    return evaluate(folders, text_files, tmp_path_factory.mktemp("found") / "run")


class Naive:
    """Everything of every predicted token in float64, one piece of a document at a time, from plain logits."""

    def __init__(self, folders: dict[str, str], text_files: Path) -> None:
        tokenizer = build_tokenizer()
        models = {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for n, f in folders.items()}
        texts = [json.loads(line)["text"] for line in (text_files / "train.jsonl").read_text().splitlines()]
        self.num_bytes = sum(len(text.encode()) for text in texts)
        logs: dict[str, list[torch.Tensor]] = {name: [] for name in models}
        self.rows, labels = [], []
        for row, text in enumerate(texts):
            ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
            for start in range(0, len(ids) - 1, 32):
                piece = ids[start : start + 33]
                for name, model in models.items():
                    with torch.no_grad():
                        logs[name].append(model(piece[None, :-1]).logits[0].log_softmax(-1))
                labels.append(piece[1:])
                self.rows += [row] * (len(piece) - 1)
        self.logs = {name: torch.cat(parts) for name, parts in logs.items()}
        self.labels = torch.cat(labels)

    def cross_entropy(self, name: str) -> torch.Tensor:
        return -self.logs[name].gather(1, self.labels[:, None])[:, 0]

    def entropy(self, name: str) -> torch.Tensor:
        return -(self.logs[name].exp() * self.logs[name]).sum(-1)

    def kl(self, a: str, b: str) -> torch.Tensor:
        return (self.logs[a].exp() * (self.logs[a] - self.logs[b])).sum(-1)

    def calibration_error(self, name: str) -> float:
        top = self.logs[name].max(-1)
        confidence, right = top.values.exp().numpy(), (top.indices == self.labels).double().numpy()
        error = 0.0
        for low in range(15):
            inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
            if inside.any():
                error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        return error

    def metrics(self, name: str, teacher: str = "teacher") -> dict[str, float]:
        s, t = self.logs[name], self.logs[teacher]
        mean_nats, forward, reverse = (
            self.cross_entropy(name).mean().item(),
            self.kl(teacher, name),
            self.kl(name, teacher),
        )
        tens = [[set(row.topk(10).indices.tolist()) for row in logs] for logs in (s, t)]
        accepted = torch.minimum(s.exp(), t.exp()).sum(-1).mean().item()
        return {
            "cross_entropy_nats": mean_nats,
            "perplexity": math.exp(mean_nats),
            "bits_per_byte": self.cross_entropy(name).sum().item() / math.log(2) / self.num_bytes,
            "entropy_nats": self.entropy(name).mean().item(),
            "calibration_error": self.calibration_error(name),
            "forward_kl_nats": forward.mean().item(),
            "forward_kl_p95_nats": float(np.quantile(forward.numpy(), 0.95)),
            "reverse_kl_nats": reverse.mean().item(),
            "reverse_kl_p95_nats": float(np.quantile(reverse.numpy(), 0.95)),
            "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double().mean().item(),
            "top10_overlap": float(np.mean([len(a & b) / 10 for a, b in zip(*tens, strict=True)])),
            "accepted_mass": accepted,
            "speculative_tokens": (1 - accepted**5) / (1 - accepted) if accepted < 1 else 5.0,
            "entropy_ratio": (self.entropy(name).sum() / self.entropy(teacher).sum()).item(),
        }


@pytest.fixture(scope="module")
def naive(folders, text_files) -> Naive:
    return Naive(folders, text_files)


@pytest.mark.parametrize("name", ["distilled", "baseline"])
def test_every_metric_equals_the_naive_formula(found, naive, name):
    numbers = {metric: number["value"] for metric, number in found[1]["metrics"][name].items()}
    numbers.pop("recovered_gap", None)
    assert set(numbers) == METRICS
    assert numbers == pytest.approx(naive.metrics(name), rel=2e-5, abs=1e-6)


def test_the_teacher_has_what_needs_no_teacher(found, naive):
    numbers = {metric: number["value"] for metric, number in found[1]["metrics"]["teacher"].items()}
    assert set(numbers) == {"cross_entropy_nats", "perplexity", "bits_per_byte", "entropy_nats", "calibration_error"}
    wanted = naive.metrics("teacher")
    assert numbers == pytest.approx({metric: wanted[metric] for metric in numbers}, rel=2e-5, abs=1e-6)


def test_intervals_are_those_of_documents_drawn_again(found, naive):
    """Against a plain bootstrap of its own draws: the same error within the noise of two thousand resamples."""
    rows, values = np.array(naive.rows), naive.kl("teacher", "distilled").numpy()
    sums, counts = np.bincount(rows, values), np.bincount(rows)
    drawn = np.random.default_rng(1).integers(len(counts), size=(2000, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    number = found[1]["metrics"]["distilled"]["forward_kl_nats"]
    assert number["error"] == pytest.approx(means.std(), rel=0.1)
    assert [number["low"], number["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), rel=0.01)


def test_text_differences_and_breakdowns_add_up(found, naive):
    results = found[1]
    text = results["text"]
    assert (text["num_documents"], text["num_tokens"], text["num_bytes"]) == (24, len(naive.rows), naive.num_bytes)
    metrics = results["metrics"]
    for one in results["differences"]:
        values = [metrics[one[side]][one["what"]]["value"] for side in ("a", "b")]
        assert one["value"] == pytest.approx(values[0] - values[1])
        assert one["low"] <= one["value"] <= one["high"]
        assert one["num_items"] == 24
    assert [(d["a"], d["b"]) for d in results["differences"] if d["what"] == "cross_entropy_nats"] == [
        ("teacher", "distilled"), ("teacher", "baseline"), ("distilled", "baseline")
    ]  # fmt: skip
    assert [b["by"] for b in results["breakdowns"]] == ["token_frequency", "position", "teacher_entropy"]
    for breakdown in results["breakdowns"]:
        assert sum(breakdown["num_tokens"]) == text["num_tokens"]
        pairs = zip(breakdown["num_tokens"], breakdown["forward_kl_nats"]["distilled"], strict=True)
        total = sum(n * kl for n, kl in pairs if kl is not None)
        assert total / text["num_tokens"] == pytest.approx(metrics["distilled"]["forward_kl_nats"]["value"])


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_tokens": 32, "logits_bytes": 4096},
        {"batch_tokens": 100, "data": {"pack": False}},
    ],
    ids=["one row at a time, in small chunks", "padded"],
)
def test_batches_padding_and_chunks_change_no_number(found, folders, text_files, tmp_path, settings):
    _, results = evaluate(folders, text_files, tmp_path / "run", **settings)
    for name, numbers in found[1]["metrics"].items():
        values = {metric: number["value"] for metric, number in numbers.items()}
        assert {k: n["value"] for k, n in results["metrics"][name].items()} == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_a_student_equal_to_its_teacher_has_kept_everything(folders, text_files, tmp_path):
    same = {"teacher": folders["teacher"], "distilled": folders["teacher"], "baseline": folders["baseline"]}
    _, results = evaluate(same, text_files, tmp_path / "run")
    numbers = {metric: number["value"] for metric, number in results["metrics"]["distilled"].items()}
    assert numbers["forward_kl_nats"] == numbers["reverse_kl_nats"] == numbers["forward_kl_p95_nats"] == 0
    assert numbers["top1_agreement"] == numbers["top10_overlap"] == numbers["entropy_ratio"] == 1
    assert numbers["accepted_mass"] == pytest.approx(1)
    assert numbers["speculative_tokens"] == pytest.approx(5)
    assert results["metrics"]["teacher"]["cross_entropy_nats"] == results["metrics"]["distilled"]["cross_entropy_nats"]
    (difference,) = [d for d in results["differences"] if {d["a"], d["b"]} == {"teacher", "distilled"}]
    assert difference["value"] == 0
    assert "do not differ" in difference["sentence"]


class _Largest(TorchDispatchMode):
    """The most numbers in any tensor that has the vocabulary for its last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.ndim >= 2 and one.shape[-1] == VOCAB_SIZE:
                self.rows = max(self.rows, one.numel() // VOCAB_SIZE)
        return out


def test_no_tensor_of_all_tokens_and_ids_is_held(folders, text_files):

    from stillroom.data.config import TextData
    from stillroom.data.dataset import CountedDocuments
    from stillroom.evaluate.scoring import Limits, Predicted, batches, score

    student, teacher = (loading.load_model(folders[n], dtype=torch.float32) for n in ("distilled", "teacher"))
    data = TextData(format="text", path=f"{text_files}/train.jsonl", length=32)
    predicted = Predicted(CountedDocuments(data, build_tokenizer()))
    limits = Limits(batch_tokens=10_000, logits_bytes=8 * 4 * VOCAB_SIZE * 2, device="cpu")
    text = batches(predicted.documents, length=32, pack=True, most=10_000, pad_token=0)
    with _Largest() as largest:
        score(student, "distilled", predicted, text, limits, vocab_size=VOCAB_SIZE, teacher=teacher)
    assert 0 < largest.rows <= 16
    assert len(predicted) > 500

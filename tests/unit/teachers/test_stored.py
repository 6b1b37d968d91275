"""A stored teacher against a live one: the same losses and gradients, exactly, nearly, or in the mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import build_model
from stillroom.batch import Batch
from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run as capture
from stillroom.capture.signals import Document, SignalCapture
from stillroom.config import load
from stillroom.data.dataloader import BatchStream
from stillroom.distill.config import DistillConfig
from stillroom.distill.run import run
from stillroom.errors import DataError
from stillroom.losses.divergences import forward_kl, reverse_kl
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.runs import read_metrics
from stillroom.signals import Logits, Sparse, TeacherOutput
from stillroom.store.config import HeadAndSample, Sampled
from stillroom.store.quantize import LogProbCodes, to_sparse
from stillroom.store.reader import Store
from stillroom.teachers.base import StoredTeacher
from stillroom.teachers.live import LiveTeacher
from stillroom.training import loop
from stillroom.training.step import StudentStep
from stillroom.training.validation import measure_held_out

KINDS = {
    "full": "{kind: full}",
    "top_k": "{kind: top_k, k: 12, label: true, entropy: true, temperatures: [2.0]}",
    "top_p": "{kind: top_p, mass: 0.9, most: 40, label: true}",
    "sampled": "{kind: sampled, draws: 20, label: true}",
    "head_and_sample": "{kind: head_and_sample}",
}
MakeStore = Callable[..., Store]


@pytest.fixture(scope="module")
def stored(saved_model, text_files: Path, tmp_path_factory) -> MakeStore:
    """A tiny store of a kind: ``stored("top_k", "seed=1")``. Equal arguments give the same one."""
    made: dict[tuple[str, ...], Store] = {}

    def make(kind: str, *settings: str) -> Store:
        if (kind, *settings) not in made:
            folder = tmp_path_factory.mktemp(kind)
            words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
                     "data.format=text", "data.length=32", f"data.cache={folder}/cache", f"signal={KINDS[kind]}",
                     f"out={folder}/run", *settings]  # fmt: skip
            capture(load(CaptureConfig, None, words))
            made[kind, *settings] = Store(folder / "run" / "store")
        return made[kind, *settings]

    return make


def stream(store: Store, **settings: Any) -> BatchStream:
    values = {"length": 32, "pack": True, "shuffle": True, "tokens": 96, "micro_tokens": 64, "seed": 3, "epochs": 1}
    return BatchStream(store, **{**values, **settings})


def teacher(saved_model, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=2), **settings)


def step_of(model: PreTrainedModel, *objectives: Objective, **settings: Any) -> StudentStep:
    return StudentStep(model, objectives, vocab_size=300, logits_bytes=2**20, **settings)


FORWARD = Objective("forward_kl", forward_kl)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pack": False}, {"micro_tokens": 32, "seed": 8}], ids=str)
@pytest.mark.parametrize("shards", ["shard_positions=1048576", "shard_positions=60"])
def test_signals_stand_at_the_positions_of_their_documents(stored, settings, shards):
    store = stored("full", shards)
    seen = []
    for batch in (batch for step in stream(store, **settings) for batch in step):
        signal = StoredTeacher(store).forward(batch).signal
        assert isinstance(signal, Logits)
        assert len(signal) == batch.num_kept
        documents = batch.documents.flatten()[batch.kept].tolist()
        positions = batch.positions.flatten()[batch.kept].tolist()
        for row, (document, position) in enumerate(zip(documents, positions, strict=True)):
            place = int(store.loss_mask(document)[:position].sum())
            assert np.array_equal(signal.logits[row].numpy(), store.logits([document])[place])
            seen.append((document, position))
    assert len(seen) == len(set(seen)) == store.manifest.positions


@pytest.mark.parametrize("kind", ["top_k", "top_p", "sampled", "head_and_sample"])
def test_sparse_signals_are_those_of_their_documents_in_turn(stored, kind):
    store = stored(kind, "shard_positions=60")
    (batch,) = next(stream(store, tokens=128, micro_tokens=128))
    told = StoredTeacher(store).prefetch(batch)
    read = told.signal
    assert isinstance(read, Sparse)
    assert read.vocab_size == 300
    rows = [d for row in batch.documents for d in row.unique_consecutive().tolist() if d >= 0]
    assert len(rows) > len(batch.tokens)  # they are packed
    whole = to_sparse(LogProbCodes.concatenate([store.levels([d]) for d in rows]), store.signal_config)
    assert torch.equal(read.ids, whole.ids)
    assert torch.equal(read.log_probs, whole.log_probs)
    assert StoredTeacher(store).forward(batch, told).signal.ids is read.ids


def test_a_damaged_row_is_told_when_it_is_read(stored, tmp_path):
    import shutil

    store = stored("top_k")
    broken = Path(shutil.copytree(store.path, tmp_path / "store"))
    data = bytearray((broken / "00000.arrow").read_bytes())
    at = data.find(bytes(store.shards[0].signal(5)))
    data[at] ^= 1
    (broken / "00000.arrow").write_bytes(data)
    asked = StoredTeacher(Store(broken))
    batches = [batch for step in stream(store) for batch in step]
    (holds,) = [batch for batch in batches if 5 in batch.documents]
    for batch in batches:
        if batch is not holds:
            asked.prefetch(batch)
    with pytest.raises(DataError, match="damaged"):
        asked.prefetch(holds)
    with pytest.raises(DataError, match=r"checksum of 00000\.arrow row 5"):  # also where no signal is asked for
        list(stream(Store(broken)))


# --- a full store ----------------------------------------------------------------------------------------------------


def measured(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time_s", "tokens_per_s")} for line in lines]


def both(recipe: Path, store: Store, tmp_path: Path, *settings: str) -> tuple[Path, Path]:
    """The folders of a live run over the data of a store, and of one from the store."""
    shared = ["held_out=null", *settings]
    run(load(DistillConfig, recipe, ["teacher.columns=300", f"out={tmp_path}/live", *shared]))
    from_store = [f"teacher={{kind: store, path: {store.path}}}"]
    shared = [word for word in shared if not word.startswith(("data.path", "data.overlong"))]
    run(load(DistillConfig, recipe, [*from_store, "data={format: store}", f"out={tmp_path}/stored", *shared]))
    return tmp_path / "live", tmp_path / "stored"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


OBJECTIVES = "objectives=[{kind: forward_kl, temperature: 2.0}, {kind: reverse_kl}, {kind: cross_entropy, weight: 0.3}]"


def test_where_both_read_the_same_batches_a_full_store_teaches_bit_for_bit(recipe, stored, tmp_path):
    """Each document in a batch of its own, in the capture and in the training."""
    path = tmp_path / "long.jsonl"
    texts = [f"{i}: the still runs slowly, and what comes over first is thrown away {i * i}" for i in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    alone = ("data.pack=false", "data.overlong=cut")
    store = stored("full", f"data.path={path}", *alone, "teacher.engine={kind: transformers, batch_tokens: 32}")
    assert store.lengths.min() > 17  # so no two fit into 32 positions
    live, other = both(recipe, store, tmp_path, f"data.path={path}", *alone, "batch.tokens=64",
                       "batch.micro_tokens=32", OBJECTIVES)  # fmt: skip
    assert measured(live) == measured(other)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(live).items())


def test_where_the_teachers_batches_differ_a_full_store_teaches_up_to_rounding(recipe, stored, tmp_path):
    live, other = both(recipe, stored("full"), tmp_path, OBJECTIVES)
    a, b = measured(live), measured(other)
    assert len(a) == len(b) == 6
    assert [line["num_kept"] for line in a] == [line["num_kept"] for line in b]
    for one, two in zip(a, b, strict=True):
        assert one["loss_nats"] == pytest.approx(two["loss_nats"], rel=2e-6)
    for name, tensor in weights(live).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=0, atol=2e-6)


def test_in_float64_nothing_but_the_stored_float32_differs(stored, saved_model):
    store, student = stored("full"), build_model("llama", seed=1).double()
    step = step_of(student, FORWARD, Objective("reverse_kl", reverse_kl))
    live = LiveTeacher(teacher(saved_model).double())
    for batch in (batch for some in stream(store) for batch in some):
        found = []
        for signal in (live.forward(batch), StoredTeacher(store).forward(batch)):
            student.zero_grad()
            result = step(batch, signal, batch.num_kept)
            result.loss.backward()
            found.append((result.loss.item(), student.lm_head.weight.grad.clone()))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


# --- a student that is its teacher -----------------------------------------------------------------------------------


def loss_and_gradient(step: StudentStep, batch: Batch, signal: Any) -> tuple[float, float]:
    step.model.zero_grad()
    result = step(batch, signal, batch.num_kept)
    result.loss.backward()
    return result.loss.item(), float(torch.stack([p.grad.norm() for p in step.parameters()]).norm())


@pytest.mark.parametrize("kind", ["full", "top_k", "top_p"])
@pytest.mark.parametrize("loss", [forward_kl, reverse_kl], ids=["forward", "reverse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(stored, saved_model, kind, loss):
    store, step = stored(kind), step_of(teacher(saved_model), Objective("kl", loss))
    far = step_of(build_model("llama", seed=1), Objective("kl", loss))
    nats, of_all, away = 0.0, 0, []
    for batch in (batch for some in stream(store) for batch in some):
        signal = StoredTeacher(store).forward(batch)
        here, gradient = loss_and_gradient(step, batch, signal)
        away.append(gradient / loss_and_gradient(far, batch, signal)[1])
        nats, of_all = nats + here * batch.num_kept, of_all + batch.num_kept
    error = store.manifest.codec_error_nats
    assert max(away) < (1e-5 if kind == "full" else 0.05 if loss is forward_kl else 0.2)  # steps of 0.1 nats
    assert nats / of_all < 1e-6 if kind == "full" else 0 < nats / of_all < 2e-3
    if kind != "full" and loss is forward_kl:
        assert nats / of_all == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("kind", ["sampled", "head_and_sample"])
def test_from_a_sample_its_loss_is_nothing_too(stored, saved_model, kind):
    """The estimate of the entropy is of the same draws, so their noise cancels where student and teacher are equal."""
    store, step = stored(kind), step_of(teacher(saved_model), FORWARD)
    for batch in (batch for some in stream(store) for batch in some):
        assert abs(step(batch, StoredTeacher(store).forward(batch), batch.num_kept).loss.item()) < 0.01


# --- in the mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signal", [HeadAndSample(kind="head_and_sample"), Sampled(kind="sampled", draws=20)], ids=["default", "sampled"]
)
def test_over_many_captures_the_gradient_is_that_of_the_whole_distribution(stored, saved_model, signal):
    store, student = stored("full"), build_model("llama", seed=1)
    (batch,) = next(stream(store, tokens=64, shuffle=False))
    rows = [d for row in batch.documents for d in row.unique_consecutive().tolist() if d >= 0]
    asked = [Document(store.document(d), store.tokens(d), store.target_mask(d)) for d in rows]
    step, model = step_of(student, FORWARD), teacher(saved_model)

    def gradient(of: Any) -> Tensor:
        student.zero_grad()
        step(batch, of, batch.num_kept).loss.backward()
        weight = student.lm_head.weight.grad
        assert weight is not None
        return weight.flatten().double().clone()

    def one(seed: int) -> Tensor:
        asks = SignalCapture(
            LiveTeacher(model), signal, vocab_size=300, seed=seed, length=32, pack=True, batch_tokens=256,
            logits_bytes=2**23,
        )  # fmt: skip
        parts = [captured.signal for captured in asks.capture(asked)]
        return gradient(TeacherOutput(to_sparse(LogProbCodes.concatenate(parts), signal, 300)))  # pyright: ignore[reportArgumentType]

    dense = gradient(StoredTeacher(store).forward(batch))
    number = 100
    found = torch.stack([one(seed) for seed in range(number)])
    noise = float(found.var(0).sum())  # of one capture
    off = float((found.mean(0) - dense).square().sum())
    assert off < 1.5 * noise / number  # no more than what chance leaves of it
    assert noise > 40 * off
    assert off < 0.01 * float(dense.square().sum())


def test_truncation_without_sampling_does_not_average_out(stored):
    """What the sampled kinds are for: each capture of top_k says the same, so its error stays."""
    batch = next(stream(stored("full"), tokens=64, shuffle=False))[0]
    again = [StoredTeacher(stored("top_k", f"seed={seed}")).forward(batch).signal for seed in (0, 1)]
    assert isinstance(again[0], Sparse)
    assert isinstance(again[1], Sparse)
    assert torch.equal(again[0].ids, again[1].ids)
    assert torch.equal(again[0].log_probs, again[1].log_probs)


# --- held out --------------------------------------------------------------------------------------------------------


def test_the_held_out_measures_of_each_kind(stored, saved_model):
    step = step_of(build_model("llama", seed=1), Objective("cross_entropy", cross_entropy))
    live = measure_held_out(step, LiveTeacher(teacher(saved_model)), stream(stored("full")), "cpu")
    assert live is not None
    found = {}
    for kind in KINDS:
        told = measure_held_out(step, StoredTeacher(stored(kind)), stream(stored(kind)), "cpu")
        assert told is not None
        found[kind] = told
        for name in ("loss_nats", "cross_entropy_nats", "num_tokens"):
            assert told[name] == pytest.approx(live[name], rel=1e-6)
    assert found["full"] == pytest.approx(live, rel=1e-6)
    for kind in ("top_k", "top_p"):
        assert found[kind]["top1_agreement"] == live["top1_agreement"]
        assert 0 < found[kind]["forward_kl_nats"] < live["forward_kl_nats"]  # the bucket is a lower bound
    for kind in ("top_k", "top_p", "sampled"):
        assert found[kind]["teacher_cross_entropy_nats"] == pytest.approx(live["teacher_cross_entropy_nats"], abs=2e-3)
    assert "top1_agreement" not in found["sampled"]
    assert not {"top1_agreement", "teacher_cross_entropy_nats"} & found["head_and_sample"].keys()
    for kind in ("sampled", "head_and_sample"):
        assert found[kind]["forward_kl_nats"] == pytest.approx(live["forward_kl_nats"], rel=0.1)


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "at"), [("full", 1), ("top_p", 4)])
def test_a_run_that_failed_goes_on_bit_for_bit(recipe, stored, tmp_path, monkeypatch, kind, at):
    """Two steps were read ahead that were never made."""
    words = [f"teacher={{kind: store, path: {stored(kind, 'shard_positions=60').path}}}", "data={format: store}",
             "held_out=null", "checkpoints.every=1", "steps=6"]  # fmt: skip
    run(load(DistillConfig, recipe, [*words, f"out={tmp_path}/whole"]))
    step, calls = loop.optimizer_step, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == at + 1:
            raise OSError("the power is out")
        return step(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with pytest.raises(OSError, match="the power is out"):
        run(load(DistillConfig, recipe, [*words, f"out={tmp_path}/a"]))
    monkeypatch.setattr(loop, "optimizer_step", step)
    run(load(DistillConfig, recipe, [*words, f"out={tmp_path}/a"]), resume=True)
    assert measured(tmp_path / "a") == measured(tmp_path / "whole")
    assert all(torch.equal(t, weights(tmp_path / "a")[name]) for name, t in weights(tmp_path / "whole").items())

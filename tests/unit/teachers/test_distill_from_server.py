"""Whole distillations from a server that is asked while the student trains."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import FakeServer, fake_server, status, toy_log_probs

from conftest import SaveModel, build_documents, build_stream
from stillroom.config import load
from stillroom.data.dataloader import nothing
from stillroom.distill.config import DistillConfig
from stillroom.distill.preflight import Preflight
from stillroom.distill.run import run
from stillroom.errors import ConfigError, MismatchError, MissingError, StillroomError
from stillroom.runs import read_metrics
from stillroom.teachers.base import ServerTeacher
from stillroom.teachers.config import ServerTeacherConfig

Distill = Callable[..., dict[str, Any]]


@pytest.fixture
def server(tiny_tokenizer) -> Iterator[FakeServer]:
    with fake_server(tiny_tokenizer) as served:
        yield served


@pytest.fixture
def distill(server: FakeServer, saved_model: SaveModel, text_files: Path, tmp_path: Path) -> Distill:
    def go(*settings: str, **flags: Any) -> dict[str, Any]:
        words = [
            f"student.model={saved_model('llama', seed=1)}", f"data={{path: {text_files}/train.jsonl, format: text}}",
            f"teacher={{kind: server, model: toy, url: '{server.url}', top: 12, retries: 0}}", "data.length=32",
            "objectives=[{kind: forward_kl}]", "steps=4", "batch={tokens: 64, micro_tokens: 32}",
            "optimizer.learning_rate=1e-2", "device=cpu", f"out={tmp_path}/run", *settings,
        ]  # fmt: skip
        return run(load(DistillConfig, None, words), **flags)

    return go


def test_it_tells_the_likeliest_tokens_of_every_kept_position(server, tiny_tokenizer):
    documents = build_documents([9, 20, 12, 31], vocabulary=290)
    columns = len(tiny_tokenizer)
    config = ServerTeacherConfig(kind="server", model="toy", url=server.url, top=5, retries=0)
    teacher = ServerTeacher(config, tiny_tokenizer, documents, columns)
    for batch in next(build_stream(documents, shuffle=False, epochs=1)):
        told = teacher.forward(batch).signal
        wanted = []
        for row in batch.documents:
            for d in (d for d in row.unique_consecutive().tolist() if d >= 0):
                tokens = documents.tokens(d).tolist()
                kept = np.flatnonzero(documents.target_mask(d)[1:])
                wanted += [toy_log_probs(tokens[: p + 1], server.vocabulary) for p in kept]
        thought = torch.from_numpy(np.stack(wanted))
        assert len(told) == batch.num_kept == len(thought)
        ids = thought.topk(5).indices
        assert torch.equal(told.ids, ids)
        torch.testing.assert_close(told.log_probs, thought.gather(1, ids).float(), rtol=1e-4, atol=1e-4)
        rest = torch.log1p(-thought.gather(1, ids).exp().sum(1))
        torch.testing.assert_close(told.log_rests[1.0], rest.float(), rtol=1e-3, atol=1e-3)
        labels = batch.labels.flatten()[batch.kept]
        torch.testing.assert_close(
            told.label_log_probs, thought.gather(1, labels[:, None])[:, 0].float(), rtol=1e-4, atol=1e-4
        )
    assert len(teacher.forward(nothing(documents, 0)).signal) == 0


def test_a_student_comes_nearer_to_it(distill, server, text_files, tmp_path):
    record = distill(f"held_out={{path: {text_files}/valid.jsonl, every: 2}}", "steps=8")
    assert record["status"] == "done"
    told = [line["held_out"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out" in line]
    assert told[-1]["forward_kl_nats"] < told[0]["forward_kl_nats"] - 0.1
    assert {"top1_agreement", "accepted_mass", "teacher_cross_entropy_nats"} <= told[0].keys()
    assert "fingerprint" in record["data"]
    assert any(path.endswith("/completions") for path, _, _ in server.asked)


def test_a_server_that_fails_ends_the_run_and_loses_nothing(distill, server, tmp_path):
    whole = distill(f"out={tmp_path}/whole")
    server.faults.extend([None] * 7 + [status(503)] * 50)
    with pytest.raises(StillroomError):
        distill("checkpoints.every=1")
    server.faults.clear()
    resumed = distill("checkpoints.every=1", resume=True)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
    assert [line["loss_nats"] for line in lines[0]] == [line["loss_nats"] for line in lines[1]]
    assert whole["steps"] == resumed["steps"] == 4


def test_a_trial_asks_it_too(server, saved_model, text_files, tmp_path):
    config = load(
        DistillConfig,
        None,
        [
            f"student.model={saved_model('llama', seed=1)}", f"data={{path: {text_files}/train.jsonl, format: text}}",
            f"teacher={{kind: server, model: toy, url: '{server.url}', top: 12, retries: 0}}", "data.length=32",
            "objectives=[{kind: forward_kl}]", "steps=4", "batch={tokens: 64, micro_tokens: 32}",
            "optimizer.learning_rate=1e-2", "device=cpu", f"out={tmp_path}/run",
        ],
    )  # fmt: skip
    trial = Preflight(config, sequences=8)
    trial.fit()
    trial.look()
    measured = trial.measure()
    assert measured["forward_kl_nats"] > 0
    assert measured["teacher_parameters"] is None
    assert trial.step()["loss_nats"] > 0


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (["objectives=[{kind: hidden, distance: mse, layers: uniform}]"], ConfigError, "a server tells none"),
        (["objectives=[{kind: forward_kl, temperature: 2.0}]"], MismatchError, "temperature"),
        (["teacher.model=other"], StillroomError, "other"),
        (["teacher.url=http://127.0.0.1:9/v1"], MissingError, "127.0.0.1:9"),
        (["student={init: {kind: config, family: llama}}"], ConfigError, "student.tokenizer"),
    ],
)
def test_what_a_server_cannot_do_is_said(distill, settings, error, said):
    with pytest.raises(error, match=said):
        distill(*settings)

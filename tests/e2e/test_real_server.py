"""A real server: llama.cpp's, which serves a small Llama model on loopback, against the same model in transformers.

It needs `llama_cpp` and `gguf` in this interpreter or in the one that STILLROOM_LLAMA_PYTHON names, and the model in
../shared (or STILLROOM_SHARED).
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from stillroom.errors import DataError, MissingError
from stillroom.teachers.engine import ServerEngine

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("STILLROOM_SHARED", ROOT.parent / "shared"))
MODEL = SHARED / "data/models/stories260K"
PYTHON = os.environ.get("STILLROOM_LLAMA_PYTHON", sys.executable)
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "Tom and Sam like to run in the park. One day they see a big dog.",
    "The cat was sad.",
    'She said, "Thank you, Mom!" and they went home.',
)
TOLERANCE_NATS = 1e-3


@pytest.fixture(scope="module")
def model() -> Any:
    if not (MODEL / "model.safetensors").is_file():
        pytest.skip(f"needs the model {MODEL}")
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model: Any) -> PreTrainedTokenizerBase:
    assert model.config.vocab_size == 512
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def url(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if subprocess.run([PYTHON, "-c", "import llama_cpp.server, gguf"], capture_output=True, check=False).returncode:
        pytest.skip(f"needs llama-cpp-python[server] and gguf in {PYTHON}; set STILLROOM_LLAMA_PYTHON")
    assert len(tokenizer) == 512
    folder = tmp_path_factory.mktemp("llama")
    subprocess.run(
        [PYTHON, str(Path(__file__).with_name("gguf_model.py")), str(MODEL), "model.gguf"], cwd=folder, check=True
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "model": "model.gguf", "model_alias": "stories", "host": "127.0.0.1", "port": port, "logits_all": "true",
        "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0,
    }  # fmt: skip
    command = [PYTHON, "-m", "llama_cpp.server", *(part for k, v in settings.items() for part in (f"--{k}", str(v)))]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}/v1"
        wait_for(f"{address}/models", process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once the server answers."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"no answer from {address}:\n{log.read_text()}")


def engine_for(url: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> ServerEngine:
    return ServerEngine(
        url=url, **{"model": "stories", "dialect": "openai", "tokenizer": tokenizer, "top": 8, **settings}
    )


def own_log_probs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[n, v]: what the model itself says after each token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.from_numpy(tokens)[None].long()).logits[0], -1).numpy()


def test_it_says_what_the_model_says(url: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [np.array(tokenizer(text)["input_ids"], np.int32) for text in TEXTS]
    engine = engine_for(url, tokenizer, concurrency=3)
    documents = [(i, row, np.arange(len(row) - 1) >= 1) for i, row in enumerate(rows)]
    errors = []
    for (number, found), (_, tokens, keep) in zip(engine.score(documents), documents, strict=True):
        own = own_log_probs(model, tokens)[:-1]
        assert (found.counts == 8).all()
        ids, log_probs = found.ids.reshape(-1, 8), found.log_probs.reshape(-1, 8)
        at = np.flatnonzero(keep)
        np.testing.assert_array_equal(ids[:, :4], np.argsort(-own[at], 1)[:, :4], err_msg=f"document {number}")
        errors.append(np.abs(log_probs - np.take_along_axis(own[at], ids, 1)).max())
        errors.append(np.abs(found.label_log_probs - own[at, tokens[1:][keep]]).max())
    print(f"largest difference: {max(errors):.2e} nats")  # noqa: T201
    assert max(errors) < TOLERANCE_NATS
    assert engine.usage.retries == 0
    assert engine.usage.prompt_tokens >= sum(map(len, rows))


def test_it_answers_as_the_model_does(url: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [(i, np.array(tokenizer(text)["input_ids"][:8], np.int32)) for i, text in enumerate(TEXTS[:2])]
    engine = engine_for(url, tokenizer, top=4)
    found = list(engine.generate(prompts, max_tokens=16, temperature=0.0, num_answers=2, seed=0))
    for (number, answers), (_, prompt) in zip(found, prompts, strict=True):
        wanted = model.generate(
            torch.from_numpy(prompt)[None].long(), max_new_tokens=16, max_length=None, do_sample=False
        )[0].numpy()
        own = own_log_probs(model, wanted.astype(np.int32))[len(prompt) - 1 : -1]
        for answer in answers:
            np.testing.assert_array_equal(answer.tokens, wanted[len(prompt) :], err_msg=f"prompt {number}")
            told = answer.log_probs
            assert told is not None
            np.testing.assert_allclose(told.label_log_probs, own.max(1), atol=TOLERANCE_NATS)
            ids = told.ids.reshape(-1, 4)
            np.testing.assert_allclose(
                told.log_probs.reshape(-1, 4), np.take_along_axis(own, ids, 1), atol=TOLERANCE_NATS
            )


def test_sampled_answers_differ_and_come_again_with_their_seed(url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    def answers(seed: int) -> list[str]:
        engine = engine_for(url, tokenizer, concurrency=1)
        found = engine.generate(
            [(0, "Once upon")], max_tokens=12, temperature=1.5, num_answers=3, seed=seed, log_probs=False
        )
        return [answer.text for _, several in found for answer in several]

    assert answers(0) == answers(0)
    assert len({*answers(0), *answers(1)}) > 1


def test_what_it_cannot_say_is_an_error(url: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = np.array(tokenizer(TEXTS[0])["input_ids"], np.int32)
    engine = engine_for(url, tokenizer)
    with pytest.raises(DataError, match="at the start of document 0"):
        list(engine.score([(0, tokens, np.ones(len(tokens) - 1, bool))]))
    with pytest.raises(MissingError, match="served: stories"):
        engine_for(url, tokenizer, model="gpt").check()
    assert engine.check() == {"model": "stories", "server": "openai", "max_length": None}

"""Fixtures that several tests share: tiny tokenizers and models, a recipe, the real data, a private cache."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from stillroom.batch import Batch
from stillroom.cli.main import main
from stillroom.data.dataloader import BatchStream
from stillroom.data.dataset import SCHEMA, Counts, Documents, _record_batch
from stillroom.data.formats import Encoded

torch.set_num_threads(1)
hypothesis_settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("untimed")  # a busy machine is no failure

TEXT = [
    "The still runs slowly, and what comes over first is thrown away.",
    "A teacher says what it thinks of every word; the student listens.",
    "User: how many drops? Assistant: 12 drops, no more than 34.",
    "def drip(n: int) -> int:\n    return n + 1\n",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(extra: tuple[str, ...] = (), vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> (added before each text) and </s>, trained on a few sentences."""
    specials = ["<s>", "</s>", *extra]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1 << 20,
        clean_up_tokenization_spaces=False,
    )


SHAPE = {
    "vocab_size": 304,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "gpt2": {},
    "phi": {},
}
"""What is particular to each family: gemma2 caps its logits, cohere and granite scale them, gpt2 has absolute
positions, phi has a head with a bias; qwen2, gemma2, cohere and gpt2 have tied weights."""
OTHER_NAMES = {
    name: {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    for name in ("gpt2", "bloom")
}


def build_config(family: str = "llama", **settings: Any) -> PretrainedConfig:
    """A tiny model's config: SHAPE, what is particular to the family, and the settings."""
    names = OTHER_NAMES.get(family, {})
    values = {names.get(key, key): value for key, value in SHAPE.items()}
    if family == "gpt2":
        values["n_positions"] = values.pop("max_position_embeddings")
    return AutoConfig.for_model(family, **{**values, **FAMILIES.get(family, {}), **settings})


def build_model(family: str = "llama", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny model in float32 whose logits are far from uniform and whose biases are not zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(build_config(family, **settings), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def build_documents(lengths: list[int], *, seed: int = 0, vocabulary: int = 300) -> Documents:
    """Documents of random tokens; the first fifth of each, rounded down, is not learned."""
    generator = np.random.default_rng(seed)
    encoded = []
    for document, length in enumerate(lengths):
        tokens = generator.integers(0, vocabulary, length, dtype=np.int32)
        encoded.append((document, Encoded(tokens, np.arange(length) >= length // 5)))
    table = pa.Table.from_batches([_record_batch(encoded)], SCHEMA)
    return Documents(table, Counts(), f"{seed} {lengths}", lambda row: f"text.jsonl line {row + 1}")


def build_stream(documents: Documents, **settings: Any) -> BatchStream:
    """Packed rows of 32 positions, up to eight in a step."""
    values = {"length": 32, "pack": True, "shuffle": True, "tokens": 256, "micro_tokens": 64, "seed": 0, "epochs": None}
    return BatchStream(documents, **{**values, **settings})


def build_batch(*lengths: int, seed: int = 0, **settings: Any) -> Batch:
    """One packed batch of documents of the given lengths."""
    stream = build_stream(
        build_documents(list(lengths), seed=seed), micro_tokens=256, shuffle=False, epochs=1, **settings
    )
    (batch,) = next(stream)
    return batch


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Ctrl-C means what it does on a terminal, also where a shell started the tests in the background without it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test tokenises into a cache of its own."""
    cache = tmp_path / "stillroom-cache"
    monkeypatch.setenv("STILLROOM_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def chat_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    tokenizer = build_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(chat_tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(chat_tokenizer_folder)


SaveModel = Callable[..., Path]
"""The type of the fixture ``saved_model``."""


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> SaveModel:
    """The folder of a tiny model with its tokenizer: ``saved_model(family, seed=0, tokenizer=FOLDER, **settings)``.

    Equal arguments give the same folder, so nothing may be written into it.
    """
    folders: dict[str, Path] = {}

    def save(family: str = "llama", *, seed: int = 0, tokenizer: Path = tokenizer_folder, **settings: Any) -> Path:
        key = repr((family, seed, tokenizer, sorted(settings.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp(re.sub(r"\W", "-", family))
            build_model(family, seed=seed, **settings).save_pretrained(folder)
            PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return save


def texts(number: int, first: int = 0) -> Iterator[str]:
    """Short texts, all different, of 8 to about 60 tokens."""
    for i in range(first, first + number):
        yield f"{i}: " + " ".join(TEXT[(i + k) % len(TEXT)] for k in range(1 + i % 2))[: 20 + 13 * i % 70]


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl of 24 texts and valid.jsonl of 5 others."""
    folder = tmp_path_factory.mktemp("text")
    for name, number, first in (("train", 24, 0), ("valid", 5, 100)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts(number, first)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, saved_model: SaveModel, text_files: Path) -> Path:
    """A recipe of a tiny run that lacks only ``out``: six steps, of two micro-batches or more."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"""\
student: {{model: {saved_model("llama", seed=1)}}}
teacher: {{kind: model, model: {saved_model("llama", seed=2)}}}
data: {{path: {text_files}/train.jsonl, format: text, length: 32}}
held_out: {{path: {text_files}/valid.jsonl}}
objectives:
  - {{kind: forward_kl, weight: 0.75}}
  - {{kind: cross_entropy, weight: 0.25}}
steps: 6
batch: {{tokens: 64, micro_tokens: 32}}
optimizer: {{learning_rate: 1e-2, warmup: 0.2}}
"""
    )
    return path


Command = Callable[..., subprocess.CompletedProcess[str]]
"""The type of the fixtures ``command`` and ``here``."""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process of its own, with a cache of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "STILLROOM_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Command:
    """Runs the real command line in a process of its own: ``command("distill", "r.yaml", "steps=2", code=0)``.

    It fails where the exit code is another; other keyword arguments go to ``subprocess.run``.
    """

    def run(*words: str, code: int = 0, **settings: Any) -> subprocess.CompletedProcess[str]:
        words_of_all = [sys.executable, "-m", "stillroom", *words]
        done = subprocess.run(
            words_of_all, check=False, capture_output=True, text=True, env=environment, timeout=300, **settings
        )
        assert done.returncode == code, f"exit code {done.returncode}, not {code}:\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Command:
    """As ``command``, but in this process, which saves the imports of another: for all but signals and limits."""

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        found = main(words)
        printed = capfd.readouterr()
        assert found == code, f"exit code {found}, not {code}:\n{printed.out}\n{printed.err}"
        return subprocess.CompletedProcess(words, found, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; a test that needs it is skipped where it is not there."""
    folder = Path(os.environ.get("STILLROOM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data are not at {folder}; set STILLROOM_DATA to where they are")
    return folder

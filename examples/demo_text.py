"""Real text for the demo: the Python standard library's own source on this machine, and a tokenizer of it."""

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}


def sources() -> Iterator[str]:
    """The modules of the standard library, documentation strings and all, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text


def write_text(folder: Path) -> None:
    """train.jsonl, and valid.jsonl with every fortieth module; the folder appears when both are whole."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (temporary / "train.jsonl").open("w") as train, (temporary / "valid.jsonl").open("w") as valid:
        for number, text in enumerate(sources()):
            (valid if number % 40 == 20 else train).write(json.dumps({"text": text}) + "\n")
    temporary.rename(folder)


def write_tokenizer(text: Path, folder: Path, vocabulary: int = 2048) -> None:
    """Trains a byte-level BPE tokenizer on every fourth module and saves it as a Hugging Face tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    with text.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for n, line in enumerate(lines) if n % 4 == 0), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    temporary = folder.with_suffix(".tmp")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)

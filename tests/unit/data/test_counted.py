"""Counted documents: the same as those of the cache, and the bytes of the text that each token stands for."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_tokenizer
from stillroom.data.config import ChatData, TextData
from stillroom.data.dataset import CountedDocuments, prepare
from stillroom.errors import DataError

TEXTS = ["  The still runs. ", "Größe 你好 🙂 e\u0301\n\nand  back", "a", " ".join(["drip and drop"] * 20)]


def written(folder: Path, rows: list[dict]) -> str:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("trim", [False, True])
def test_the_bytes_of_all_predicted_tokens_are_those_of_the_text(tmp_path, trim):
    """Where a beginning of sequence comes first, so that every byte is; also where the places leave out spaces."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    path = written(tmp_path, [{"text": text} for text in TEXTS])
    documents = CountedDocuments(TextData(format="text", path=path, length=16), tokenizer)
    of_rows = np.zeros(len(TEXTS), dtype=int)
    for i, row in enumerate(documents.source_rows):
        num_bytes = documents.num_bytes(i)
        assert num_bytes is not None
        assert len(num_bytes) == documents.lengths[i]
        of_rows[row] += num_bytes[1:].sum()
    assert of_rows.tolist() == [len(text.encode()) for text in TEXTS]


def test_without_a_beginning_of_sequence_the_first_token_is_not_predicted(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    documents = CountedDocuments(TextData(format="text", path=written(tmp_path, [{"text": "Größe"}])), tokenizer)
    num_bytes = documents.num_bytes(0)
    assert num_bytes is not None
    assert num_bytes.sum() == len("Größe".encode())
    assert num_bytes[0] == len(tokenizer.decode(documents.tokens(0)[:1])) > 0


def test_documents_are_those_of_the_cache_and_pieces_know_their_place(tmp_path, tiny_tokenizer):
    config = TextData(format="text", path=written(tmp_path, [{"text": text} for text in TEXTS]), length=16)
    ours, cached = CountedDocuments(config, tiny_tokenizer), prepare(config, tiny_tokenizer)
    assert ours.fingerprint == cached.fingerprint
    assert ours.counts == cached.counts
    assert len(ours) == len(cached) > len(TEXTS)
    for i in range(len(ours)):
        assert ours.tokens(i).tolist() == cached.tokens(i).tolist()
        assert ours.target_mask(i).tolist() == cached.target_mask(i).tolist()
        assert ours.name(i) == cached.name(i)
    last = int(np.flatnonzero(ours.source_rows == 3)[1])
    assert ours.first(last - 1) == 0
    assert ours.first(last) == 16


def test_special_tokens_of_a_chat_stand_for_no_text(tmp_path, chat_tokenizer):
    messages = [{"role": "user", "content": "Drops?"}, {"role": "assistant", "content": "12 drops."}]
    config = ChatData(format="chat", path=written(tmp_path, [{"messages": messages}]))
    documents = CountedDocuments(config, chat_tokenizer, template=CHATML)
    num_bytes, target_mask = documents.num_bytes(0), documents.target_mask(0)
    assert num_bytes is not None
    assert num_bytes[target_mask].sum() == len("12 drops.")
    assert num_bytes[documents.tokens(0) == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")].tolist() == [0, 0]


def test_a_tokenizer_that_drops_characters_stands_for_no_text(tmp_path):
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    documents = CountedDocuments(
        TextData(format="text", path=written(tmp_path, [{"text": "ab"}, {"text": "aéb"}, {"text": "abé"}])), tokenizer
    )
    assert [None if (n := documents.num_bytes(i)) is None else n.tolist() for i in range(3)] == [[1, 1, 0], None, None]


def test_nothing_to_learn_is_an_error(tmp_path, tiny_tokenizer):
    config = TextData(format="text", path=written(tmp_path, [{"text": ""}]), empty="drop")
    with pytest.raises(DataError, match="no document"):
        CountedDocuments(config, tiny_tokenizer)

"""Breakdowns and the worst passages, from numbers made up."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import build_tokenizer
from stillroom.data.config import TextData
from stillroom.data.dataset import CountedDocuments
from stillroom.evaluate.metrics import breakdowns, token_texts, units_of, worst_passages
from stillroom.evaluate.scoring import Predicted


def predicted_of(folder: Path, texts: list[str], length: int = 100) -> Predicted:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Predicted(CountedDocuments(TextData(format="text", path=str(path), length=length), build_tokenizer()))


def test_every_token_falls_into_the_bin_that_its_label_says(tmp_path):
    predicted = predicted_of(tmp_path, ["abcdefgh" * 3, "aaaaaaaa" * 5, "abab" * 9 + "xyz"])
    entropy = np.linspace(0, 8, len(predicted)).astype(np.float32)
    kl = np.random.default_rng(0).random(len(predicted)).astype(np.float32)
    by = {b.by: b for b in breakdowns(predicted, entropy, {"distilled": kl})}
    counts = np.bincount(predicted.tokens)[predicted.tokens]
    frequency = by["token_frequency"]
    for label, number, mean in zip(
        frequency.labels, frequency.num_tokens, frequency.forward_kl_nats["distilled"], strict=True
    ):
        least, _, most = label.rstrip("×").partition("–")
        inside = (counts >= int(least)) & (counts <= int(most or least))
        assert number == inside.sum() > 0
        assert mean == pytest.approx(kl[inside].mean())
    position = by["position"]
    assert position.labels[:3] == ("0–7", "8–15", "16–31")
    assert position.num_tokens[0] == (predicted.position < 8).sum()
    entropies = by["teacher_entropy"]
    assert (entropies.labels[0], entropies.labels[1], entropies.labels[-1]) == ("under 0.1", "0.1–0.5", "6 and more")
    assert entropies.num_tokens[0] == (entropy < 0.1).sum()
    assert entropies.num_tokens[-1] == (entropy >= 6).sum()


def test_an_empty_bin_has_no_mean(tmp_path):
    predicted = predicted_of(tmp_path, ["abc"])
    zeros = np.zeros(len(predicted), np.float32)
    (_, _, entropies) = breakdowns(predicted, zeros, {"distilled": zeros})
    assert entropies.forward_kl_nats["distilled"] == (0.0, *[None] * 7)


def test_the_worst_passages_are_the_worst_and_do_not_overlap(tmp_path):
    predicted = predicted_of(tmp_path, ["still drops " * 60, "a", "teacher " * 30], length=100)
    kl = np.full(len(predicted), 0.01, np.float32)
    first = np.flatnonzero(predicted.document == 1)
    kl[first[10] : first[10] + 3] = 9.0
    short = np.flatnonzero(predicted.documents.source_rows[predicted.document] == 1)
    kl[short] = 1.0
    found = worst_passages(predicted, kl, build_tokenizer())
    assert found[0].document == "text.jsonl line 1"
    assert 9.0 in found[0].kl_nats
    assert len(found[0].tokens) == 64
    place = found[0].first - 100 - 1 + found[0].kl_nats.index(9.0)
    assert place == 10  # in its piece, which begins where the first ended
    assert found[1].document == "text.jsonl line 2"
    assert found[1].mean_kl_nats == pytest.approx(1)
    taken = [(p.document, i) for p in found for i in range(p.first, p.first + len(p.tokens))]
    assert len(taken) == len(set(taken))


def test_texts_of_tokens_join_to_the_text_and_parts_of_characters_have_their_names():
    tokenizer = build_tokenizer()
    ids = tokenizer("The still runs.", add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == "The still runs."
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert (texts[0], texts[-1]) == ("a", "b")
    assert texts[1:-1] == tuple(tokenizer.convert_ids_to_tokens(ids[1:-1]))


def test_documents_are_drawn_again_and_pieces_where_there_are_few(tmp_path):
    few = units_of(predicted_of(tmp_path, ["still drops " * 60, "a"], length=20))
    assert few.noun == "pieces"
    assert few.number > 2
    many = units_of(predicted_of(tmp_path, ["still drops " * 9] * 20, length=20))
    assert (many.noun, many.number) == ("documents", 20)

"""Tokenizers: loading, fingerprints that are stable and tell every difference, and messages that show it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_tokenizer
from stillroom.errors import DataError, MismatchError, MissingError
from stillroom.tokenizers import (
    compare,
    fingerprint,
    is_local,
    load_tokenizer,
    required_vocab_size,
    template_fingerprint,
    template_of,
)


def edited(folder: Path, target: Path, change) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer whose tokenizer.json was changed by ``change(values)``."""
    shutil.copytree(folder, target)
    values = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    change(values)
    (target / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(target)


def swap_two_tokens(values: dict) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


def test_fingerprint_is_the_same_for_every_load(tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(str(tokenizer_folder))
    loaded.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert fingerprint(loaded) == fingerprint(again) == fingerprint(build_tokenizer())
    assert len(fingerprint(loaded)) == 64
    compare(loaded, again)


def test_padding_token_and_template_do_not_make_tokenizers_differ(tokenizer_folder: Path) -> None:
    other = load_tokenizer(str(tokenizer_folder))
    other.pad_token, other.chat_template = "</s>", CHATML
    compare(load_tokenizer(str(tokenizer_folder)), other)


def test_two_swapped_tokens_are_shown_though_the_sizes_are_equal(
    tiny_tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = edited(tokenizer_folder, tmp_path / "other", swap_two_tokens)
    assert required_vocab_size(other) == required_vocab_size(tiny_tokenizer)
    with pytest.raises(MismatchError) as caught:
        compare(tiny_tokenizer, other)
    message = str(caught.value)
    id_of_a = tiny_tokenizer.convert_tokens_to_ids("A")
    assert f"id {id_of_a}: 'A' in the teacher, 'B' in the student" in message
    assert fingerprint(tiny_tokenizer)[:16] in message
    assert fingerprint(other)[:16] in message
    assert "2 tokens differ" in message


def test_an_added_token_of_one_only_differs(tokenizer_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = load_tokenizer(str(tokenizer_folder))
    other.add_tokens(["<extra>"])
    with pytest.raises(MismatchError, match=r"id 300: nothing in the big, '<extra>' in the small"):
        compare(tiny_tokenizer, other, names=("big", "small"))
    assert required_vocab_size(other) == required_vocab_size(tiny_tokenizer) + 1


def test_another_end_of_sequence_differs(tokenizer_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = load_tokenizer(str(tokenizer_folder))
    other.eos_token = "<s>"
    with pytest.raises(MismatchError, match=r"eos_token: \('</s>', 1\) in the teacher, \('<s>', 0\) in the student"):
        compare(tiny_tokenizer, other)


def test_other_merges_with_the_same_tokens_differ(
    tiny_tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = edited(tokenizer_folder, tmp_path / "other", lambda values: values["model"]["merges"].reverse())
    assert other.get_vocab() == tiny_tokenizer.get_vocab()
    with pytest.raises(MismatchError, match=r"encodings differ"):
        compare(tiny_tokenizer, other)


def test_no_added_beginning_of_sequence_differs(
    tiny_tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = edited(tokenizer_folder, tmp_path / "other", lambda values: values.update(post_processor=None))
    with pytest.raises(MismatchError, match="from token 0"):
        compare(tiny_tokenizer, other)


def test_required_vocab_size_counts_gaps(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert required_vocab_size(tokenizer) == 1 + max(tokenizer.get_vocab().values()) == 300


def test_templates(tiny_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert template_of(tiny_tokenizer) is None
    assert template_of(chat_tokenizer) == CHATML
    assert template_fingerprint(None) == "none"
    assert template_fingerprint(CHATML) != template_fingerprint(CHATML + " ")


def test_several_templates_without_a_default_are_refused(chat_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(chat_tokenizer_folder))
    tokenizer.chat_template = {"tool": CHATML, "plain": CHATML}
    with pytest.raises(DataError, match="none of them is the default"):
        template_of(tokenizer)


@pytest.mark.parametrize("path", ["./x", "/x/y", "~/x", "a/b/c", "../x", "with space"])
def test_what_cannot_be_a_hub_name_is_local(path: str) -> None:
    assert is_local(path)
    with pytest.raises(MissingError, match="the hub was not asked"):
        load_tokenizer(path)


def test_a_hub_name_that_is_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("stillroom-nobody/no-such-model")
    with pytest.raises(MissingError, match="hf auth login"):
        load_tokenizer("stillroom-nobody/no-such-model")


def test_a_folder_without_a_tokenizer_or_with_a_broken_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_tokenizer(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(tokenizer_folder, broken)
    whole = (broken / "tokenizer.json").read_bytes()
    (broken / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_tokenizer(str(broken))
    (broken / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DataError, match="git-lfs pointer"):
        load_tokenizer(str(broken))


def test_real_tokenizers_differ(shared_data: Path) -> None:
    gpt2, llama2 = (load_tokenizer(str(shared_data / "tokenizers" / name)) for name in ("gpt2", "llama2"))
    assert (required_vocab_size(gpt2), required_vocab_size(llama2)) == (50257, 32000)
    with pytest.raises(MismatchError, match="id 0: '!' in the teacher, '<unk>' in the student"):
        compare(gpt2, llama2)

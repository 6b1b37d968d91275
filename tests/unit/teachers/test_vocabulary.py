"""Which token a server means by what it writes: exactly, or not at all."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from stillroom.teachers.vocabulary import Vocabulary, token_bytes


@pytest.fixture
def byte_level(tiny_tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary(tiny_tokenizer)


@pytest.fixture
def pieces() -> Vocabulary:
    """Pieces with a mark for spaces, and a token for each byte; `a` is a byte and a piece, `b` a byte alone."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁the", "é"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>"))


def test_tokens_decode_to_their_bytes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("The still runs slowly", "naïve 🙂\n\t", "  x"):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        found = token_bytes(tiny_tokenizer)
        assert b"".join(found[number] for number in ids).decode() == text


def test_each_text_means_its_token(byte_level: Vocabulary, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    numbers = tiny_tokenizer.get_vocab()
    assert byte_level.id_of(" t") == numbers["Ġt"]
    assert byte_level.id_of("</s>") == 1
    assert byte_level.id_of("\n") == numbers["Ċ"]
    assert all(byte_level.id_of(f"token_id:{number}") == number for number in numbers.values())
    assert all(byte_level.id_of("�", list(data)) == n for n, data in byte_level.bytes.items() if n > 1)
    assert byte_level.id_of("bytes:\\xf0") == numbers["ð"]


@pytest.mark.parametrize(
    "text",
    ["", "�", "no such token", "token_id:300", "token_id:-1", "token_id:" + "9" * 5000, "bytes:\\xf0\\x9f", "bytes:"],
)
def test_what_means_several_tokens_or_none_is_none(byte_level: Vocabulary, text: str) -> None:
    assert byte_level.id_of(text) is None


@pytest.mark.parametrize("data", [[300], [-1], ["a"], [1.5]])
def test_bytes_that_are_none_are_none(byte_level: Vocabulary, data: list[object]) -> None:
    assert byte_level.id_of("a", data) is None


def test_a_byte_that_is_a_piece_too_means_the_piece(pieces: Vocabulary) -> None:
    assert pieces.bytes[2 + ord("a")] == pieces.bytes[259] == b"a"
    assert pieces.id_of("a") == 259
    assert pieces.id_of("b") == 2 + ord("b")
    assert pieces.id_of(" ") == 258
    assert pieces.id_of(" the") == 261
    assert pieces.id_of("é") == 262
    assert pieces.id_of("x", [0xC3]) == 2 + 0xC3


def test_part_of_a_character_beside_text_makes_the_text_unclear() -> None:
    backend = Tokenizer(models.BPE({"Ġ": 0, "Ġâ": 1, "x": 2}, []))
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary.id_of("x") == 2
    assert vocabulary.id_of(" ") is None  # servers that leave invalid bytes out show the token Ġâ so too
    assert vocabulary.id_of(" �") == 1


def test_words_mean_themselves() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "▁b": 1, "c": 2}, unk_token="a"))
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [vocabulary.id_of(text) for text in ("a", "▁b", " b", "c")] == [0, 1, None, 2]


def test_a_token_fits_each_way_of_writing_it(byte_level: Vocabulary) -> None:
    (part,) = (number for number, data in byte_level.bytes.items() if data == b"\xf0")
    for text in ("", "�", f"token_id:{part}", "bytes:\\xf0"):
        assert byte_level.fits(part, text)
    assert byte_level.fits(1, "")
    assert byte_level.fits(1, "</s>")
    assert not byte_level.fits(1, "x")
    assert not byte_level.fits(part, "bytes:\\xf1")

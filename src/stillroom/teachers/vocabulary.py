"""Vocabulary: from a server's text or bytes for a token to the token's id, exactly or not at all."""

import json
import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stillroom.recipe import parse_json
from stillroom.tokenizers import required_vocab_size

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that each character of a byte-level vocabulary stands for."""


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Returns the bytes of text that each token stands for; of special tokens, their names."""
    decoder = json.dumps(parse_json(tokenizer.backend_tokenizer.to_str())["decoder"])  # pyright: ignore
    byte_of = BYTE_LEVEL if '"ByteLevel"' in decoder else None
    pieces = any(name in decoder for name in ('"ByteFallback"', '"Metaspace"', '"\\u2581"'))
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    found = {}
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            found[number] = added[number].encode()
        elif byte_of is not None and all(character in byte_of for character in token):
            found[number] = bytes(byte_of[character] for character in token)
        elif pieces and (match := _BYTE_TOKEN.fullmatch(token)):
            found[number] = bytes([int(match[1], 16)])
        else:
            found[number] = (token.replace("▁", " ") if pieces else token).encode()
    return found


class Vocabulary:
    """The forms that each token of a tokenizer takes in a server's answer.

    Servers write a token as ``token_id:123``, as its bytes, as ``bytes:\\xe2\\x80``, or as its text. A text means a
    token where no other could look the same, which counts tokens that are parts of a character, of which servers show
    what is left without the invalid bytes, or � in their place. One rule beside that: a byte token of a vocabulary
    that has a piece for the same byte is never written by the tokenizer, so the text means the piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocab_size = required_vocab_size(tokenizer)
        self.bytes = token_bytes(tokenizer)
        self.by_digits = {str(number): number for number in self.bytes}
        self.special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._by_bytes: dict[bytes, list[int]] = {}
        self._by_text: dict[str, set[int]] = {}
        tokens = {number: token for token, number in tokenizer.get_vocab().items()}
        pieces = {data for number, data in self.bytes.items() if not _BYTE_TOKEN.fullmatch(tokens[number])}
        for number, data in self.bytes.items():
            if _BYTE_TOKEN.fullmatch(tokens[number]) and data in pieces:
                continue
            self._by_bytes.setdefault(data, []).append(number)
            for text in self.texts(number):
                self._by_text.setdefault(text, set()).add(number)

    def texts(self, number: int) -> set[str]:
        """Returns what a server may show for a token: its text, what is left of it, or nothing for a special one."""
        data = self.bytes[number]
        found = {data.decode("utf-8", "replace"), data.decode("utf-8", "ignore")}
        return found | {""} if number in self.special else found

    def id_of(self, text: str, data: object = None) -> int | None:
        """Returns the id of what a server wrote for a token; None where that could be several tokens, or is none.

        Args:
            data: its ``bytes``, where the server gave them: a list of whole numbers, or None.
        """
        if match := re.fullmatch(r"token_id:(\d{1,9})", text):
            return int(match[1]) if int(match[1]) < self.vocab_size else None
        if isinstance(data, list) and data:
            if not all(isinstance(byte, int) and 0 <= byte < 256 for byte in data):
                return None
            return self._only(self._by_bytes.get(bytes(data), []))
        if re.fullmatch(r"bytes:(\\x[0-9a-fA-F]{2})+", text):
            return self._only(self._by_bytes.get(bytes.fromhex(text[6:].replace("\\x", "")), []))
        return self._only(list(self._by_text.get(text, ())))

    def fits(self, number: int, text: str) -> bool:
        """Returns whether what a server wrote can be this token."""
        if text == f"token_id:{number}" or text in self.texts(number):
            return True
        return text.startswith("bytes:") and self.id_of(text) == number

    @staticmethod
    def _only(found: list[int]) -> int | None:
        return found[0] if len(found) == 1 else None

"""Token texts as a terminal can show them: on one line, with nothing in them that it would obey."""

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from stillroom.terminal import escaped


class TokenTexts:
    """The texts of a tokenizer's tokens, each in quotation marks, by id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.text = lru_cache(1 << 16)(self._text)

    def _text(self, token: int) -> str:
        """What token ``token`` stands for; an id that has none is shown by its number."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"<{token}>"
        if piece in self._special:
            return escaped(piece)
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        if not text or "\ufffd" in text:  # a part of a character
            return f"<{escaped(piece)}>"
        if piece.startswith("▁") and not text[0].isspace():
            text = f" {text}"
        return f"'{escaped(text)}'"

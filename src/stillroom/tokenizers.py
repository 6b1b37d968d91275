"""Tokenizers: load one, tell two apart by fingerprint, and say where two of them differ."""

import hashlib
import json
from itertools import islice
from operator import itemgetter
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from stillroom.config import is_local
from stillroom.errors import DataError, MismatchError, MissingError

PROBE = (
    "The quick brown fox can't jump over 13 lazy dogs; it's 3.14159 (or 1,234,567)...",
    "  two spaces\tand a tab\n\n\nthree newlines\r\nand trailing spaces   ",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # <tag attr='a/b'> && || != 0x1F\n",
    "Größe naïve façade Ærøskøbing, Прощай, Καλημέρα, שלום, مرحبا, नमस्ते, 你好世界, こんにちは, 안녕하세요",
    "🙂👩‍👩‍👧🏽🇨🇭 e\u0301 \u00a0\u200b\ufeff ﬁ ½ Ⅷ",
    "",
)
"""What the fingerprint encodes: scripts, whitespace, digits, code, emoji and forms that normalisers change."""

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Of which a model's folder has at least one, where it has a tokenizer."""
_LFS = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer, which stands where the real file should be."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer from a folder or from the hub.

    Raises:
        MissingError: the folder is not there, or the hub cannot give it.
        DataError: what is there is not a tokenizer, or has no fast form.
    """
    local = is_local(path)
    if local:
        _check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not local and isinstance(error, OSError):
            raise MissingError(
                f"the tokenizer {path} is not there",
                {"folder": "does not exist", "hub": _first_line(error)},
                why="The name is neither a folder on this machine nor one that the hub gives.",
                fix="Check the spelling and the connection; a private model also needs `hf auth login`.",
            ) from None
        raise DataError(
            f"{path} cannot be read as a tokenizer",
            {"reason": _first_line(error)},
            why="Text becomes tokens only by the tokenizer that the model was trained with.",
            fix="Copy tokenizer.json and tokenizer_config.json from the model's source again, or, if it brings its own "
            "code, set trust_remote_code=true.",
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {path} has no fast form",
            {"found": type(tokenizer).__name__, "needed": "a tokenizer.json of the `tokenizers` library"},
            why="Only a fast tokenizer tells which characters a token came from, and so which tokens are to be learnt.",
            fix="Convert it with transformers' `convert_slow_tokenizer` and save it beside the model.",
        )
    return tokenizer


def has_tokenizer(model: str, *, revision: str | None = None) -> bool:
    """Whether a model's folder, here or on the hub, holds a tokenizer too.

    Raises:
        MissingError: the hub does not tell.
    """
    look = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        return any(cached_file(model, name, **look) is not None for name in _FILES)
    except OSError as error:
        raise MissingError(
            f"whether {model} has a tokenizer is not known",
            {"hub": _first_line(error)},
            why="A tokenizer that is not the model's own would feed it the wrong tokens.",
            fix="Check the connection; or give a local folder.",
        ) from None


def _check_folder(path: str) -> None:
    if not Path(path).exists():
        raise MissingError(
            f"the tokenizer folder {path} is not there",
            {"looked in": str(Path(path).absolute())},
            why="The path is one on this machine, so the hub was not asked.",
            fix="Check the path; a hub name is written as owner/name.",
        )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(path) / file).is_file() and is_lfs_pointer(Path(path) / file):
            raise DataError(
                f"{Path(path) / file} is a git-lfs pointer, not the file itself",
                why="The clone holds only the address of the file.",
                fix="Run `git lfs pull` in that folder.",
            )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def required_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of logit columns that the tokenizer needs: its largest id plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of the tokenizer's default chat template, or None where it has none."""
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            "the tokenizer has several chat templates and none of them is the default",
            {"tokenizer": tokenizer.name_or_path, "reason": _first_line(error)},
            why="Which one a conversation goes through must not be guessed.",
            fix="Name one of them `default` in the tokenizer's configuration.",
        ) from None


def template_fingerprint(template: str | None) -> str:
    """The sha256 of a chat template's text, in hex; that of no template is "none"."""
    return "none" if template is None else hashlib.sha256(template.encode()).hexdigest()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256, in hex, of all that decides which ids a text becomes and what they mean.

    It covers the token -> id map, the special tokens by role with their ids (not the padding token, which stands
    only where nothing counts), and the encodings of a probe text and of each added token, special tokens added.
    """
    parts = [sorted(tokenizer.get_vocab().items()), _roles(tokenizer), _encodings(tokenizer)]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, int | None] | None]:
    vocabulary = tokenizer.get_vocab()
    roles: dict[str, tuple[str, int | None] | None] = {}
    for role in _ROLES:
        token = getattr(tokenizer, role, None)
        roles[role] = None if token is None else (str(token), vocabulary.get(str(token)))
    return roles


def _encodings(tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True) -> dict[str, list[int]]:
    added = tuple(str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()))
    texts = list(dict.fromkeys((*PROBE, *added)))
    return dict(
        zip(texts, tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"], strict=True)
    )


def compare(
    a: PreTrainedTokenizerBase,
    b: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("teacher", "student"),
    *,
    roles: bool = True,
    fix: str | None = None,
) -> None:
    """Returns where both tokenizers turn every text into the same ids with the same meaning.

    With ``roles`` off, only the text's own tokens count: which token begins or ends a sequence may differ, as it does
    between a base model and one tuned for chat. ``fix`` is what the error says is to be done.

    Raises:
        MismatchError: they differ; it bears both fingerprints and the first differences: of tokens by id, or else of
            special tokens, or else of the probe's encodings. Equal sizes prove nothing.
    """
    prints = fingerprint(a), fingerprint(b)
    found = None if prints[0] == prints[1] else _differences(a, b, roles)
    if found is None:
        return
    values: dict[str, object] = {
        name: f"fingerprint {print_[:16]}, {len(tokenizer.get_vocab())} tokens ({tokenizer.name_or_path or 'unnamed'})"
        for name, print_, tokenizer in zip(names, prints, (a, b), strict=True)
    }
    kind, count, differences = found
    for subject, in_a, in_b in differences:
        values[subject] = f"{in_a} in the {names[0]}, {in_b} in the {names[1]}"
    raise MismatchError(
        f"the {names[0]} and the {names[1]} have different tokenizers",
        values,
        why=f"{count} {kind} differ, so the same column of their logits does not mean the same token in the same text.",
        fix=fix
        or f"Use models that share one tokenizer; where only special tokens differ, set student.tokenizer to the one "
        f"that counts for both, usually the {names[0]}'s.",
    )


def _differences(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, roles: bool, limit: int = 5
) -> tuple[str, int, list[tuple[str, str, str]]] | None:
    """What differs first (tokens, special tokens or encodings), how many do, and the first few as texts; or None."""
    maps = [
        {f"id {number}": token for token, number in sorted(t.get_vocab().items(), key=itemgetter(1))} for t in (a, b)
    ]
    special = (_roles(a), _roles(b)) if roles else ({}, {})
    kinds = (("tokens", *maps), ("special tokens", *special), ("encodings", *(_encodings(t, roles) for t in (a, b))))
    for kind, of_a, of_b in kinds:
        keys = [key for key in {**of_a, **of_b} if of_a.get(key) != of_b.get(key)]
        if keys:
            return kind, len(keys), [_show(kind, k, of_a.get(k), of_b.get(k)) for k in islice(keys, limit)]
    return None


def _show(kind: str, key: str, in_a: object, in_b: object) -> tuple[str, str, str]:
    if kind == "encodings" and isinstance(in_a, list) and isinstance(in_b, list):
        at = next((i for i, (x, y) in enumerate(zip(in_a, in_b, strict=False)) if x != y), min(len(in_a), len(in_b)))
        return f"{key[:24]!r} from token {at}", str(in_a[at : at + 4]), str(in_b[at : at + 4])
    subject = f"{key[:24]!r}" if kind == "encodings" else key
    text_a, text_b = ("nothing" if value is None else repr(value) for value in (in_a, in_b))
    return subject, text_a, text_b

"""Tokenizers: load one, tell two apart by fingerprint, and say where two of them differ."""

import hashlib
import json
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from stillroom.config import is_local
from stillroom.errors import DataError, MismatchError, MissingError, first_line

PROBE = (
    "The quick brown fox can't jump over 13 lazy dogs; it's 3.14159 (or 1,234,567)...",
    "  two spaces\tand a tab\n\n\nthree newlines\r\nand trailing spaces   ",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # <tag attr='a/b'> && || != 0x1F\n",
    "Größe naïve façade Ærøskøbing, Прощай, Καλημέρα, שלום, مرحبا, नमस्ते, 你好世界, こんにちは, 안녕하세요",
    "🙂👩‍👩‍👧🏽🇨🇭 e\u0301 \u00a0\u200b\ufeff ﬁ ½ Ⅷ",
    "",
)
"""The texts that the fingerprint encodes: scripts, whitespace, digits, code, emoji, forms that normalizers change."""

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""The files of which a model's folder has at least one, where it has a tokenizer."""


def refuse_lfs_pointer(path: Path, what: str) -> None:
    """Returns where a file is not a git-lfs pointer, which stands where ``what`` should be. Raises DataError where
    it is one."""
    mark = b"version https://git-lfs.github.com/spec/"
    with path.open("rb") as file:
        if file.read(len(mark)) == mark:
            raise DataError(
                f"{path} is a git-lfs pointer, not {what}",
                {"size": f"{path.stat().st_size} bytes"},
                why="The repository was cloned without its large files.",
                fix="Run `git lfs pull` in that folder.",
            )


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer from a folder or from the hub. Raises MissingError where the folder is not there, or
    the hub cannot give it; DataError where what is there is not a tokenizer, or has no fast form."""
    local, folder = is_local(path), Path(path)
    if local and not folder.exists():
        raise MissingError(
            f"the tokenizer folder {path} is not there",
            {"looked in": folder.absolute()},
            why="The path is one on this machine, so the hub was not asked.",
            fix="Check the path; a hub name is written as owner/name.",
        )
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if local and file.is_file():
            refuse_lfs_pointer(file, "the file itself")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not local and isinstance(error, OSError):
            raise MissingError(
                f"the tokenizer {path} is not there",
                {"folder": "does not exist", "hub": first_line(error)},
                why="The name is neither a folder on this machine nor one that the hub gives.",
                fix="Check the spelling and the connection; a private model also needs `hf auth login`.",
            ) from None
        raise DataError(
            f"{path} cannot be read as a tokenizer",
            {"reason": first_line(error)},
            why="Text becomes tokens only by the tokenizer that the model was trained with.",
            fix="Copy its tokenizer*.json from their source; if it brings its own code, set trust_remote_code=true.",
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {path} has no fast form",
            {"found": type(tokenizer).__name__, "needed": "a tokenizer.json of the `tokenizers` library"},
            why="Only a fast tokenizer tells which characters a token came from, and so which are to be learned.",
            fix="Convert it with transformers' `convert_slow_tokenizer` and save it beside the model.",
        )
    return tokenizer


def has_tokenizer(model: str, *, revision: str | None = None) -> bool:
    """Whether a model's folder, here or on the hub, holds a tokenizer too. Raises MissingError where the hub does
    not tell."""
    look = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        return any(cached_file(model, name, **look) is not None for name in _FILES)
    except OSError as error:
        raise MissingError(
            f"whether {model} has a tokenizer is not known",
            {"hub": first_line(error)},
            why="A tokenizer that is not the model's own would feed it the wrong tokens.",
            fix="Check the connection; or give a local folder.",
        ) from None


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
            {"tokenizer": tokenizer.name_or_path, "reason": first_line(error)},
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
    tokens = {role: getattr(tokenizer, role, None) for role in _ROLES}
    return {r: None if token is None else (str(token), vocabulary.get(str(token))) for r, token in tokens.items()}


def _encodings(tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True) -> dict[str, list[int]]:
    added = tuple(str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()))
    texts = list(dict.fromkeys((*PROBE, *added)))
    ids = tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return dict(zip(texts, ids, strict=True))


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
    if prints[0] == prints[1]:
        return
    maps = [
        {f"id {number}": token for token, number in sorted(t.get_vocab().items(), key=itemgetter(1))} for t in (a, b)
    ]
    special = (_roles(a), _roles(b)) if roles else ({}, {})
    kinds: dict[str, tuple[Mapping[str, object], ...]] = {
        "tokens": tuple(maps),
        "special tokens": special,
        "encodings": (_encodings(a, roles), _encodings(b, roles)),
    }
    differing = {k: [key for key in {**x, **y} if x.get(key) != y.get(key)] for k, (x, y) in kinds.items()}
    kind = next((kind for kind, keys in differing.items() if keys), None)
    if kind is None:
        return
    keys, (of_a, of_b) = differing[kind], kinds[kind]
    values: dict[str, object] = {
        name: f"fingerprint {print_[:16]}, {len(tokenizer.get_vocab())} tokens ({tokenizer.name_or_path or 'unnamed'})"
        for name, print_, tokenizer in zip(names, prints, (a, b), strict=True)
    }
    for key in keys[:5]:
        subject, in_a, in_b = f"{key[:24]!r}" if kind == "encodings" else key, of_a.get(key), of_b.get(key)
        if isinstance(in_a, list) and isinstance(in_b, list):
            pairs = zip(in_a, in_b, strict=False)
            at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(in_a), len(in_b)))
            subject, in_a, in_b = f"{subject} from token {at}", in_a[at : at + 4], in_b[at : at + 4]
        shown = ["nothing" if value is None else repr(value) for value in (in_a, in_b)]
        values[subject] = f"{shown[0]} in the {names[0]}, {shown[1]} in the {names[1]}"
    raise MismatchError(
        f"the {names[0]} and the {names[1]} have different tokenizers",
        values,
        why=f"{len(keys)} {kind} differ, so the same column of their logits does not mean the same token in a text.",
        fix=fix
        or f"Use models that share one tokenizer; where only special tokens differ, set student.tokenizer to the one "
        f"that counts for both, usually the {names[0]}'s.",
    )

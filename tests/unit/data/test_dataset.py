"""Documents: what is kept of each row, with counts; a cache that is found again, whole or not at all."""

import json
import os
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, build_tokenizer
from stillroom.data import dataset as module
from stillroom.data.config import ChatData, PromptCompletionData, TextData, cache_folder
from stillroom.data.dataloader import collate
from stillroom.data.dataset import RowOrigin, cache_path, prepare
from stillroom.errors import DataError, StorageError
from stillroom.runs import lock
from stillroom.tokenizers import load_tokenizer


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", [{"text": "drops"}, {"text": "slowly " * 20}, {"text": "12 drops"}])


def text_data(path: str, **settings) -> TextData:
    return TextData(format="text", path=path, **settings)


def pair_data(path: str, **settings) -> PromptCompletionData:
    return PromptCompletionData(format="prompt_completion", path=path, **settings)


def test_documents_are_the_rows_of_the_source(texts: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = prepare(text_data(texts), tiny_tokenizer)
    expected = [[*tiny_tokenizer.encode(text), 1] for text in ("drops", "slowly " * 20, "12 drops")]
    assert [documents.tokens(i).tolist() for i in range(3)] == expected
    assert documents.lengths.tolist() == [len(tokens) for tokens in expected]
    assert documents.source_rows.tolist() == [0, 1, 2]
    assert documents.name(2) == "train.jsonl line 3"
    assert documents.target_mask(1).all()
    assert documents.counts["rows"] == documents.counts["documents"] == 3
    assert documents.counts["tokens"] == sum(map(len, expected))
    assert documents.counts["tokens_learnt"] == sum(map(len, expected)) - 3
    with pytest.raises(IndexError):
        documents.tokens(3)


def numbered(path: Path, numbers, **settings) -> TextData:
    return text_data(write(path, [{"text": f"{n} drops " * (1 + n % 9)} for n in numbers]), **settings)


def rows_of(documents) -> set[str]:
    return {documents.name(i) for i in range(len(documents))}


def test_rows_are_chosen_by_their_hash(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each range has its share, two that part 0 to 1 part the rows, and each row is what it is among all."""
    config = numbered(tmp_path / "a.jsonl", range(700), length=16)
    whole = prepare(config, tiny_tokenizer)
    parts = [
        prepare(config.model_copy(update={"hash_range": ends}), tiny_tokenizer) for ends in ([0.0, 0.2], [0.2, 1.0])
    ]
    names = [rows_of(part) for part in parts]
    assert not names[0] & names[1]
    assert names[0] | names[1] == rows_of(whole)
    assert 100 <= len(names[0]) <= 180
    for key in ("documents", "tokens", "tokens_learnt"):
        assert sum(part.counts[key] for part in parts) == whole.counts[key]
    assert parts[0].counts["tokens_learnt"] == sum(int(parts[0].target_mask(i)[1:].sum()) for i in range(len(parts[0])))
    first = {(whole.name(i), tuple(whole.tokens(i).tolist())) for i in range(len(whole))}
    assert {(parts[0].name(i), tuple(parts[0].tokens(i).tolist())) for i in range(len(parts[0]))} < first
    assert len({documents.fingerprint for documents in (whole, *parts)}) == 3


def test_a_row_stays_held_out_when_the_data_grow_or_turn(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def texts_held(name: str, numbers) -> set[str]:
        documents = prepare(numbered(tmp_path / name, numbers, hash_range=[0.0, 0.3]), tiny_tokenizer)
        return {str(tiny_tokenizer.decode(documents.tokens(i))) for i in range(len(documents))}

    first = texts_held("a.jsonl", range(200))
    assert texts_held("b.jsonl", reversed(range(200))) == first
    grown = texts_held("c.jsonl", range(1500))  # in several record batches
    assert first < grown


def test_masks_and_weights_go_with_the_rows_that_are_chosen(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": f"{n} ", "completion": f"drops {n}", "w": n / 8} for n in range(100)]
    config = pair_data(write(tmp_path / "a.jsonl", rows), weight="w")
    whole, part = (
        prepare(config.model_copy(update={"hash_range": ends}), tiny_tokenizer) for ends in (None, [0.4, 0.8])
    )
    by_name = {whole.name(i): i for i in range(len(whole))}
    for i in range(len(part)):
        j = by_name[part.name(i)]
        assert part.weight(i) == whole.weight(j)
        assert part.target_mask(i).tolist() == whole.target_mask(j).tolist()
        assert part.lengths[i] == len(part.tokens(i))
    with pytest.raises(IndexError):
        part.tokens(len(part))


def test_a_share_that_holds_no_row_is_refused(texts: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no row of"):
        prepare(text_data(texts, hash_range=[0.0, 1e-9]), tiny_tokenizer)


def test_tokens_are_views_of_the_file(texts: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = prepare(text_data(texts), tiny_tokenizer).tokens(0)
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable


def test_learn_survives_the_file(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": role, "content": "drops"} for role in ("user", "assistant", "user", "assistant")]
    path = write(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    config = ChatData(format="chat", path=path)
    documents = prepare(config, chat_tokenizer)
    encoded = module.encoder(config, chat_tokenizer, CHATML)([{"messages": turns}, {"messages": turns[:2]}], str)
    for index, document in enumerate(encoded):
        assert np.array_equal(documents.tokens(index), document.tokens)
        assert np.array_equal(documents.target_mask(index), document.target_mask)
    assert documents.counts["tokens_learnt"] == sum(int(document.target_mask.sum()) for document in encoded)


def test_more_rows_than_are_encoded_at_once(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    path = write(tmp_path / "a.jsonl", [{"text": f"drops {i}"} for i in range(10)])
    done: list[int] = []
    documents = prepare(text_data(path), tiny_tokenizer, report=done.append)
    assert done == [4, 8, 10]
    assert [tiny_tokenizer.decode(documents.tokens(i)) for i in range(10)] == [f"<s>drops {i}</s>" for i in range(10)]
    assert documents.name(9) == "a.jsonl line 10"


# --- length and emptiness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 8, 1000])
def test_split_predicts_each_token_exactly_once(texts: str, tiny_tokenizer, length: int) -> None:
    whole = prepare(text_data(texts), tiny_tokenizer)
    pieces = prepare(text_data(texts, length=length), tiny_tokenizer)
    assert pieces.lengths.max() <= length + 1
    for row in range(3):
        of_row = [pieces.tokens(int(i)) for i in np.flatnonzero(pieces.source_rows == row)]
        assert np.concatenate([of_row[0][:1], *(piece[1:] for piece in of_row)]).tolist() == whole.tokens(row).tolist()
        assert all(a[-1] == b[0] for a, b in pairwise(of_row))
    assert pieces.counts["tokens_learnt"] == whole.counts["tokens_learnt"]
    assert pieces.counts["split"] == int((whole.lengths > length + 1).sum())


def test_length_inputs_each_have_a_next_token(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "12"}])
    assert len(tiny_tokenizer.encode("12")) + 1 == 4
    documents = prepare(text_data(path, length=3, overlong="drop"), tiny_tokenizer)
    assert documents.lengths.tolist() == [4]
    with pytest.raises(DataError, match=r"no document of .* is left"):
        prepare(text_data(path, length=2, overlong="drop"), tiny_tokenizer)


def test_cut_and_drop_are_counted(texts: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = prepare(text_data(texts), tiny_tokenizer)
    cut = prepare(text_data(texts, length=12, overlong="cut"), tiny_tokenizer)
    assert (cut.counts["cut"], cut.counts["documents"]) == (1, 3)
    assert cut.tokens(1).tolist() == whole.tokens(1)[:13].tolist()
    dropped = prepare(text_data(texts, length=12, overlong="drop"), tiny_tokenizer)
    assert (dropped.counts["dropped_overlong"], dropped.source_rows.tolist()) == (1, [0, 2])


def test_a_completion_beyond_the_cut_is_dropped_and_counted(tmp_path: Path, tiny_tokenizer) -> None:
    rows = [{"prompt": "x" * 30, "completion": "y"}, {"prompt": "x", "completion": "y" * 30}]
    documents = prepare(pair_data(write(tmp_path / "a.jsonl", rows), length=10), tiny_tokenizer)
    assert documents.source_rows.tolist() == [1]
    assert documents.counts["dropped_cut_away"] == 1
    assert documents.counts["cut"] == 1
    assert documents.lengths.tolist() == [11]


def test_an_empty_row_is_refused_or_counted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "drops"}, {"text": ""}, {"text": "12"}])
    with pytest.raises(DataError, match=r"a\.jsonl line 2 has nothing to learn"):
        prepare(text_data(path), tiny_tokenizer)
    documents = prepare(text_data(path, empty="drop"), tiny_tokenizer)
    assert documents.source_rows.tolist() == [0, 2]
    assert documents.counts["dropped_empty"] == 1
    assert documents.name(1) == "a.jsonl line 3"


def test_a_single_token_predicts_nothing(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="line 1 has nothing to learn"):
        prepare(text_data(write(tmp_path / "a.jsonl", [{"text": "x"}])), tokenizer)


def test_only_the_first_documents(texts: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(prepare(text_data(texts, max_documents=2), tiny_tokenizer)) == 2


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_is_found_again(texts: str, tiny_tokenizer, own_cache: Path, monkeypatch) -> None:
    config = text_data(texts)
    path = cache_path(config, tiny_tokenizer)
    assert not own_cache.exists(), "asking for the path writes nothing"
    first = prepare(config, tiny_tokenizer)
    assert [p.name for p in (own_cache / "data").iterdir()] == [path.name] == [first.fingerprint]
    assert sorted(p.name for p in path.iterdir()) == ["documents.arrow", "manifest.json"]
    monkeypatch.setattr(module, "_build", None)
    again = prepare(config, tiny_tokenizer)
    assert again.counts == first.counts
    assert [again.tokens(i).tolist() for i in range(3)] == [first.tokens(i).tolist() for i in range(3)]


def test_what_changes_tokens_changes_the_fingerprint(
    texts: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    first = cache_path(text_data(texts), tiny_tokenizer).name
    same = [text_data(texts, pack=False), text_data(texts, shuffle=False), text_data(texts, cache=str(tmp_path / "c"))]
    assert {cache_path(config, tiny_tokenizer, CHATML).name for config in same} == {first}
    earlier = {"column", "format", "length", "max_documents", "overlong", "empty", "weight"}
    assert set(RowOrigin(text_data(texts), tiny_tokenizer, None).parts["settings"]) == earlier
    changed = [{"length": 99}, {"column": "x"}, {"overlong": "cut"}, {"empty": "drop"}, {"max_documents": 2}]
    names = [cache_path(text_data(texts, **setting), tiny_tokenizer).name for setting in changed]
    names += [cache_path(text_data(texts), chat_tokenizer).name, cache_path(pair_data(texts), tiny_tokenizer).name]
    names += [cache_path(pair_data(texts, chat=True), tiny_tokenizer, t).name for t in (CHATML, CHATML + " ")]
    for later in ({"system": "s"}, {"chat_template_kwargs": {"a": 1}}):
        names.append(cache_path(pair_data(texts, chat=True, **later), tiny_tokenizer, CHATML).name)
    with open(texts, "a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    names.append(cache_path(text_data(texts), tiny_tokenizer).name)
    assert len({first, *names}) == len(names) + 1


def test_which_folder(texts: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(text_data(texts)) == own_cache
    assert cache_folder(text_data(texts, cache=str(tmp_path / "mine"))) == tmp_path / "mine"
    monkeypatch.delenv("STILLROOM_CACHE")
    assert cache_folder(text_data(texts)) == Path.home() / ".cache" / "stillroom"


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("documents.arrow", lambda content: content[:-40], "size in bytes found"),
        ("documents.arrow", flip_a_bit, "checksum found"),
        ("documents.arrow", None, "FileNotFoundError"),
        ("manifest.json", None, "FileNotFoundError"),
        ("manifest.json", lambda content: content[:99], "JSONDecodeError"),
        ("manifest.json", lambda _: b"{}", "KeyError"),
        ("manifest.json", lambda _: b"[]", "TypeError"),
    ],
)
def test_a_damaged_cache_is_said_to_be_so(texts: str, tiny_tokenizer, file: str, damage, message: str) -> None:
    config = text_data(texts)
    prepare(config, tiny_tokenizer)
    path = cache_path(config, tiny_tokenizer) / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"(?s)are damaged.*{message}.*Delete the folder"):
        prepare(config, tiny_tokenizer)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("x", why="y", fix="z")])
def test_an_interrupted_cache_leaves_nothing(texts: str, tiny_tokenizer, own_cache: Path, error) -> None:
    def interrupt(_: int) -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, DataError)):
        prepare(text_data(texts), tiny_tokenizer, report=interrupt)
    assert list((own_cache / "data").iterdir()) == []
    assert len(prepare(text_data(texts), tiny_tokenizer)) == 3


def test_of_two_at_once_the_first_one_stays(texts: str, tiny_tokenizer, own_cache: Path) -> None:
    config = text_data(texts)
    entered, finished = threading.Event(), threading.Event()

    def wait(_: int) -> None:
        entered.set()
        assert finished.wait(10)

    late: list = []
    thread = threading.Thread(target=lambda: late.append(prepare(config, tiny_tokenizer, report=wait)))
    thread.start()
    assert entered.wait(10)
    early = prepare(config, tiny_tokenizer)
    inode = cache_path(config, tiny_tokenizer).stat().st_ino
    finished.set()
    thread.join()
    assert cache_path(config, tiny_tokenizer).stat().st_ino == inode
    assert [p.name for p in (own_cache / "data").iterdir()] == [early.fingerprint]
    assert late[0].tokens(1).tolist() == early.tokens(1).tolist()


def test_a_cache_that_cannot_be_written(texts: str, tiny_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"(?s)cannot be written.*data\.cache"):
        prepare(text_data(texts, cache=str(tmp_path / "file")), tiny_tokenizer)


def test_a_full_disk(texts: str, tiny_tokenizer, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "crc32", full)
    with pytest.raises(StorageError, match="No space left"):
        prepare(text_data(texts), tiny_tokenizer)
    assert list((own_cache / "data").iterdir()) == []


# --- real data -------------------------------------------------------------------------------------------------------


def test_real_questions_and_answers(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    path = str(shared_data / "text" / "gsm8k_train.jsonl")
    config = pair_data(path, prompt="question", completion="answer", max_documents=50)
    documents = prepare(config, tokenizer)
    answers = [json.loads(line)["answer"] for line in Path(path).read_text(encoding="utf-8").splitlines()[:50]]
    for index, answer in enumerate(answers):
        learnt = tokenizer.decode(documents.tokens(index)[documents.target_mask(index)])
        assert learnt == answer + "<|endoftext|>"


def test_real_instructions_with_columns_in_braces(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "llama2"))
    path = str(shared_data / "text" / "gpteacher_roleplay.json")
    config = pair_data(path, prompt="{instruction}\n{input}\n", completion="{response}", max_documents=50, empty="drop")
    documents = prepare(config, tokenizer)
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    for index in range(len(documents)):
        row, target_mask = rows[documents.source_rows[index]], documents.target_mask(index)
        tokens = documents.tokens(index)
        assert tokens[:2].tolist().count(tokenizer.bos_token_id) == 1
        assert target_mask[target_mask.tolist().index(True) :].all()
        if len(tokens) <= config.length:
            assert str(tokenizer.decode(tokens[target_mask])).strip() == row["response"].strip() + "</s>"


def test_real_conversations(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    path = str(shared_data / "text" / "dpo_en_demo.json")
    rows = json.loads(Path(path).read_text(encoding="utf-8"))[:100]
    config = ChatData(format="chat", path=path, max_documents=100, length=100_000, empty="drop")
    documents = prepare(config, tokenizer, template=CHATML)
    spoken = [any(turn["from"] == "gpt" for turn in row["conversations"]) for row in rows]
    assert documents.counts["dropped_empty"] == spoken.count(False)
    assert documents.source_rows.tolist() == [i for i, any_turn in enumerate(spoken) if any_turn]
    for index in range(len(documents)):
        turns = rows[documents.source_rows[index]]["conversations"]
        answers = [turn["value"] + "<|im_end|>" for turn in turns if turn["from"] == "gpt"]
        assert tokenizer.decode(documents.tokens(index)[documents.target_mask(index)]) == "".join(answers)


def test_real_text_is_split(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "models" / "stories3M"))
    path = tmp_path / "shakespeare.txt"
    path.write_bytes((shared_data / "text" / "tinyshakespeare.txt").read_bytes()[:50_000])
    documents = prepare(text_data(str(path), length=256), tokenizer)
    joined = np.concatenate([documents.tokens(0)[:1], *(documents.tokens(i)[1:] for i in range(len(documents)))])
    assert str(tokenizer.decode(joined, skip_special_tokens=True)).strip() == path.read_text(encoding="utf-8").strip()
    assert documents.lengths[:-1].tolist() == [257] * (len(documents) - 1)


def test_what_a_row_counts_is_read_from_its_column(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Also by each piece of a row that is split, and by each position of a batch."""
    path = write(tmp_path / "a.jsonl", [{"text": "pour " * 30, "score": 0.25}, {"text": "stir", "score": 3}])
    documents = prepare(text_data(path, length=16, weight="score"), tiny_tokenizer)
    pieces = len(documents) - 1
    assert pieces > 1
    assert [documents.weight(i) for i in range(len(documents))] == [0.25] * pieces + [3.0]
    batch = collate(documents, [np.array([0, pieces])], 0)
    assert batch.weights is not None
    assert batch.weights[batch.documents == 0].unique().tolist() == [0.25]
    assert batch.weights[batch.documents == pieces].unique().tolist() == [3.0]
    plain = prepare(text_data(path, length=16), tiny_tokenizer)
    assert {plain.weight(i) for i in range(len(plain))} == {1.0}


@pytest.mark.parametrize("value", [-1, "2", True, None, float("inf")])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, value) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "stir", "score": value}])
    with pytest.raises(DataError, match=r"a\.jsonl line 1: the column `score` does not hold a weight"):
        prepare(text_data(path, weight="score"), tiny_tokenizer)


def test_what_a_killed_process_left_is_swept_and_what_is_being_made_is_not(texts, tiny_tokenizer) -> None:
    folder = cache_path(text_data(texts), tiny_tokenizer).parent
    left, busy, young = (folder / f".{name}.0123.partial" for name in ("left", "busy", "young"))
    for path in (left, busy, young):
        path.mkdir(parents=True)
        (path / "documents.arrow").write_bytes(b"half")
        if path != young:
            os.utime(path, (0, 0))
    with lock(busy, BlockingIOError()):
        os.utime(busy, (0, 0))
        prepare(text_data(texts), tiny_tokenizer)
    assert [path.exists() for path in (left, busy, young)] == [False, True, True]
    assert not list(cache_path(text_data(texts), tiny_tokenizer).glob(".lock"))

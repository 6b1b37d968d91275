"""Parts: what the environment says, who takes what, and that what is said does not depend on how many there are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import build_documents
from stillroom.capture import signals
from stillroom.capture.config import CaptureConfig, Generate, Part
from stillroom.capture.parts import own_device, part_of, part_range
from stillroom.capture.plan import make_plan
from stillroom.capture.run import run
from stillroom.cli.capture import summary
from stillroom.cli.progress import Progress
from stillroom.config import load
from stillroom.errors import ConfigError, MissingError, StillroomError, StorageError
from stillroom.recipe import from_yaml
from stillroom.store.reader import Store

Settings = Callable[..., CaptureConfig]
KINDS = (
    "signal={kind: full}",
    "signal={kind: top_k, k: 5, label: true, entropy: true, temperatures: [2.0]}",
    "signal={kind: head_and_sample, head: 4, draws: 3}",
)


@pytest.fixture
def settings(saved_model, text_files: Path, tmp_path: Path, monkeypatch) -> Settings:
    """A capture in windows of four documents, into tmp_path/out."""
    monkeypatch.setattr(signals, "WINDOW_DOCUMENTS", 4)
    words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
             "data.format=text", "data.length=32", f"out={tmp_path}/out"]  # fmt: skip
    return lambda *more: load(CaptureConfig, None, [*words, *more])


@pytest.fixture
def ranks(monkeypatch) -> Callable[..., None]:
    """``ranks(RANK="1")``: sets these, and no others."""

    def set_them(**values: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_them()
    return set_them


def part(index: int, of: int) -> str:
    return f"part={{index: {index}, of: {of}}}"


def contents(store: Store) -> list[tuple[Any, ...]]:
    """All that a store says of each document. The order of draws means nothing, and depends on the shard."""
    found = []
    for i in range(len(store)):
        row = store.document(i), store.tokens(i).tolist(), store.loss_mask(i).tolist()
        if store.signal_config.kind == "full":
            found.append((*row, store.logits([i]).tobytes()))
            continue
        levels = store.levels([i])
        places = np.repeat(np.arange(len(levels)), levels.sample_counts).tolist()
        draws = sorted(zip(places, levels.sample_ids.tolist(), levels.sample_repeats.tolist(), strict=True))
        found.append((*row, draws, *(getattr(levels, name).tolist() for name in ("counts", "ids", "levels", "side"))))
    return found


# --- which part ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "word", "expected"),
    [
        ({}, "part=auto", None),
        ({"RANK": "2", "WORLD_SIZE": "8"}, "part=auto", Part(index=2, of=8)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "part=auto", None),
        ({"WORLD_SIZE": "1"}, "part=auto", None),
        ({"RANK": "2", "WORLD_SIZE": "8"}, "part=null", None),
        ({"RANK": "2", "WORLD_SIZE": "8"}, part(1, 3), Part(index=1, of=3)),
        ({"RANK": "no", "WORLD_SIZE": "8"}, part(1, 3), Part(index=1, of=3)),
        ({}, part(0, 1), None),
    ],
    ids=str,
)
def test_a_part_is_that_of_the_settings_or_of_the_environment(settings, ranks, environment, word, expected):
    ranks(**environment)
    config = settings(word)
    assert part_of(config.part) == expected
    assert make_plan(config).config.part == expected


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "8"}, {"RANK": "3"}, {"RANK": "8", "WORLD_SIZE": "8"}, {"RANK": "-1", "WORLD_SIZE": "8"},
     {"RANK": "x", "WORLD_SIZE": "8"}, {"RANK": "0", "WORLD_SIZE": "0"}],
    ids=str,
)  # fmt: skip
def test_an_environment_that_tells_no_part_is_refused(settings, ranks, environment):
    ranks(**environment)
    with pytest.raises(ConfigError, match="does not tell which part") as raised:
        part_of(settings().part)
    assert raised.value.values == {name: environment.get(name, "not set") for name in ("RANK", "WORLD_SIZE")}


def test_workers_on_one_machine_take_a_device_each(ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("auto") == "auto"
    ranks(LOCAL_RANK="3")
    assert own_device("auto") == "cuda:3"
    assert own_device("cpu") == "cpu"
    ranks(LOCAL_RANK="4")
    with pytest.raises(MissingError, match="no CUDA device for this worker") as raised:
        own_device("auto")
    assert raised.value.values == {"LOCAL_RANK": "4", "CUDA devices": "4, from 0"}
    for seen in (0, 1):  # none, or the launcher shows each worker its own alone
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert own_device("auto") == "auto"


# --- who takes what --------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    of=st.integers(2, 9),
    size=st.integers(1, 5),
    generate=st.booleans(),
)
def test_parts_are_stretches_of_whole_windows_of_about_as_many_tokens(lengths, of, size, generate):
    documents = build_documents(lengths)
    answers = Generate(max_tokens=4, prompt_tokens=3) if generate else None
    ranges = [part_range(Part(index=i, of=of), documents, size, answers) for i in range(of)]
    assert [first for first, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == len(lengths)
    assert all(first % size == 0 or first == len(lengths) for first, _ in ranges)
    weights = np.ones(len(lengths)) if generate else np.array(lengths)
    largest = max(weights[i : i + size].sum() for i in range(0, len(lengths), size))
    for first, stop in ranges:
        assert abs(weights[first:stop].sum() - weights.sum() / of) <= largest + 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda text: text.split()[1])
def test_parts_say_bit_for_bit_what_an_undivided_capture_says(settings, tmp_path, kind):
    run(settings(kind, f"out={tmp_path}/whole"))
    whole = contents(Store(tmp_path / "whole" / "store"))
    for of in (2, 3):
        found, sizes = [], []
        for index in reversed(range(of)):
            run(settings(kind, part(index, of)))
            store = Store(tmp_path / "out" / f"part-{index:04d}-of-{of:04d}" / "store")
            assert store.manifest.part == (index, of)
            found, sizes = contents(store) + found, [*sizes, len(store)]
        assert all(sizes)
        assert found == whole


def test_answers_do_not_depend_on_the_number_of_parts(settings, tmp_path):
    words = ("signal={kind: top_k, k: 4}", "data.length=48", "data.overlong=cut",
             "generate={max_tokens: 6, answers: 2, prompt_tokens: 4}")  # fmt: skip
    run(settings(*words, f"out={tmp_path}/whole"))
    found = []
    for index in range(2):
        run(settings(*words, part(index, 2)))
        found += contents(Store(tmp_path / "out" / f"part-000{index}-of-0002" / "store"))
    assert found == contents(Store(tmp_path / "whole" / "store"))


def test_a_part_of_nothing_is_a_store_of_nothing(settings):
    few = ("data.max_documents=2", "data.overlong=drop", "data.length=60")
    records = [run(settings(*few, part(index, 5))) for index in range(5)]
    assert [record["store"]["documents"] for record in records] == [0, 0, 2, 0, 0]
    assert "there are fewer windows than parts" in str(make_plan(settings(*few, part(1, 5))))


# --- folders, and what is said ---------------------------------------------------------------------------------------


def test_a_part_goes_on_alone_and_one_that_is_done_is_left(settings, ranks, tmp_path):
    ranks(RANK="1", WORLD_SIZE="2")
    record = run(settings())
    folder = tmp_path / "out" / "part-0001-of-0002"
    assert json.loads((folder / "run.json").read_text())["config"]["part"] == {"index": 1, "of": 2}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    told: list[Any] = []
    assert run(settings(), resume=True, report=lambda event, values: told.append((event, dict(values)))) == record
    text = f"the capture in {folder} is done already"
    assert told == [("note", {"text": text, "part": "part 1 of 2"})]
    ranks(RANK="0", WORLD_SIZE="2")
    run(settings(), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_parts_and_an_undivided_capture_do_not_share_a_folder(settings, tmp_path):
    run(settings())
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError, match=r"part 0 of 2: .* is the folder of a run that is not divided"):
            run(settings(part(0, 2)), **flags)
    assert not list((tmp_path / "out").glob("part-*"))
    run(settings(f"out={tmp_path}/parts", part(0, 2)))
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError, match="is the folder of a run that is divided") as raised:
            run(settings(f"out={tmp_path}/parts"), **flags)
        assert raised.value.values["there"] == f"{tmp_path}/parts/part-0000-of-0002/run.json"
    assert (tmp_path / "parts" / "part-0000-of-0002" / "run.json").exists()


def test_errors_and_lines_bear_the_name_of_their_part(settings, tmp_path, capsys):
    with pytest.raises(StillroomError, match=r"^part 2 of 3: .*nowhere"):
        run(settings(part(2, 3), f"data.path={tmp_path}/nowhere.jsonl"))
    with Progress() as progress:
        record = run(settings(part(1, 3)), report=progress)
    lines = capsys.readouterr().err.splitlines()
    own = [line for line in lines if "tokenizing" in line or "captured" in line]
    assert len(own) == 2
    assert all(line.startswith("part 1 of 3: ") for line in own)
    store = record["store"]
    assert summary(record) == (
        f"part 1 of 3: {store['documents']:,} documents, {store['positions']:,} positions, "
        f"{store['size_bytes'] / 2**20:.1f} MiB in {tmp_path}/out/part-0001-of-0003/store"
    )


def test_a_plan_tells_the_part_and_its_share(settings, tmp_path):
    config = settings(part(1, 3))
    assert "not known before the data are tokenized" in from_yaml(str(make_plan(config)))["part"]
    store = run(config)["store"]
    planned = from_yaml(str(make_plan(config)))
    found, read = planned["part"], Store(tmp_path / "out" / "part-0001-of-0003" / "store")
    first, last = read.document(0), read.document(len(read) - 1)
    assert found["which"] == "part 1 of 3, from 0"
    assert found["documents"].startswith(f"{store['documents']} of ")
    assert found["documents"].endswith(f", from {first} to {last}")
    assert found["tokens"].startswith(f"{read.manifest.tokens} of ")
    assert found["positions"] == f"{store['positions']}"
    assert "a position" in found["bytes"]
    assert planned["writes"]["store"] == f"{tmp_path}/out/part-0001-of-0003/store"
    assert planned["costs"]["time on CPU"]["tokens"].startswith(f"{store['positions']}")

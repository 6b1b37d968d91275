"""Processes: what each is told of itself, who talks to whom, and one alone as the special case."""

import pickle

import pytest
import torch

from conftest import build_batch, build_documents, build_stream
from stillroom.data.dataloader import RankSlice
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.init import SINGLE_PROCESS, init_distributed, rank_info
from stillroom.errors import ConfigError, MismatchError, MissingError, ReportedElsewhere
from stillroom.teachers.live import _share, _split

LENGTHS = [6, 33, 12, 7, 29, 31, 18, 33, 5, 24, 9, 33, 16, 28, 33, 11]


@pytest.fixture
def told(monkeypatch):
    def tell(**values: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return tell


def test_a_process_that_is_told_nothing_is_alone(told):
    told()
    assert rank_info() == RankGroup(0, 1, 0)
    assert init_distributed("cpu", timeout_s=1, sharded=False) is SINGLE_PROCESS


def test_a_process_is_who_it_is_told_to_be(told):
    told(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="here", MASTER_PORT="1")
    assert rank_info() == RankGroup(5, 8, 1)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"WORLD_SIZE": "2"}, ConfigError),
        ({"WORLD_SIZE": "2", "RANK": "x"}, ConfigError),
        ({"WORLD_SIZE": "2", "RANK": "0"}, MissingError),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here"}, MissingError),
    ],
)
def test_a_process_that_is_told_half_is_an_error(told, values, error):
    told(**values)
    with pytest.raises(error):
        rank_info()


def test_one_alone_agrees_with_itself():
    assert SINGLE_RANK.on_every_rank(lambda: 3) == 3
    assert SINGLE_RANK.local_rank0_first(lambda: 4) == 4
    assert SINGLE_RANK.on_rank0(lambda: 5) == 5
    assert SINGLE_RANK.all_gather(6) == [6]
    assert SINGLE_RANK.any_rank(True)
    assert not SINGLE_RANK.any_rank(False)
    with pytest.raises(MismatchError):
        SINGLE_RANK.on_every_rank(lambda: (_ for _ in ()).throw(MismatchError("a", why="b", fix="c")))


def test_errors_go_to_other_processes_whole():
    error = MismatchError("what", {"here": 1, "there": torch.float32}, why="why", fix="fix")
    found = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(found) is MismatchError
    assert str(found) == str(error)
    assert str(ReportedElsewhere.of(error)) == str(error)


@pytest.mark.parametrize(("askers", "answerers"), [(1, 1), (3, 1), (1, 3), (4, 2), (2, 4), (3, 2), (2, 5)])
def test_askers_and_answerers_agree_on_who_talks_to_whom(askers, answerers):
    asked = {(a, t) for a in range(askers) for t in _share(answerers, askers, a)}
    answered = {(a, t) for t in range(answerers) for a in _share(askers, answerers, t)}
    assert asked == answered
    assert {a for a, _ in asked} == set(range(askers))
    assert {t for _, t in asked} == set(range(answerers))


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_a_question_is_divided_by_rows_and_keeps_their_order(number):
    batch = build_batch(33, 20, 9, 30, 14, 33)
    pieces = _split(batch, number)
    assert len(pieces) == number
    kept = torch.cat([piece.tokens.flatten()[piece.kept] for piece in pieces])
    assert torch.equal(kept, batch.tokens.flatten()[batch.kept])


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("tokens", [40, 96, 256])
def test_the_parts_of_a_step_are_the_step(size, tokens):
    """Every document is read by one process; each has as many micro-batches, and knows the totals of all."""
    documents = build_documents(LENGTHS)
    whole = build_stream(documents, tokens=tokens, epochs=2)
    parts = [build_stream(documents, tokens=tokens, epochs=2, part=RankSlice(rank, size)) for rank in range(size)]
    for step, *shares in zip(whole, *parts, strict=True):
        assert len({len(share) for share in shares}) == 1
        read = [d for share in shares for b in share for row in b.documents for d in row.unique_consecutive().tolist()]
        wanted = [d for b in step for row in b.documents for d in row.unique_consecutive().tolist()]
        assert sorted(d for d in read if d >= 0) == sorted(d for d in wanted if d >= 0)
        assert {share.totals for share in shares} == {step.totals}
        assert step.totals.num_kept == sum(b.num_kept for share in shares for b in share)
    assert len({str({**stream.state()}) for stream in (whole, *parts)}) == 1

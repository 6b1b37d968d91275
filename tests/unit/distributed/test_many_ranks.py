"""The glue of many processes: who does what, what they must agree on, and which of them is named when one is lost."""

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from stillroom.distill.build import cut_once
from stillroom.distributed import failures as module
from stillroom.distributed.failures import FailureReport, reported_once
from stillroom.distributed.group import RankGroup
from stillroom.errors import ConfigError, DataError, Interrupted, LostError, MismatchError, ReportedElsewhere, Stopped
from stillroom.pruning.prune import PruneMask

from .ranks import in_ranks


@pytest.fixture
def store(monkeypatch):
    """A store that the ranks share, and little patience."""
    store = HashStore()
    monkeypatch.setattr(module, "_get_default_store", lambda: store)
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)
    return store


# --- who does what ---------------------------------------------------------------------------------------------------


def test_rank_0_alone_does_it_and_the_others_wait():
    done = []

    def run(ranks: RankGroup) -> object:
        result = ranks.on_rank0(lambda: done.append(ranks.rank) or "made")
        return result, list(done)

    assert in_ranks(3, run) == [("made", [0]), (None, [0]), (None, [0])]


def test_the_first_of_each_node_goes_before_its_others():
    order: list[int] = []
    results = in_ranks(4, lambda ranks: ranks.local_rank0_first(lambda: order.append(ranks.rank)), [0, 1, 0, 1])
    assert results == [None] * 4
    assert set(order[:2]) == {0, 2}
    assert set(order[2:]) == {1, 3}


def test_one_process_of_all_hosts_chooses_what_is_cut_and_the_others_are_told():
    """Two hosts on a shared disk would write one file at once, and on disks of their own each its own choice."""
    mask, seen = PruneMask(layers=(0, 2), channels=None, groups=None, heads=None, mlp=None, scores={}, teacher="t"), []

    def run(ranks: RankGroup) -> object:
        def prune(told: PruneMask | None) -> tuple[str, PruneMask]:
            seen.append((ranks.rank, told))
            return f"cut by {ranks.rank}", told or mask

        return cut_once(prune, ranks)  # pyright: ignore[reportArgumentType]

    assert in_ranks(4, run, [0, 1, 0, 1]) == [(f"cut by {rank}", mask) for rank in range(4)]
    assert seen[0] == (0, None)
    assert sorted(rank for rank, _ in seen) == [0, 1, 2, 3]
    assert all(told == mask for rank, told in seen if rank)


def test_where_the_first_of_a_node_fails_its_others_still_go():
    """They wait for it, and would wait for ever."""
    done: list[int] = []

    def make(rank: int) -> None:
        done.append(rank)
        if rank == 0:
            raise DataError("a row is damaged", why="It is a test.", fix="Nothing.")

    first, other = in_ranks(2, lambda ranks: ranks.local_rank0_first(lambda: make(ranks.rank)))
    assert type(first) is DataError
    assert type(other) is ReportedElsewhere
    assert done == [0, 1]


def test_work_is_divided_so_that_each_thing_is_of_one():
    shares = in_ranks(3, lambda ranks: ranks.shard("abcdefgh"))
    assert sorted("".join(shares)) == list("abcdefgh")
    assert [len(share) for share in shares] == [3, 3, 2]


def test_what_fails_in_some_is_reported_by_rank_0_with_their_ranks():
    def run(ranks: RankGroup) -> object:
        def make() -> int:
            if ranks.rank in (1, 2):
                raise DataError("a row is damaged", {"row": ranks.rank}, why="It is a test.", fix="Nothing.")
            return ranks.rank

        return ranks.on_every_rank(make)

    first, *others = in_ranks(4, run)
    assert type(first) is DataError
    assert first.values["row"] == 1
    assert first.values["in"].startswith("2 of 4 processes: rank 1 on ")
    assert ", 2 on " in first.values["in"]
    assert [type(error) for error in others] == [ReportedElsewhere] * 3


@pytest.mark.parametrize("long", ["", "x" * 100])
def test_what_must_be_the_same_and_is_not(long):
    def run(ranks: RankGroup) -> object:
        return ranks.on_every_rank(lambda: ranks.rank, lambda rank: {"steps": f"{rank > 1}{long}", "seed": 1})

    first, *others = in_ranks(3, run)
    assert type(first) is MismatchError
    assert first.what == "the processes of this run have different steps"
    here, there = first.values
    assert here.startswith("rank 0 on ")
    assert there.startswith("rank 2 on ")
    assert [type(error) for error in others] == [ReportedElsewhere] * 2


def test_what_is_the_same_is_given_to_each():
    results = in_ranks(2, lambda ranks: ranks.on_every_rank(lambda: ranks.rank, lambda _: {"steps": 3}))
    assert results == [0, 1]


def test_a_flag_of_one_is_known_to_all():
    assert in_ranks(3, lambda ranks: ranks.any_rank(ranks.rank == 2)) == [True] * 3
    assert in_ranks(3, lambda ranks: ranks.any_rank(False)) == [False] * 3


# --- who reports, and who is named -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("store")
def test_the_rank_that_is_silent_is_named_by_the_first_that_waits_for_it():
    def run(ranks: RankGroup) -> None:
        failures = FailureReport(ranks)
        failures.at(f"step {ranks.rank + 5}")
        if ranks.rank != 1:
            with reported_once(failures):
                raise RuntimeError("Connection closed by peer")

    first, lost, last = in_ranks(3, run)
    assert lost is None
    assert type(first) is LostError
    (named,) = [value for name, value in first.values.items() if name == "lost"]
    assert named.startswith("rank 1, last heard at step 6 on ")
    assert type(last) is ReportedElsewhere


@pytest.mark.usefixtures("store")
def test_where_all_are_there_nobody_is_named():
    def run(ranks: RankGroup) -> None:
        failures = FailureReport(ranks)
        with reported_once(failures):
            raise RuntimeError("NCCL timeout")

    first, other = in_ranks(2, run)
    assert type(first) is LostError
    assert "nobody: all are there" in str(first)
    assert type(other) is ReportedElsewhere


@pytest.mark.usefixtures("store")
def test_one_that_failed_by_itself_reports_alone():
    def run(ranks: RankGroup) -> None:
        with reported_once(FailureReport(ranks)):
            raise ValueError("a bug") if ranks.rank == 1 else RuntimeError("Connection reset")

    first, failed = in_ranks(2, run)
    assert type(failed) is ValueError
    assert type(first) is ReportedElsewhere


@pytest.mark.usefixtures("store")
def test_an_error_of_all_is_reported_by_rank_0():
    def run(ranks: RankGroup) -> None:
        with reported_once(FailureReport(ranks)):
            raise ConfigError("too wide", {"width": ranks.rank}, why="It is a test.", fix="Nothing.")

    assert [type(error) for error in in_ranks(3, run)] == [ConfigError, ReportedElsewhere, ReportedElsewhere]


@pytest.mark.usefixtures("store")
def test_an_error_of_one_is_reported_by_it_with_its_rank():
    def run(ranks: RankGroup) -> None:
        with reported_once(FailureReport(ranks)):
            if ranks.rank == 1:
                raise ConfigError("too wide", why="It is a test.", fix="Nothing.")

    first, error = in_ranks(2, run)
    assert first is None
    assert type(error) is ConfigError
    assert error.values["in"].startswith("rank 1 on ")


@pytest.mark.parametrize(("error", "code"), [(Stopped("ended"), 0), (Interrupted("ended"), 130)])
@pytest.mark.usefixtures("store")
def test_an_interrupt_is_reported_by_rank_0_and_the_others_exit(error, code):
    def run(ranks: RankGroup) -> None:
        with reported_once(FailureReport(ranks)):
            raise error

    first, other = in_ranks(2, run)
    assert first is error
    assert type(other) is SystemExit
    assert other.code == code


@pytest.mark.usefixtures("store")
def test_too_little_memory_of_one_is_its_own():
    def run(ranks: RankGroup) -> None:
        with reported_once(FailureReport(ranks)):
            raise torch.OutOfMemoryError("CUDA out of memory (NCCL)")

    assert [type(error) for error in in_ranks(2, run)] == [torch.OutOfMemoryError] * 2

"""The ledger: which rows come next, by content; what MLflow remembers, and what it must not."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ops.settings import Settings
from ops.tracking import ledger as ledger_module
from ops.tracking.connection import client
from ops.tracking.ledger import (
    Choice,
    Ledger,
    caught_up,
    choose_rows,
    no_keys,
    read_ledger,
    record_night,
    write_choice,
)
from ops.tracking.runs import set_tags, tracked_run

DATA = "rows.jsonl"
Nights = Callable[..., Any]


def keys(*numbers: int) -> Any:
    """Keys as large as real ones are: a float or a signed integer would not hold them."""
    return np.array([2**63 + number for number in numbers], dtype=np.uint64)


def choose(present: Any, used: Any = (), seen: Any = (), count: int | None = None, share: float = 0.0) -> Choice:
    ledger = Ledger(np.unique(keys(*used)), keys(*seen))
    return choose_rows(keys(*present), ledger, count, share, seed=1)


# Choosing


@pytest.mark.parametrize(
    ("present", "used", "seen", "count", "fresh"),
    [
        pytest.param([1, 2, 3, 4], [], [], 3, [1, 2, 3], id="the first night takes the beginning"),
        pytest.param([1, 2, 3, 4], [1, 2], [1, 2, 3, 4], 2, [3, 4], id="then what is left"),
        pytest.param([1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 4], 2, [5, 3], id="appended rows go first"),
        pytest.param([9, 1, 8, 2, 3], [1, 2], [1, 2, 3], 3, [9, 8, 3], id="inserted rows are new where they stand"),
        pytest.param([4, 3, 2, 1], [1, 2], [1, 2, 3, 4], 2, [3, 4], id="a reordered file is the same file"),
        pytest.param([2, 4], [1, 2], [1, 2, 3, 4], 2, [4], id="rows that are gone are not chosen"),
        pytest.param([1, 2, 3], [1, 2], [1, 2], None, [3], id="no limit takes all that is fresh"),
        pytest.param([1, 2], [1, 2], [1, 2], 2, [], id="nothing is left"),
        pytest.param([2, 1], [1, 2, 3], [3], 2, [], id="used is used, also by a night on other data"),
    ],
)
def test_fresh_rows(present: Any, used: Any, seen: Any, count: int | None, fresh: Any) -> None:
    """New rows in the order of the file, then the backlog in the order in which it appeared."""
    assert choose(present, used, seen, count).fresh.tolist() == keys(*fresh).tolist()


def test_what_was_seen_keeps_its_order() -> None:
    """What came first stays first, what is gone is forgotten, what came is added as it stands in the file."""
    assert choose([7, 3, 1, 8], seen=[1, 2, 3]).seen.tolist() == keys(1, 3, 7, 8).tolist()


@pytest.mark.parametrize(
    ("fresh", "old", "share", "replayed"), [(80, 100, 0.2, 20), (80, 5, 0.2, 5), (50, 100, 0.5, 50), (10, 100, 0, 0)]
)
def test_replay_is_a_share_of_the_night(fresh: int, old: int, share: float, replayed: int) -> None:
    """Old rows that are still there, each at most once, as many as the share asks for or as there are."""
    used = range(1000, 1000 + old + 50)  # fifty of them are no longer in the file
    choice = choose([*range(fresh), *range(1000, 1000 + old)], used, share=share)
    assert len(choice.fresh) == fresh
    assert len(set(choice.replay.tolist())) == len(choice.replay) == replayed
    assert set(choice.replay.tolist()) <= set(keys(*range(1000, 1000 + old)).tolist())
    assert choice.keys.tolist() == sorted(choice.fresh.tolist() + choice.replay.tolist())


def test_a_night_is_repeated_as_it_was() -> None:
    """The same fresh rows draw the same old ones, however the file is ordered; other ones draw others."""
    used = range(100, 200)
    first = choose([1, 2, 3, 4, *used], used, [1, 2, 3, 4], 4, 0.5)
    again = choose([*reversed(used), 4, 3, 2, 1], used, [1, 2, 3, 4], 4, 0.5)
    assert first.sha256 == again.sha256
    others = [choose([*rows, *used], used, rows, 4, 0.5) for rows in ([5, 6, 7, 8], [9, 10, 11, 12])]
    drawn = {tuple(sorted(choice.replay.tolist())) for choice in (first, *others)}
    assert len(drawn) == 3


def test_many_nights_use_every_row_once() -> None:
    """A file that grows, loses rows and is shuffled every night: no row twice, none left, no night too large."""
    generator = np.random.default_rng(0)
    present: list[int] = []
    gone: set[int] = set()
    used: list[int] = []
    seen = no_keys()
    for night in range(60):
        if night < 40:
            present += range(1000 * night, 1000 * night + int(generator.integers(0, 12)))
        if night == 20:
            gone = {row for row in present[::7] if row not in used}
            present = [row for row in present if row not in gone]
        present = generator.permutation(present).tolist()
        ledger = Ledger(np.unique(keys(*used)), seen)
        choice = choose_rows(keys(*present), ledger, 6, 0.3, seed=night)
        seen = choice.seen
        assert len(choice.fresh) <= 6
        used += (choice.fresh - np.uint64(2**63)).tolist()
    assert len(used) == len(set(used))
    assert set(present) <= set(used)
    assert gone.isdisjoint(used)


# What MLflow remembers


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A data root with its own store, which takes seconds to make: the tests below share it."""
    root = tmp_path_factory.mktemp("ledger")
    return Settings(root, f"sqlite:///{root}/mlflow/mlflow.db")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A registered model of the test's own."""
    return "gpt2-code-" + re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def night(settings: Settings, model: str, tmp_path: Path) -> Nights:
    """night(present, ...): a run that writes its choice as the flow does, and ends as it is told."""

    def run(
        present: Any,
        count: int | None = None,
        error: type[BaseException] | None = None,
        other: str | None = None,
        dataset: str = DATA,
        promoted: bool = False,
    ) -> str:
        name = other or model
        choice = choose_rows(keys(*present), read_ledger(settings.tracking_uri, name, dataset), count, 0.2, seed=1)
        folder = tmp_path / "choice"
        folder.mkdir(exist_ok=True)
        write_choice(choice, folder)
        try:
            with tracked_run(settings, "a night", {"dataset": dataset}, {}) as ref:
                record_night(ref, name, folder, datetime.now(UTC), {})
                if promoted:
                    set_tags(ref, {"promotion": "champion"})
                if error:
                    raise error
        except (OSError, KeyboardInterrupt):
            pass
        return ref.run_id

    return run


def _used(settings: Settings, model: str) -> list[int]:
    return (read_ledger(settings.tracking_uri, model, DATA).used - np.uint64(2**63)).tolist()


def test_an_empty_store_is_an_empty_ledger(tmp_path: Path, model: str) -> None:
    """Before the first run there is not even an experiment."""
    settings = Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    assert _used(settings, model) == []
    assert not caught_up(settings.tracking_uri, model, DATA, datetime(2000, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("page", [1000, 2])
def test_successful_nights_add_up(
    settings: Settings, model: str, night: Nights, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Keys come back bit for bit, from all pages of the answer."""
    monkeypatch.setattr("ops.tracking.runs._PAGE", page)
    for _ in range(5):
        night(range(12), count=2)
    assert _used(settings, model) == list(range(10))
    seen = read_ledger(settings.tracking_uri, model, DATA).seen
    assert seen.tolist() == keys(*range(12)).tolist()
    assert seen.dtype == np.uint64


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_night_that_failed_or_was_killed_leaves_nothing(
    settings: Settings, model: str, night: Nights, error: Any
) -> None:
    """Its rows come again, and what was new stays new."""
    night([1, 2])
    night([1, 2, 3], error=error)
    assert _used(settings, model) == [1, 2]
    assert read_ledger(settings.tracking_uri, model, DATA).seen.tolist() == keys(1, 2).tolist()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_night_cut_behind_its_promotion_counts(
    settings: Settings, model: str, night: Nights, error: type[BaseException]
) -> None:
    """The next one starts from its model, which knows the rows."""
    night([1, 2], error=error, promoted=True)
    assert _used(settings, model) == [1, 2]


def test_sizes_keep_their_own_ledger(settings: Settings, model: str, night: Nights) -> None:
    """What 355m has learned 124m has not; another data set of the same size does count as used."""
    night([1, 2], other="gpt2-code-355m")
    night([3], dataset="others.jsonl")
    assert _used(settings, model) == [3]
    assert _used(settings, "gpt2-code-355m") == [1, 2]
    assert read_ledger(settings.tracking_uri, model, DATA).seen.tolist() == []


def test_deleting_a_run_gives_its_rows_back(settings: Settings, model: str, night: Nights) -> None:
    """The ledger is the runs and nothing besides."""
    night([1, 2])
    second = night([1, 2, 3, 4])
    client(settings.tracking_uri).delete_run(second)
    assert _used(settings, model) == [1, 2]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"not an array")])
def test_a_damaged_ledger_is_named(
    settings: Settings, model: str, night: Nights, damage: Callable[[Path], Any]
) -> None:
    """Better no night than one on rows that were used: the sentence says which run, and the two ways out."""
    run_id = night([1, 2])
    damage(next(settings.artifacts.glob(f"{run_id}/artifacts/nightly/used.npy")))
    with pytest.raises(RuntimeError, match=rf"nightly/used\.npy of the MLflow run {run_id}.*delete the run"):
        read_ledger(settings.tracking_uri, model, DATA)


def test_copies_are_read_but_decide_nothing(
    settings: Settings, model: str, night: Nights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A night is fetched once; a damaged copy is fetched again, and one whose run was deleted does not count."""
    first, second = night([1, 2]), night([1, 2, 3])
    fetched: list[str] = []
    real = ledger_module._read
    monkeypatch.setattr("ops.tracking.ledger._read", lambda *where: (fetched.append(where[1:]), real(*where))[1])

    def used() -> list[int]:
        keys = read_ledger(settings.tracking_uri, model, DATA, tmp_path / "copies").used
        return (keys - np.uint64(2**63)).tolist()

    assert used() == used() == [1, 2, 3]
    assert sorted(fetched) == sorted([(first, "used.npy"), (second, "used.npy"), *[(second, "seen.npy")] * 2])
    copy = tmp_path / "copies" / f"{first}.npy"
    for damaged in (copy.read_bytes()[:-3], b""):
        copy.write_bytes(damaged)
        assert used() == [1, 2, 3]
    assert fetched.count((first, "used.npy")) == 3
    client(settings.tracking_uri).delete_run(first)
    assert used() == [3]


def test_a_night_submitted_while_another_begins_is_none_of_the_missed(
    settings: Settings, model: str, tmp_path: Path
) -> None:
    """What counts is when the first one looked at the data, not when MLflow heard of it."""
    begun = datetime.now(UTC)
    write_choice(choose([1, 2]), tmp_path)
    with tracked_run(settings, "a night", {"dataset": DATA}, {}) as ref:
        record_night(ref, model, tmp_path, begun, {})
    assert not caught_up(settings.tracking_uri, model, DATA, begun + timedelta(microseconds=1))
    assert caught_up(settings.tracking_uri, model, DATA, begun - timedelta(microseconds=1))


def test_missed_nights_are_made_up_for_once(settings: Settings, model: str, night: Nights) -> None:
    """Whatever was due before the last successful night on the data began; not what is due now, nor other data."""
    before = datetime.now(UTC) - timedelta(seconds=1)
    night([1], error=OSError)
    assert not caught_up(settings.tracking_uri, model, DATA, before)
    night([1])
    now = datetime.now(UTC)
    assert caught_up(settings.tracking_uri, model, DATA, before)
    assert caught_up(settings.tracking_uri, model, DATA, before - timedelta(days=3))
    assert not caught_up(settings.tracking_uri, model, DATA, now)
    assert not caught_up(settings.tracking_uri, model, "others.jsonl", before)
    assert not caught_up(settings.tracking_uri, f"{model}-other", DATA, before)

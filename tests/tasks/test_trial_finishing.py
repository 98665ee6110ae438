"""Trials that follow one another: the end of one overlaps with the steps of the next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator

import pytest

from model.engine.trainer import TrainingStoppedError
from tasks.trial_finishing import Finishing

LOG = logging.getLogger(__name__)


class Rest:
    """A trial whose end waits until it is released, and notes what happens."""

    def __init__(self, seen: list[str], name: str, error: Exception | None = None):
        self.seen, self.name, self.error = seen, name, error
        self.released = threading.Event()

    def trial(self, steps: Callable[[], None] = lambda: None) -> Generator[None]:
        """Its steps, then its end."""
        self.seen.append(f"{self.name} begins")
        try:
            steps()
            yield
            assert self.released.wait(30)
            if self.error is not None:
                raise self.error
            self.seen.append(f"{self.name} is finished")
        except GeneratorExit:
            self.seen.append(f"{self.name} is given up")
            raise


def test_the_end_of_a_trial_overlaps_with_the_steps_of_the_next() -> None:
    """The end of the second one begins when the first has ended: one trial at most is being finished."""
    seen: list[str] = []
    one, two, three = (Rest(seen, name) for name in ("one", "two", "three"))
    with Finishing(LOG) as finishing:
        finishing.follow(one.trial())
        two.released.set()
        threading.Timer(0.5, one.released.set).start()
        finishing.follow(two.trial())
        assert seen[:3] == ["one begins", "two begins", "one is finished"]
        finishing.follow(three.trial())
        assert "three is finished" not in seen
        three.released.set()
        finishing.wait()
    assert seen[-1] == "three is finished"


def test_a_trial_without_steps_leaves_nothing() -> None:
    """Such as one that another process has."""

    def nothing() -> Generator[None]:
        return
        yield

    with Finishing(LOG) as finishing:
        finishing.follow(nothing())
        finishing.wait()


def test_what_fails_at_the_end_of_a_trial_stops_the_next() -> None:
    """It is asked to stop before its next step, and the first error is the one that is raised."""
    seen: list[str] = []
    one, two = Rest(seen, "one", OSError("the disk is full")), Rest(seen, "two")
    finishing = Finishing(LOG)

    def until_asked_to_stop() -> None:
        one.released.set()
        deadline = time.monotonic() + 30
        while not finishing.has_failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise TrainingStoppedError("stopped on request")

    def both() -> None:
        with finishing:
            finishing.follow(one.trial())
            finishing.follow(two.trial(until_asked_to_stop))

    with pytest.raises(OSError, match=r"^the disk is full$") as found:
        both()
    assert isinstance(found.value.__cause__, TrainingStoppedError)


@pytest.mark.parametrize("when", ["before the next trial", "after its steps", "without a next trial"])
def test_what_fails_at_the_end_of_a_trial_is_raised_once(when: str) -> None:
    """The next trial does not begin; if its steps are done already, its contexts end as for an interruption."""
    seen: list[str] = []
    one, two = Rest(seen, "one", OSError("the disk is full")), Rest(seen, "two")

    def run() -> None:
        with Finishing(LOG) as finishing:
            finishing.follow(one.trial())
            if when == "after its steps":
                finishing.follow(two.trial(one.released.set))
            one.released.set()
            while not finishing.has_failed:
                time.sleep(0.01)
            if when == "before the next trial":
                finishing.follow(two.trial())
            finishing.wait()

    with pytest.raises(OSError, match=r"^the disk is full$"):
        run()
    expected = {"after its steps": ["one begins", "two begins", "two is given up"]}
    assert seen == expected.get(when, ["one begins"])


def test_a_trial_that_cannot_be_given_up_does_not_hide_why_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Its checkpoints may not fit on the disk either."""
    one = Rest([], "one", ConnectionError("MLflow is away"))

    def two() -> Generator[None]:
        one.released.set()
        try:
            yield
        finally:
            raise OSError("the disk is full")

    def run() -> None:
        with Finishing(LOG) as finishing:
            finishing.follow(one.trial())
            finishing.follow(two())

    with pytest.raises(ConnectionError, match="MLflow is away"):
        run()
    assert "the last trial was not finished: the disk is full" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_waits_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """MLflow may not answer the thread that finishes the trial before."""
    monkeypatch.setattr("tasks.trial_finishing._SECONDS", 0.5)
    one = Rest([], "one")

    def interrupted() -> None:
        with Finishing(LOG) as finishing:
            finishing.follow(one.trial())
            raise error

    begun = time.monotonic()
    with pytest.raises(error):
        interrupted()
    assert time.monotonic() - begun < 10
    assert "was not finished" in caplog.text
    one.released.set()


def test_an_interruption_leaves_time_to_finish(caplog: pytest.LogCaptureFixture) -> None:
    """What is nearly done is done, and a failure of it does not hide the interruption."""
    seen: list[str] = []
    one, two = Rest(seen, "one"), Rest(seen, "two", OSError("the disk is full"))

    def interrupted(rest: Rest) -> None:
        with Finishing(LOG) as finishing:
            finishing.follow(rest.trial())
            threading.Timer(0.5, rest.released.set).start()
            raise KeyboardInterrupt

    for rest in (one, two):
        with pytest.raises(KeyboardInterrupt):
            interrupted(rest)
    assert seen == ["one begins", "one is finished", "two begins"]
    assert "the disk is full" in caplog.text

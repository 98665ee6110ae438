"""The courier: the sender never waits, the latest value arrives, and failed deliveries are repeated."""

from __future__ import annotations

import logging
import threading
import time
from itertools import pairwise

import pytest

import ops.courier
from ops.courier import Courier

_log = logging.getLogger("courier")


def test_the_sender_does_not_wait_and_the_latest_arrives() -> None:
    """A slow receiver gets the first value and the last one; those between are replaced."""
    arrived: list[int] = []
    first, go_on = threading.Event(), threading.Event()

    def deliver(value: int) -> None:
        first.set()
        go_on.wait(10)
        arrived.append(value)

    with Courier(deliver, "slow", "late", _log) as courier:
        courier.offer(0)
        assert first.wait(10)
        started = time.monotonic()
        for value in range(1, 1000):
            courier.offer(value)
        assert time.monotonic() - started < 0.5
        go_on.set()
    assert arrived == [0, 999]


def test_a_failed_delivery_is_repeated(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its pauses grow; one warning for the whole outage, and one line at its end."""
    monkeypatch.setattr(ops.courier, "_FIRST_PAUSE", 0.05)
    caplog.set_level(logging.INFO)
    times: list[float] = []
    arrived = threading.Event()

    def deliver(value: str) -> None:
        times.append(time.monotonic())
        if len(times) < 5:
            raise ConnectionError("nothing there")
        arrived.set()

    with Courier(deliver, "stubborn", "not updated", _log) as courier:
        courier.offer("one")
        assert arrived.wait(10)
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 0.4
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "not updated" in caplog.text
    assert "nothing there" in caplog.text


def test_closing_tries_once_more_and_leaves_a_hanging_receiver() -> None:
    """The end of a training is not held up by a server that does not answer."""
    tries: list[int] = []

    def refuse(value: int) -> None:
        tries.append(value)
        raise ConnectionError

    with Courier(refuse, "refused", "lost", _log) as courier:
        courier.offer(1)
    assert courier.ended.is_set()
    assert tries in ([1], [1, 1])

    hang = threading.Event()
    courier = Courier(lambda value: hang.wait(30), "hangs", "lost", _log)
    courier.offer(2)
    started = time.monotonic()
    assert not courier.close(0.2)
    assert time.monotonic() - started < 1
    hang.set()


def test_deliveries_are_spaced() -> None:
    """No more than one in ``every_seconds``, and the last value arrives at the end without that pause."""
    arrived: list[int] = []
    with Courier(arrived.append, "spaced", "late", _log, every_seconds=30.0) as courier:
        for value in range(200):
            courier.offer(value)
            time.sleep(0.001)
    assert len(arrived) == 2
    assert arrived[-1] == 199


def test_without_a_value_nothing_is_delivered() -> None:
    """Closing ends the thread."""
    arrived: list[int] = []
    with Courier(arrived.append, "idle", "late", _log) as courier:
        pass
    assert courier.ended.is_set()
    assert arrived == []

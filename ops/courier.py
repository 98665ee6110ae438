"""A courier delivers the latest of many values from a thread of its own: the sender never waits for a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from ops.threads import in_daemon_thread

T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 30.0  # seconds after a failed delivery; each failure doubles the pause
_CLOSING_SECONDS = 5.0


class Courier(Generic[T]):
    """Context manager that delivers values in the background; a newer value replaces one that still waits.

    A delivery that fails is tried again, with the newest value, after a pause that grows up to 30 s. The first
    failure in a row is logged as a warning, and so is the delivery that ends the row. Nothing is raised.

    Args:
        deliver: takes a value to its receiver; it may take long, and it may raise.
        name: of the thread.
        trouble: begins the warning, such as "the progress artifact was not updated".
        log: a logger.
        every_seconds: least time between two deliveries.
    """

    def __init__(
        self,
        deliver: Callable[[T], object],
        name: str,
        trouble: str,
        log: Any,
        every_seconds: float = 0.0,
    ):
        self.deliver, self.trouble, self.log, self.every_seconds = deliver, trouble, log, every_seconds
        self.changed = threading.Condition()
        self.waiting: list[T] = []  # one value at most
        self.closing = False
        self.failures = 0
        self.ended = threading.Event()
        in_daemon_thread(self._work, name)

    def offer(self, value: T) -> None:
        """Have a value delivered soon; returns at once."""
        with self.changed:
            self.waiting = [value]
            self.changed.notify_all()

    def close(self, seconds: float = _CLOSING_SECONDS) -> bool:
        """Deliver the last value now, and end the thread.

        A delivery that takes longer is left behind in its daemon thread.

        Returns:
            Whether the thread has ended.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        return self.ended.wait(seconds)

    def __enter__(self) -> Courier[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while (value := self._next()) is not None:
                pause = self._try(value[0])
                with self.changed:
                    if self.closing and self.failures:  # the last value had its one try
                        return
                    self.changed.wait_for(lambda: self.closing, pause)
        finally:
            self.ended.set()

    def _next(self) -> list[T] | None:
        """The value that waits, in a list; None when there is none and none will come."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closing)
            value, self.waiting = self.waiting, []
            return value or None

    def _try(self, value: T) -> float:
        """Deliver a value. Returns the seconds to wait before the next delivery."""
        try:
            self.deliver(value)
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                self.log.warning("%s, and will be when its server answers again: %s", self.trouble, error)
            with self.changed:
                self.waiting = self.waiting or [value]
            return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (self.failures - 1))
        if self.failures:
            self.log.info("that is over after %d failed tries: %s", self.failures, self.trouble)
        self.failures = 0
        return self.every_seconds

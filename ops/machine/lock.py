"""Exclusive use of a device or a training, by lock files that the kernel frees when their holder dies.

The kernel's flock decides who holds a device. The file's content only tells those who wait whom they wait for. A lock
is held as long as any process has its descriptor: a child that works on the device is started with ``pass_fds``,
inherits the lock and keeps it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ops.machine.lock_file import lock_path, read_lock, take_lock, write_holder

TURN = "several devices"  # name of the lock of the run that waits for more than one device
_POLL_SECONDS = 0.5  # between two attempts to take a lock
_DESCRIBE_SECONDS = 5.0  # between two looks at who holds it: finding a dead holder's children reads all of /proc
_REMIND_SECONDS = 60.0  # between two log lines of the same content


@dataclass(frozen=True)
class Held:
    """A lock that this process holds.

    Attributes:
        what: the device or training.
        descriptor: of the lock file, to be passed on to children that work on the device.
    """

    what: str
    descriptor: int


@contextmanager
def exclusive(
    directory: Path,
    what: str,
    holder: str,
    log: Callable[[str], None],
    show: Callable[[str | None], None] = lambda message: None,
    flow_run_id: str = "",
) -> Iterator[Held]:
    """Hold one device or training; the arguments are those of ``exclusive_any``."""
    with exclusive_any(directory, [what], holder, log, show, flow_run_id) as held:
        yield held


@contextmanager
def exclusive_any(
    directory: Path,
    whats: Sequence[str],
    holder: str,
    log: Callable[[str], None],
    show: Callable[[str | None], None] = lambda message: None,
    flow_run_id: str = "",
    turn: str = "",
) -> Iterator[Held]:
    """Hold the first of several devices that is free; the arguments are those of ``exclusive_several``."""
    with exclusive_several(directory, whats, 1, holder, log, show, flow_run_id, turn) as (held,):
        yield held


@contextmanager
def exclusive_several(
    directory: Path,
    whats: Sequence[str],
    count: int,
    holder: str,
    log: Callable[[str], None],
    show: Callable[[str | None], None] = lambda message: None,
    flow_run_id: str = "",
    turn: str = "",
) -> Iterator[tuple[Held, ...]]:
    """Hold ``count`` of several devices, all of them or none; while fewer are free, wait and report who holds them.

    Nobody waits while holding a part, so that no two runs wait for each other. A run that waits for more than one
    holds the lock ``turn`` meanwhile, and nobody takes a device before it: else runs that need one each would take
    every device that becomes free, and it would wait for ever.

    Args:
        directory: folder of the lock files.
        whats: names of the devices by their hardware, or of a training; the first free ones are taken, in this order.
        count: of the devices to hold.
        holder: name of this run, shown to those who wait for it.
        log: called with a message when waiting begins, when the holders change, every minute, and when it is over.
        show: called with the same messages except the reminders, and with None when waiting is over.
        flow_run_id: id of this run in Prefect.
        turn: name of the lock of whoever waits for more than one; empty for none.

    Raises:
        PermissionError: a lock file of another user cannot be opened; the message names it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = _Wanted(directory, tuple(whats), count, turn, holder, flow_run_id)
    taken = wanted.take()
    if taken is None:  # perhaps read_locks of another process, which holds a lock for an instant
        time.sleep(0.1)
        taken = wanted.take()
    waited = taken is None
    if taken is None:
        taken = _wait(wanted, log, show)
    with ExitStack() as stack:
        held = tuple(stack.enter_context(_holding(*each, holder, flow_run_id)) for each in taken)
        if waited:
            are = "is" if count == 1 else "are"
            log(f"{' and '.join(each.what for each in held)} {are} free: going on")
            show(None)
        yield held


@contextmanager
def exclusive_if_free(
    directory: Path, whats: Sequence[str], holder: str, flow_run_id: str = "", turn: str = ""
) -> Iterator[Held | None]:
    """Hold the first of several devices that is free, or none; the arguments are those of ``exclusive_several``.

    Yields:
        None if none is free now, or another run waits for several.

    Raises:
        PermissionError: as exclusive_several.
    """
    directory.mkdir(parents=True, exist_ok=True)
    taken = _Wanted(directory, tuple(whats), 1, turn, holder, flow_run_id).take()
    if taken is None:
        yield None
        return
    with _holding(*taken[0], holder, flow_run_id) as held:
        yield held


@contextmanager
def _holding(what: str, descriptor: int, holder: str, flow_run_id: str) -> Iterator[Held]:
    """Write the holder into a lock file that was taken, and close it in the end."""
    try:
        write_holder(what, descriptor, holder, flow_run_id)
        yield Held(what, descriptor)
    finally:
        # Closed, not unlocked: a child that inherited the descriptor may still be at work and then keeps the lock.
        os.close(descriptor)


@dataclass
class _Wanted:
    """What one call wants to hold; the arguments of ``exclusive_several``."""

    directory: Path
    whats: tuple[str, ...]
    count: int
    turn: str
    holder: str
    flow_run_id: str
    has_turn: bool = False

    def take(self) -> list[tuple[str, int]] | None:
        """Take the first free ones, each with its descriptor; None if fewer are free, or it is another's turn."""
        if self.turn and not self.has_turn and read_lock(lock_path(self.directory, self.turn)).held:
            return None
        taken: list[tuple[str, int]] = []
        try:
            for what in self.whats:
                descriptor = take_lock(lock_path(self.directory, what))
                if descriptor is not None:
                    taken.append((what, descriptor))
                if len(taken) == self.count:
                    return taken
        except BaseException:
            _close(taken)
            raise
        _close(taken)
        return None

    @contextmanager
    def try_turn(self) -> Iterator[None]:
        """Have the turn during the body, if it is needed, not had yet, and free."""
        descriptor = None
        if self.turn and self.count > 1:
            descriptor = take_lock(lock_path(self.directory, self.turn))
        if descriptor is None:
            yield
            return
        try:
            write_holder(self.turn, descriptor, self.holder, self.flow_run_id)
            self.has_turn = True
            yield
        finally:
            self.has_turn = False
            os.close(descriptor)

    def waiting_for(self) -> str:
        """Who holds what this call wants, for people."""
        held = []
        for what in self.whats:
            path = lock_path(self.directory, what)
            state = read_lock(path)
            if state.held or self.count == 1:
                held.append(f"{what}, held by {state.describe()} ({path})")
        many = f"{self.count} of {len(self.whats)} devices: " if self.count > 1 else ""
        text = f"waiting for {many}{' or '.join(held) or 'those that have just become free'}"
        if self.turn and not self.has_turn:
            first = read_lock(lock_path(self.directory, self.turn))
            if first.held:
                text += f"; before it {first.describe()}, which waits for several devices"
        return text


def _close(taken: Sequence[tuple[str, int]]) -> None:
    for _, descriptor in taken:
        os.close(descriptor)


def _wait(wanted: _Wanted, log: Callable[[str], None], show: Callable[[str | None], None]) -> list[tuple[str, int]]:
    """Wait until the locks are free and take them; see ``exclusive_several`` for the messages."""
    told = _Told(log, show)
    while True:
        with wanted.try_turn():
            while True:
                told.tell(wanted.waiting_for)
                time.sleep(_POLL_SECONDS)
                if taken := wanted.take():
                    return taken
                if wanted.count > 1 and wanted.turn and not wanted.has_turn:
                    break  # try to get the turn again


@dataclass
class _Told:
    """Tells whom a run waits for: when that changes, and in the log every minute."""

    log: Callable[[str], None]
    show: Callable[[str | None], None]
    shown: str = ""
    logged_at: float = 0.0
    described_at: float = 0.0

    def tell(self, describe: Callable[[], str]) -> None:
        now = time.monotonic()
        if self.shown and now - self.described_at <= _DESCRIBE_SECONDS:
            return
        self.described_at = now
        message = describe()
        if message != self.shown:
            self.show(message)
        if message != self.shown or now - self.logged_at > _REMIND_SECONDS:
            self.log(message)
            self.shown, self.logged_at = message, now

"""A daemon thread gives back a result or an exception, has the caller's context, and holds no exit up."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading

import pytest

from ops.threads import in_daemon_thread


def test_the_result_comes_back_from_a_daemon_thread() -> None:
    def work() -> tuple[str, bool]:
        thread = threading.current_thread()
        return thread.name, thread.daemon

    assert in_daemon_thread(work, "a name").result(10) == ("a name", True)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_exception_comes_back(error: type[BaseException]) -> None:
    """Also one that is no Exception: the caller would wait for a result for ever."""

    def work() -> None:
        raise error("injected")

    future = in_daemon_thread(work, "fails")
    with pytest.raises(error, match="injected"):
        future.result(10)


def test_the_work_has_the_callers_context() -> None:
    """A copy: what the work sets there does not reach the caller."""
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")

    def work() -> str:
        found = variable.get()
        variable.set("the work's")
        return found

    assert in_daemon_thread(work, "context").result(10) == "the caller's"
    assert variable.get() == "the caller's"


def test_a_hanging_thread_does_not_hold_the_exit_up() -> None:
    script = "import time; from ops.threads import in_daemon_thread as s; s(lambda: time.sleep(600), 'hangs')"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

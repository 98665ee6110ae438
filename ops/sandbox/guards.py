"""Runs generated code with its tests behind two guards, and tells which rows pass.

Guard 1 is an allow-list over the syntax tree of the code and of its tests (``refusal`` in ops/sandbox/child.py). It
allows no import, class, decorator, ``global``, ``with`` or ``match``, no name or attribute that begins with two
underscores, and of the builtins and of the methods of str, list, dict, set, tuple, int and float only those listed.
Code that passes cannot reach a file, a socket or another process, and runs on any system. Guard 2 is bubblewrap, for
all other code. Without a working bubblewrap such code is not executed.

Behind both guards the code runs in a fresh, isolated interpreter whose environment has nothing but PYTHONHASHSEED=0,
so that sets have the same order in every run (hence ``-P -s``, the parts of ``-I`` that do not ignore that variable).
Several interpreters share the rows, each with its own session and an empty working directory, which is removed as
soon as it has started. An interpreter forks a child for each row, and only this child handles the generated text,
parsing included.

Covered, by both guards:

- Time: a row is killed after ``timeout_seconds`` of processor time, where the system tells it (Linux), and after four
  times as many by the wall clock; elsewhere after ``timeout_seconds`` by the wall clock. All processes are killed
  when the call ends, when it is interrupted, and (Linux) when the calling process dies.
- Memory: the address space is limited to ``memory_bytes``, and no core is dumped. As many rows run at a time as there
  are processors, and as free memory has room for with this limit; eight at most.
- Files: behind guard 1 none can be opened. In bubblewrap only /usr, the libraries, the interpreter and its
  site-packages can be read, nothing can be created, and no file can grow.
- Processes: no process or thread can be started (RLIMIT_NPROC, which does not bind root, and a filter of system
  calls). Behind guard 1 root becomes the user nobody; in bubblewrap it appears as nobody and has no capabilities.
- Network: no socket of any family behind either guard (filter), and in bubblewrap a network namespace of its own. A
  pair of AF_UNIX sockets within the process can be made in bubblewrap, because asyncio needs it.
- System calls, on x86_64 and aarch64 where Python has ctypes and the kernel seccomp: behind guard 1 all but those of
  pure computation are refused, in case the allow-list has a gap; in bubblewrap those that start or trace processes or
  share memory. New privileges cannot be gained behind either.
- Faked results: printing, writing to every descriptor, SystemExit, os._exit(0), being killed, and catching every
  exception do not make a row pass. A row passes only if code and tests run to their ends in a child that then reports
  it with a random token of this row. The tests have their own builtins; a row whose code rebinds a builtin that its
  tests use fails. Behind guard 1 there are no classes, so == has Python's meaning. In bubblewrap no operator, truth
  test or builtin of the tests accepts an object of a class that the code defined.
- The calling process: its environment, descriptors, checkout and home directory cannot be reached; the reasons that
  are returned contain printable characters only.

Stricter than Python: a row fails if its tests compare, add or test the truth of objects of the code's own classes, or
if its function has the name of a builtin that the tests call.

Not covered:

- Code in bubblewrap that searches its own interpreter (frames, gc, tracing, ctypes, patched library classes) can fake
  its own result. It cannot leave the sandbox or change the result of another row. Behind guard 1 it cannot search.
- Everything below /usr and the interpreter's own directories can be read in bubblewrap: keep no secrets there.
- Flaws of the kernel, of bubblewrap, and behind guard 1 of Python together with the filter; side channels. They weigh
  more for root, because the user that bubblewrap shows as nobody is root outside: run as another user if possible.
- Other systems than Linux: they have no guard 2, no filter, and only the limits that the system provides. On Linux
  machines other than x86_64 and aarch64 there is no filter either, so bubblewrap counts as not working.
- A row keeps one CPU core busy for up to ``timeout_seconds``. Where other processes leave it less than a quarter of a
  core, a correct but slow row can time out.
- Whether passing tests mean that the code is correct.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from model.available import available_memory, available_processors
from ops.sandbox.child import NO_RESULT, PATIENCE

Outcome = Literal["passed", "failed", "error", "timeout", "not_executed"]
Snippet = tuple[str, Sequence[str]]

INSTALL = (
    "install bubblewrap (apt install bubblewrap, or dnf install bubblewrap) and allow user namespaces: "
    "sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0, where they exist"
)
SECONDS = 2.0  # processor time of a row
MEMORY_BYTES = 512 * 2**20
_CHILD = Path(__file__).with_name("child.py")
_PYTHON_OPTIONS = ["-P", "-s", "-S", "-B", "-W", "ignore"]
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
_SECONDS_TO_START = 30  # time limit for the interpreter's start
_SECONDS_PER_ROW = 0.5  # for forking, in addition to the row's own time limit
_ROWS_OF_A_SANDBOX = 16  # at least, so that starting it pays
_MOST_SANDBOXES = 8
_EARLY_END = "the sandbox ended early"

# Code and tests that run in bubblewrap before its first use, and prove that guard 2 works on this machine.
_PROBE = """
import os, socket

def raises(attempt, *arguments):
    try:
        result = attempt(*arguments)
    except OSError:
        return True
    if attempt is os.fork and result == 0:
        os._exit(0)
    return False
"""
_PROBE_TESTS = (
    "assert raises(os.fork)",
    "assert raises(open, '/etc/passwd')",
    "assert raises(os.mkdir, '/tmp/probe') and raises(os.mkdir, '/probe') and raises(os.mkdir, '/dev/shm/probe')",
    "assert all(raises(socket.socket, family) for family in (socket.AF_INET, socket.AF_NETLINK, 40))",  # 40: AF_VSOCK
    "assert raises(socket.create_connection, ('192.0.2.1', 80), 1)",
    "assert os.getuid() != 0 and os.getpid() < 100",
)


@dataclass(frozen=True)
class RowResult:
    """The result of running one row.

    Attributes:
        outcome: "passed" if code and tests ran to their ends; "failed" if an assertion failed; "error" after an
            exception or if the process died; "timeout"; "not_executed" if it needs bubblewrap, which does not work
            here.
        reason: explanation for people; empty if the row passed.
    """

    outcome: Outcome
    reason: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether the row alone decides it, and not how busy the machine is or what else ended its process."""
        return self.outcome in ("passed", "failed", "error") and not self.reason.startswith((NO_RESULT, _EARLY_END))


def run_tests(
    snippets: Sequence[Snippet], timeout_seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> list[RowResult]:
    """Run each row, a snippet of code and its tests (statements, at least one of them an assert), by itself.

    Args:
        snippets: generated code with its tests; neither is trusted.
        timeout_seconds: processor time of each row.
        memory_bytes: limit of the address space of each row; an interpreter alone takes about 30 MiB.

    Returns:
        One result per snippet, in the order of the snippets.
    """
    limits = timeout_seconds, memory_bytes
    answers = _run([sys.executable, *_PYTHON_OPTIONS, str(_CHILD)], snippets, *limits, listed=True)
    refused = [index for index, (outcome, _) in enumerate(answers) if outcome == "refused"]
    if refused:
        command, problem = _bubblewrap()
        if command is None:
            again = [("not_executed", f"{answers[index][1]}, and {problem}") for index in refused]
        else:
            again = _run(command, [snippets[index] for index in refused], *limits, listed=False)
        for index, answer in zip(refused, again, strict=True):
            answers[index] = answer
    return [_checked(outcome, reason) for outcome, reason in answers]


def _checked(outcome: str, reason: str) -> RowResult:
    """The result with its outcome checked and its reason made printable: the sandbox is not trusted."""
    reason = "".join(character if character.isprintable() else " " for character in reason)
    match outcome:
        case "passed" | "failed" | "error" | "timeout" | "not_executed":
            return RowResult(outcome, reason)
    return RowResult("error", f"no such outcome: {outcome[:20]!r}")


def _run(
    command: list[str], rows: Sequence[Snippet], seconds: float, memory_bytes: int, *, listed: bool
) -> list[tuple[str, str]]:
    """Run rows in ops/sandbox/child.py, dealt to several sandboxes: outcome and reason of each.

    A row that ends its sandbox is an error; the rows behind it run in a new sandbox.
    """
    count = _count_sandboxes(len(rows), memory_bytes)
    parts = [range(len(rows))[number::count] for number in range(count)]
    answers: dict[int, tuple[str, str]] = {}
    while parts := [part for part in parts if part]:
        with ExitStack() as stack:
            running = [
                stack.enter_context(
                    _sandbox(command, [rows[index] for index in part], seconds, memory_bytes, listed=listed)
                )
                for part in parts
            ]
            found = [answers_of() for answers_of in running]
        for number, (part, (more, ending)) in enumerate(zip(parts, found, strict=True)):
            if len(more) < len(part):
                more.append(("error", ending))
            answers.update(zip(part, more, strict=False))
            parts[number] = part[len(more) :]
    return [answers[index] for index in range(len(rows))]


def _count_sandboxes(rows: int, memory_bytes: int) -> int:
    """How many sandboxes share the rows: each has a processor to itself, and its row has the memory of its limit."""
    fitting = available_memory() // memory_bytes
    return max(1, min(rows // _ROWS_OF_A_SANDBOX, _MOST_SANDBOXES, available_processors(), fitting))


def _file_in_memory() -> IO[bytes]:
    """A file without a name. On Linux it needs no disk, which may be full: answers would be lost."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("sandbox"), "w+b")
    return tempfile.TemporaryFile()


@contextmanager
def _sandbox(
    command: list[str], rows: Sequence[Snippet], seconds: float, memory_bytes: int, *, listed: bool
) -> Iterator[Callable[[], tuple[list[tuple[str, str]], str]]]:
    """A process that runs rows one after the other, until this context is left.

    Its input and output are files, so that several can be started before the first is waited for.

    Yields:
        Waits for the process: outcomes and reasons until it ended, and a message on how it ended.
    """
    request = {
        "rows": [(code, list(tests)) for code, tests in rows],
        "listed": listed,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "parent": os.getpid() if listed else None,  # not visible in bubblewrap
    }
    process: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + _SECONDS_TO_START + len(rows) * (PATIENCE * seconds + _SECONDS_PER_ROW)
    with _file_in_memory() as given, _file_in_memory() as output, _file_in_memory() as errors:
        given.write(json.dumps(request).encode())
        given.seek(0)
        try:
            with tempfile.TemporaryDirectory(prefix="sandbox-") as empty:  # removed as soon as the process is in it
                process = subprocess.Popen(
                    command,
                    stdin=given,
                    stdout=output,
                    stderr=errors,
                    cwd=empty,
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
            yield partial(_answers, process, deadline, len(rows), output, errors)
        finally:
            if process is not None:
                _kill(process)


def _answers(
    process: subprocess.Popen[bytes], deadline: float, rows: int, output: IO[bytes], errors: IO[bytes]
) -> tuple[list[tuple[str, str]], str]:
    """Wait for a sandbox until its deadline. Returns what ``_sandbox`` says."""
    _wait(process, deadline)
    _kill(process)
    for file in (output, errors):
        file.seek(0)
    whole = [line for line in output.read().splitlines(keepends=True) if line.endswith(b"\n")]
    found = [(str(outcome), str(reason)) for outcome, reason in map(json.loads, whole[:rows])]
    said = errors.read().decode(errors="replace").strip()[-200:]
    return found, f"{_EARLY_END} (exit status {process.returncode}) {said}".strip()


def _wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait until a process has ended, or until the deadline.

    Without a descriptor of the process, Python looks every 50 ms whether it has ended.
    """
    with suppress(OSError, AttributeError):  # not Linux, or a container that does not allow it
        descriptor = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(1000 * max(0.0, deadline - time.monotonic()))
        finally:
            os.close(descriptor)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # not reaped yet, so its pid cannot be another process's
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _bubblewrap() -> tuple[list[str] | None, str]:
    """The command that runs the child in bubblewrap; or None, and why there is none with the remedy."""
    program = shutil.which("bwrap")
    if sys.platform != "linux":
        return None, "only Linux has bubblewrap to run it in"
    if program is None:
        return None, f"bubblewrap is not installed to run it in: {INSTALL}"
    command = _bubblewrap_command(program)
    outcome, reason = _probe(tuple(command))
    if outcome != "passed":
        return None, f"bubblewrap does not work here ({reason}): {INSTALL}"
    return command, ""


@functools.cache
def _probe(command: tuple[str, ...]) -> tuple[str, str]:
    return _run(list(command), [(_PROBE, _PROBE_TESTS)], 5.0, MEMORY_BYTES, listed=False)[0]


def _bubblewrap_command(program: str) -> list[str]:
    """bubblewrap without shared namespaces and capabilities, on a read-only root with the system and this Python."""
    home = Path(os.path.expanduser("~"))
    prefixes = {path for prefix in (sys.base_prefix, sys.prefix) for path in (prefix, os.path.realpath(prefix))}
    readable = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"]
    readable += sorted(path for path in prefixes if not home.is_relative_to(path) and path != "/usr")
    packages = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    variables = {
        **_ENVIRONMENT,
        "PYTHONPATH": ":".join(packages),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return [
        *(program, "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"),
        *(word for name, value in variables.items() for word in ("--setenv", name, value)),
        *(word for path in readable for word in ("--ro-bind-try", path, path)),
        *("--ro-bind", str(_CHILD), "/child.py"),
        *("--dir", "/tmp", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"),
        *("--", os.path.realpath(sys.executable), *_PYTHON_OPTIONS, "/child.py"),
    ]

"""Runs generated code against its tests, behind two guards, and says which rows pass.

Guard 1 is an allow-list over the syntax tree of the code and of its tests (``refusal`` in ops/sandbox/child.py): no
import, class, decorator, ``global``, ``with`` or ``match``; no name or attribute that begins with two underscores;
of the builtins and of the methods of str, list, dict, set, tuple, int and float only those listed. What passes has
no way to a file, a socket or another process, and runs anywhere. Guard 2 is bubblewrap, for everything else.
Without a bubblewrap that works such code is not executed.

Both guards run a fresh, isolated interpreter with an empty environment but for PYTHONHASHSEED=0 (hence ``-P -s``, the
parts of ``-I`` that do not ignore it: sets have one order in every run). It runs in an empty directory, removed
already, and a session of its own. It forks a child for each row, and all that touches the text, parsing included,
happens there.

Covered, in both guards:

- Time: a row is killed after ``timeout_seconds`` of wall clock, CPU seconds have a limit too, and all processes are
  killed when the call ends, when it is interrupted, and (Linux) when the calling process dies.
- Memory: ``memory_bytes`` of address space; one row runs at a time, and no core is dumped.
- Files: none can be opened behind guard 1. In bubblewrap only /usr, the libraries, the interpreter and its
  site-packages can be read, nothing can be created, and no file can grow.
- Processes: none can be started, nor threads (RLIMIT_NPROC, which does not bind root, and a filter of system calls).
  Behind guard 1 root has become nobody; in bubblewrap it is shown as nobody and has no capabilities.
- Network: no socket behind guard 1 (filter), nothing but an empty loopback in bubblewrap.
- System calls, on x86_64 and aarch64 where Python has ctypes and the kernel seccomp: behind guard 1 all but those
  of pure computing are refused, should the allow-list have a hole; in bubblewrap those which start, trace or share.
  No new privileges in either.
- Faked verdicts: printing, writing to every descriptor, SystemExit, os._exit(0), being killed, and catching every
  exception do not count. A row passes only if code and tests ran to their ends in a child that then says so, with a
  token drawn for this row. Tests have builtins of their own; a row whose code gives another meaning to a builtin
  that its tests use fails. Behind guard 1 there are no classes, so == means what Python says. In bubblewrap no
  operator, truth test or builtin of the tests accepts an object of a class that the code defined.
- The caller: its environment, descriptors, checkout and home directory are out of reach; reasons are printable.

Stricter than Python: a row fails if its tests compare, add or test the truth of objects of the code's own classes, or
if its function is named as a builtin that the tests call.

Not covered:

- Code in bubblewrap that searches its own interpreter (frames, gc, tracing, ctypes, patched library classes) can fake
  its own verdict. It cannot leave, nor change the verdict of another row. Behind guard 1 it has no way to search.
- Whatever lies below /usr and the interpreter's own directories can be read in bubblewrap: keep no secrets there.
- Flaws of the kernel, of bubblewrap, and behind guard 1 of Python together with the filter; side channels. For root
  they weigh more, since what bubblewrap shows as nobody is root outside: better be another user.
- Other systems than Linux: there is no guard 2, no filter, and only those limits that the system has. On Linux
  machines other than x86_64 and aarch64 there is no filter either, so bubblewrap does not count as working for root.
- One CPU core is busy for up to ``timeout_seconds`` a row. Under heavy load a right but slow row can time out.
- Whether tests that pass mean anything.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["passed", "failed", "error", "timeout", "not_executed"]
Snippet = tuple[str, Sequence[str]]

INSTALL = (
    "install bubblewrap (apt install bubblewrap, or dnf install bubblewrap) and allow user namespaces: "
    "sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0, where they exist"
)
MEMORY_BYTES = 512 * 2**20
_CHILD = Path(__file__).with_name("child.py")
_PYTHON_OPTIONS = ["-P", "-s", "-S", "-B", "-W", "ignore"]
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
_SECONDS_TO_START = 30
_SECONDS_PER_ROW = 0.5  # of forking, beside the row's own time

# Proves in the very sandbox that what guard 2 promises holds here.
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
    "assert raises(socket.create_connection, ('192.0.2.1', 80), 1)",
    "assert os.getuid() != 0 and os.getpid() < 100",
)


@dataclass(frozen=True)
class Verdict:
    """What became of a row.

    Attributes:
        outcome: "passed": code and tests ran to their ends; "failed": a test did not hold; "error": an exception, or
            a death; "timeout"; "not_executed": it needs bubblewrap, which is not there.
        reason: for people; empty when passed.
    """

    outcome: Outcome
    reason: str = ""


def run_tests(
    snippets: Sequence[Snippet], timeout_seconds: float = 2.0, memory_bytes: int = MEMORY_BYTES
) -> list[Verdict]:
    """Run each snippet, code and its tests (statements, at least one of them an assert), by itself.

    Args:
        snippets: generated code with its tests; neither is trusted.
        timeout_seconds: for each row, of wall clock.
        memory_bytes: of address space, for each row; an interpreter alone takes about 30 MiB.

    Returns:
        One verdict per snippet, in their order.
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
    return [_verdict(outcome, reason) for outcome, reason in answers]


def _verdict(outcome: str, reason: str) -> Verdict:
    reason = "".join(character if character.isprintable() else " " for character in reason)
    match outcome:
        case "passed" | "failed" | "error" | "timeout" | "not_executed":
            return Verdict(outcome, reason)
    return Verdict("error", f"no such outcome: {outcome[:20]!r}")


def _run(
    command: list[str], rows: Sequence[Snippet], seconds: float, memory_bytes: int, *, listed: bool
) -> list[tuple[str, str]]:
    """Have ops/sandbox/child.py judge rows: outcome and reason. One that ends the sandbox ends itself only."""
    answers: list[tuple[str, str]] = []
    while len(answers) < len(rows):
        more, ending = _start(command, rows[len(answers) :], seconds, memory_bytes, listed=listed)
        answers += more
        if len(answers) < len(rows):
            answers.append(("error", ending))
    return answers


def _start(
    command: list[str], rows: Sequence[Snippet], seconds: float, memory_bytes: int, *, listed: bool
) -> tuple[list[tuple[str, str]], str]:
    """Judge rows in one sandbox: the answers there were, and how it ended."""
    request = {
        "rows": [(code, list(tests)) for code, tests in rows],
        "listed": listed,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "parent": os.getpid() if listed else None,  # in bubblewrap it is not visible
    }
    with tempfile.TemporaryFile() as errors:
        with tempfile.TemporaryDirectory(prefix="sandbox-") as empty:  # and gone once it runs there
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=empty,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        try:
            deadline = _SECONDS_TO_START + len(rows) * (seconds + _SECONDS_PER_ROW)
            output, _ = process.communicate(json.dumps(request).encode(), timeout=deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        finally:
            if process.poll() is None:  # not reaped yet, so the id is still its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        whole = [line for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
        answers = [(str(outcome), str(reason)) for outcome, reason in map(json.loads, whole)]
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()[-200:]
    return answers, f"the sandbox ended early (exit status {process.returncode}) {said}".strip()


def _bubblewrap() -> tuple[list[str] | None, str]:
    """The command that runs the child in bubblewrap, or None and what is to be done about it."""
    program = shutil.which("bwrap")
    if sys.platform != "linux":
        return None, "only Linux has bubblewrap to run it in"
    if program is None:
        return None, f"there is no bubblewrap to run it in: {INSTALL}"
    command = _bubblewrap_command(program)
    outcome, reason = _probe(tuple(command))
    if outcome != "passed":
        return None, f"bubblewrap does not work here ({reason}): {INSTALL}"
    return command, ""


@functools.cache
def _probe(command: tuple[str, ...]) -> tuple[str, str]:
    return _run(list(command), [(_PROBE, _PROBE_TESTS)], 5.0, MEMORY_BYTES, listed=False)[0]


def _bubblewrap_command(program: str) -> list[str]:
    """No namespace shared, no capability, an empty read-only root with the system and this Python in it."""
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

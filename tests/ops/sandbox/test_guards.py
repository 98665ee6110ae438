"""The sandbox: correct rows pass, wrong ones do not, and hostile code cannot escape, do harm or fake a result."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from model.demo.grammar import make_rows
from ops.sandbox import guards as sandbox
from ops.sandbox.guards import RowResult, run_tests

ROOT = Path(__file__).resolve().parents[3]
FILTERED = os.uname().machine in ("x86_64", "aarch64") and sys.platform == "linux"
# A broken bubblewrap is not skipped: it fails these tests.
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def _one(code: str, *tests: str, **limits: float) -> RowResult:
    return run_tests([(code, tests or ("assert True",))], **limits)[0]  # type: ignore[arg-type]


# Rows


RIGHT = {
    "numbers": ("def f(x):\n    return x % 3 == 0", ["assert f(9)", "assert not f(10)", "assert f(0) is True"]),
    "strings": ("def f(s):\n    return ''.join(reversed(s.upper()))", ["assert f('abc') == 'CBA'"]),
    "lists": (
        "def f(xs):\n    return sorted({x for x in xs if x > 1}, key=lambda x: -x)",
        ["assert f([3, 2, 3]) == [3, 2]"],
    ),
    "dicts": (
        "def f(s):\n    d = {}\n    for c in s:\n        d[c] = d.get(c, 0) + 1\n    return d",
        ["assert f('aab') == {'a': 2, 'b': 1}", "assert list(f('ba').items()) == [('b', 1), ('a', 1)]"],
    ),
    "f-strings": ("def f(n):\n    return f'{n:>{5}}|{n!r}'", ["assert f(7) == '    7|7'"]),
    "generators": ("def f(n):\n    for i in range(n):\n        yield i * i", ["assert list(f(3)) == [0, 1, 4]"]),
    "closures": (
        "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n    return g",
        ["g = f()", "g()", "assert g() == 2"],
    ),
    "exceptions": (
        "def f(a, b):\n    try: return a / b\n    except ZeroDivisionError as e: raise ValueError('b') from e",
        ["try:\n    f(1, 0)\n    assert False\nexcept ValueError:\n    pass"],
    ),
    "print": ("def f(x):\n    print(x)\n    return x", ["assert f(1) == 1"]),
    "a parameter named as a builtin": ("def f(input, max):\n    return input + max", ["assert f(1, 2) == 3"]),
    "names": ("n = '\\N{BULLET}'\nwhile (m := len(n)) < 3:\n    n += n", ["assert m == 4"]),
}


@pytest.mark.parametrize("row", RIGHT.values(), ids=RIGHT)
def test_right_rows_pass_anywhere(row: tuple[str, list[str]], without_bubblewrap: None) -> None:
    """Ordinary code of the tasks passes the allow-list and needs nothing but Python."""
    assert run_tests([row]) == [RowResult("passed")]


@pytest.mark.parametrize(
    ("code", "test", "outcome", "reason"),
    [
        (
            "def f(x): return x - 1",
            "assert f(1) == 2, 'off by two'",
            "failed",
            "assert f(1) == 2, 'off by two' off by two",
        ),
        ("def f(x): return x.upper()", "assert f(1) == 2", "error", "AttributeError: 'int' object has no attribute"),
        ("def f(x): return y", "assert f(1) == 2", "error", "NameError: name 'y' is not defined"),
        ("def f(x: List[int]): return x", "assert f(1) == 1", "error", "NameError: name 'List'"),
        ("", "assert f(1) == 2", "error", "NameError: name 'f'"),
        ("raise ValueError('a\\nb')", "assert True", "error", "ValueError: a b"),
        ("def f(x) return x", "assert f(1) == 1", "error", "SyntaxError"),
        ("return 1", "assert True", "error", "SyntaxError: 'return' outside function"),
        ("def f(x):\nreturn x", "assert f(1) == 1", "error", "IndentationError"),
        ("def f(x): return x", "assert f(1) ==", "error", "SyntaxError"),
        ("def f(x): return x", "f(1) == 1", "error", "no test asserts anything"),
    ],
)
def test_wrong_rows_fail_and_say_why(code: str, test: str, outcome: str, reason: str) -> None:
    """A false assert has failed; an exception, anywhere, is an error."""
    result = _one(code, test)
    assert result.outcome == outcome
    assert reason in result.reason


def test_a_row_without_tests_does_not_pass() -> None:
    """Without an assertion nothing was tested."""
    assert run_tests([("x = 1", [])]) == [RowResult("error", "no test asserts anything")]
    assert run_tests([]) == []


def test_every_test_of_a_row_counts_and_rows_are_isolated() -> None:
    """Also the last assert counts, and a row does not see the definitions of the row before it."""
    rows = [("def f(x): return 1", ["assert f(1) == 1", "assert f(2) == 2"]), ("", ["assert f(1) == 1"])]
    assert [result.outcome for result in run_tests(rows)] == ["failed", "error"]


def test_two_hundred_rows_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """One interpreter forks a child for each row; starting an interpreter for each row would exceed the bound."""
    started = time.monotonic()
    results = run_tests([("def f(x):\n    return x + 1", [f"assert f({n}) == {n + n % 2 + 1}"]) for n in range(200)])
    seconds = time.monotonic() - started
    assert [result.outcome for result in results] == ["passed", "failed"] * 100
    with capsys.disabled():
        print(f" [200 rows: {seconds:.2f} s]", end="")
    assert seconds < 60


def test_sets_have_one_order_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows give the same results in each run, whatever the caller's PYTHONHASHSEED."""
    reasons = set()
    for seed in ("1", "2", "random"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        reasons.add(_one("def f(): return list({c for c in 'abcdefgh'})", "assert not f(), f()").reason)
    assert len(reasons) == 1


# Guard 2, and working without it


NEEDS_IMPORT = ("import math as m\ndef f(x): return m.isqrt(x)", ["assert f(9) == 3"])


def test_without_bubblewrap_it_is_not_executed(without_bubblewrap: None) -> None:
    """Code that does not pass the allow-list is not run, with the remedy in the reason; other rows are run."""
    (first, second) = run_tests([NEEDS_IMPORT, ("x = 1", ["assert x == 1"])])
    assert first.outcome == "not_executed"
    assert "is not on the allow-list" in first.reason
    assert "apt install bubblewrap" in first.reason
    assert "user namespaces" in first.reason
    assert second == RowResult("passed")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
            "No permissions to create new namespace",
        ),
        (f"exec {sys.executable} -P -s -S {sandbox._CHILD}", "bubblewrap does not work here ("),
    ],
    ids=["fails", "isolates nothing"],
)
def test_a_bubblewrap_that_does_not_isolate_counts_as_none(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed bubblewrap counts only if it starts, and if the code in it finds files and network closed."""
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_tests([NEEDS_IMPORT])[0]
    assert result.outcome == "not_executed"
    assert problem in result.reason
    assert "apt install bubblewrap" in result.reason


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "test"),
    [
        NEEDS_IMPORT[:1] + tuple(NEEDS_IMPORT[1]),
        ("from collections import Counter\ndef f(s): return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "class P:\n    def __init__(self, x): self.x = x\n    def get(self): return [self.x]",
            "assert P(2).get() == [2]",
        ),
        ("class P(Exception): pass\ndef f(): raise P", "try:\n    f()\n    assert False\nexcept P: pass"),
        ("import numpy as np\ndef f(x): return np.cumsum(x)", "assert list(f([1, 2])) == [1, 3]"),
        ("def f(x): return type(x) is int", "assert f(1) and not f('')"),
    ],
    ids=["math", "Counter", "class", "exception", "numpy of the environment", "type"],
)
def test_right_rows_pass_in_bubblewrap(code: str, test: str) -> None:
    """Imports, classes, and the packages of this environment."""
    assert _one(code, test, timeout_seconds=10) == RowResult("passed")


WRITE_EVERYWHERE = """
import os
for n in range(64):
    try: os.write(n, b'["passed", ""]')
    except OSError: pass
"""
HOSTILE = {
    "fork": ("import os\nos.fork()", {"error"}),
    "fork bomb": ("import os\nwhile True: os.fork()", {"error"}),
    "stubborn fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass",
        {"timeout"},
    ),
    "fork by hand": ("import ctypes\nassert ctypes.CDLL(None).syscall(57) >= 0", {"error", "failed"}),
    "program": ("import subprocess\nsubprocess.run(['/bin/true'])", {"error"}),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", {"error"}),
    "thread": ("import threading\nthreading.Thread(target=print).start()", {"error"}),
    "2 GB": ("import array\nx = bytearray(2 ** 31)", {"error"}),
    "2 GB outside of any limit": ("import os\nos.ftruncate(os.memfd_create('x'), 2 ** 31)", {"error"}),
    "more memory": ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", {"error"}),
    "endless loop": ("import os\nwhile True: pass", {"timeout"}),
    "sleep": ("import time\ntime.sleep(60)", {"timeout"}),
    "deaf": (
        "import signal, time\nfor n in (1, 2, 15, 24): signal.signal(n, lambda *a: 0)\ntime.sleep(60)",
        {"timeout"},
    ),
    "recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", {"error", "timeout"}),
    "crash": ("import ctypes\nctypes.string_at(0)", {"error"}),
    "reading /etc/passwd": ("open('/etc/passwd')", {"error"}),
    "reading the checkout": (f"open({str(ROOT / 'README.md')!r})", {"error"}),
    "reading processes": ("import os\nos.listdir('/proc/1')", {"error"}),
    "writing /tmp": ("open('/tmp/x', 'w')", {"error"}),
    "writing /": ("open('/x', 'w')", {"error"}),
    "writing /dev/shm": ("open('/dev/shm/x', 'w')", {"error"}),
    "writing site-packages": ("import numpy, os\nopen(os.path.dirname(numpy.__file__) + '/x', 'w')", {"error"}),
    "becoming root": ("import os\nos.setuid(0)", {"error"}),
    "new namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", {"failed", "error"}),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", {"error"}),
    "interrupting the parent": ("import os\nos.kill(os.getppid(), 2)", {"error"}),
    "killing all": ("import os\nos.kill(-1, 9)", {"error"}),
    "limiting the parent": ("import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CPU, (0, 0))", {"error"}),
    "slowing the parent": ("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", {"error"}),
    "os._exit(0)": ("import os\nos._exit(0)", {"error"}),
    "sys.exit(0)": ("import sys\nsys.exit(0)", {"error"}),
    "SystemExit": ("raise SystemExit(0)", {"error"}),
    "exit in a finalizer": ("class A:\n    def __del__(self): raise SystemExit\nA()\nraise ValueError", {"error"}),
    "printing": ("import sys\nprint('[\"passed\", \"\"]', file=sys.stderr)\nprint('passed')\nsys.exit()", {"error"}),
    "writing everywhere": (
        WRITE_EVERYWHERE + "os._exit(0)",
        {"error"},
    ),
    "writing without end": (
        "while True:\n" + textwrap.indent(WRITE_EVERYWHERE * 100, "    "),
        {"error"},
    ),
    "closing everything": ("import os, time\nos.closerange(0, 64)\ntime.sleep(60)", {"error", "timeout"}),
    "an exception that lies": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
        {"error"},
    ),
}


@needs_bubblewrap
@pytest.mark.parametrize(
    ("seconds", "sandboxes"),
    [(10, 1), (10, 2), *(pytest.param(1, count, marks=pytest.mark.slow) for count in (1, 2))],
)
def test_hostile_rows_are_contained(seconds: int, sandboxes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hostile row gets its outcome, and the correct rows pass: between them, or in the sandbox beside them."""
    monkeypatch.setattr(sandbox, "_count_sandboxes", lambda rows, memory_bytes: sandboxes)
    rows = {name: row for name, row in HOSTILE.items() if ("timeout" in row[1]) == (seconds == 1)}
    between = [row for code, _ in rows.values() for row in ((code, ["assert True"]), NEEDS_IMPORT)]
    results = run_tests(between, timeout_seconds=seconds)
    found = dict(zip(rows, results[::2], strict=True))
    assert {name: found[name] for name, (_, outcomes) in rows.items() if found[name].outcome not in outcomes} == {}
    assert set(results[1::2]) == {RowResult("passed")}


@pytest.fixture
def _deadly_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row ``deadly`` ends its sandbox: real rows have found no way to do so."""
    child = tmp_path / "child.py"
    deadly = "        if code == 'deadly': os.kill(os.getpid(), 40)\n"
    source = sandbox._CHILD.read_text()
    loop = '    for code, tests in request["rows"]:\n'
    assert loop in source
    child.write_text(source.replace(loop, loop + deadly))
    os.chmod(tmp_path, 0o755)
    monkeypatch.setattr(sandbox, "_CHILD", child)


DEADLY = ("deadly", ["assert True"])


@pytest.mark.usefixtures("_deadly_rows")
def test_a_row_that_ends_the_sandbox_ends_only_itself() -> None:
    """If a row succeeds in killing its sandbox, the rows behind it run in a new one."""
    good = ("x = 1", ["assert x"])
    results = run_tests([good, DEADLY, good, DEADLY, good])
    assert [result.outcome for result in results] == ["passed", "error", "passed", "error", "passed"]
    assert "ended early" in results[1].reason


@pytest.mark.usefixtures("_deadly_rows")
@pytest.mark.parametrize("processors", [1, 2, 3])
def test_each_row_has_its_own_result_in_however_many_sandboxes(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are dealt to sandboxes, some of which a row ends: at its begin, in the middle, and at its end."""
    monkeypatch.setattr(sandbox, "available_processors", lambda: processors)
    deadly = {0, 1, 25, 26, 53, 54}
    rows = [DEADLY if n in deadly else (f"x = {n}", [f"assert x != {n} or {n % 3 == 0}"]) for n in range(55)]
    expected = ["error" if n in deadly else "failed" if n % 3 else "passed" for n in range(55)]
    assert [result.outcome for result in run_tests(rows)] == expected


@needs_bubblewrap
def test_no_network_file_or_variable_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of this machine is not reached, a file is not written, a secret is not in the environment."""
    monkeypatch.setenv("SECRET_TOKEN", "canary")
    target = tmp_path / "target"
    target.write_text("untouched")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        address = server.getsockname()
        results = run_tests(
            [
                (f"import socket\nsocket.create_connection({address!r})", ["assert True"]),
                (f"open({str(target)!r}, 'w').write('x')", ["assert True"]),
                (f"open({str(target)!r})", ["assert True"]),
                ("import os\ndef f(): return dict(os.environ)", ["assert 'SECRET_TOKEN' not in f()"]),
                ("import os\ndef f(): return sorted(os.environ)", ["assert not f(), f()"]),
                ("import socket\nsocket.create_connection(('192.0.2.1', 80))", ["assert True"]),
            ]
        )
        with pytest.raises(TimeoutError):
            server.accept()
    assert [result.outcome for result in results] == ["error", "error", "error", "passed", "failed", "error"]
    assert "HOME" not in results[4].reason
    assert target.read_text() == "untouched"


SOCKETS = """
import socket
def open_ones():
    found = []
    for family in range(64):
        for kind in (1, 2, 3, 4, 5, 10):  # SOCK_STREAM, DGRAM, RAW, RDM, SEQPACKET, PACKET
            for make in (socket.socket, socket.socketpair):
                try:
                    make(family, kind)
                    found.append((make.__name__, family))
                except OSError:
                    pass
    return set(found)
"""


@needs_bubblewrap
def test_no_socket_of_any_family_opens() -> None:
    """AF_VSOCK, for example, reaches the host of a virtual machine; no network namespace covers it."""
    (result,) = run_tests([(SOCKETS, ["assert open_ones() <= {('socketpair', 1)}, open_ones()"])], timeout_seconds=10)
    assert result == RowResult("passed")


@needs_bubblewrap
def test_asyncio_works_without_sockets() -> None:
    """Its event loop makes a pair of AF_UNIX sockets, which lead nowhere."""
    code = "import asyncio\nasync def add(a, b):\n    await asyncio.sleep(0)\n    return a + b"
    assert _one(code, "import asyncio", "assert asyncio.run(add(1, 2)) == 3") == RowResult("passed")


@needs_bubblewrap
def test_a_broken_bubblewrap_fails_these_tests(tmp_path: Path) -> None:
    """With a bwrap on the PATH that does not work, tests fail instead of being skipped."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "asyncio or no_socket", __file__]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout
    assert "skipped" not in done.stdout


SAME = "class Same:\n    __hash__ = int.__hash__\n    def __eq__(self, other): return True\n"
FAKES = {
    "equal to anything": (SAME + "def f(): return Same()", "assert f() == 3"),
    "on the right": (SAME + "def f(): return Same()", "assert 3 == f()"),
    "in a list": (SAME + "def f(): return [Same()]", "assert f() == [3]"),
    "in a dict": (SAME + "def f(): return {'a': (Same(),)}", "assert f() == {'a': (3,)}"),
    "in any list": (SAME + "def f(): return Same()", "assert f() in [1, 2]"),
    "by a name": (SAME + "f = Same()", "assert f == 3"),
    "int of its own": (
        "class I(int):\n    def __eq__(self, o): return True\ndef f(): return I(1)",
        "assert f() == 3",
    ),
    "metaclass": (
        "class M(type):\n    def __eq__(c, o): return True\nclass C(metaclass=M): pass\nf = C",
        "assert f == 3",
    ),
    "arithmetic": ("class N:\n    def __sub__(s, o): return 0\ndef f(): return N()", "assert abs(f() - 3) < 1"),
    "truth": ("class T:\n    def __bool__(s): return True\ndef f(): return T()", "assert f()"),
    "untruth": ("class T:\n    def __bool__(s): return False\ndef f(): return T()", "assert not f()"),
    "length": ("class T:\n    def __len__(s): return 3\ndef f(): return T()", "assert len(f()) == 3"),
    "class": ("class T:\n    __class__ = str\ndef f(): return T()", "assert isinstance(f(), str)"),
    "borrowed name": (SAME + "Same.__module__, Same.__qualname__ = 'builtins', 'int'\nf = Same()", "assert f == 3"),
    "patched builtin": ("import builtins\nbuiltins.len = lambda x: 3\ndef f(): return ()", "assert len(f()) == 3"),
    "patched harness": ("import builtins\nbuiltins.exec = lambda *a: 0\ndef f(): return 1", "assert f() == 3"),
    "patched type test": (SAME + "import builtins\nbuiltins.type = lambda x: int\nf = Same()", "assert f == 3"),
    "patched main": (SAME + "import __main__\n__main__._own = lambda x: x\nf = [Same()]", "assert f == [3]"),
    "patched modules": (
        'import json, os\njson.dumps = os.write = lambda *a: \'["passed", ""]\'\ndef f(): return 1',
        "assert f() == 3",
    ),
    "rebound builtin": ("import os\ndef sorted(x): return [3]\ndef f(): return []", "assert sorted(f()) == [3]"),
    "rebound later": (
        "def f():\n    global sorted\n    sorted = lambda x: [3]\n    return []",
        "assert sorted(f()) == [3]",
    ),
}


@needs_bubblewrap
def test_objects_of_the_code_cannot_fake_a_comparison() -> None:
    """In bubblewrap the tests' operators, truth tests and builtins refuse objects of the code's own classes."""
    results = run_tests([(code, [test]) for code, test in FAKES.values()])
    assert {name: v for name, v in zip(FAKES, results, strict=True) if v.outcome != "failed"} == {}


def test_the_projects_own_answers_pass_anywhere(without_bubblewrap: None) -> None:
    """Every reference answer of the sample data's test split passes the allow-list and its tests."""
    rows = make_rows()[1]
    results = run_tests([(row["completion"], row["tests"]) for row in rows])
    assert [(row, result) for row, result in zip(rows, results, strict=True) if result.outcome != "passed"] == []


def test_no_rows_give_no_results() -> None:
    """Data without tests, such as CodeAlpaca, is no error."""
    assert run_tests([]) == []

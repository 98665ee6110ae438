"""The program inside the sandbox: reads rows from stdin, forks a child for each, and writes a JSON line for each.

ops/sandbox/guards.py starts it as a script in a fresh interpreter. In bubblewrap it is the only visible file of the
project, so it stays one file, longer than the others, and imports the standard library only. Generated text is
handled, parsing included, in the forked child alone, behind the limits of ``confine``. ops/sandbox/guards.py lists
what is covered, and what not.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import gc
import json
import math
import os
import re
import resource
import select
import signal
import struct
import sys
import time
import types
import unicodedata  # noqa: F401 - the parser imports it for other alphabets, when no file can be opened any more
from collections.abc import Iterator, Sequence
from typing import Any

try:
    import ctypes
except ImportError:  # a Python built without libffi: no prctl, so no filter
    ctypes = None  # type: ignore[assignment]

NOBODY = 65534
MAX_SOURCE = 20_000  # characters of code and tests together
MAX_DEPTH = 100  # nested nodes
MAX_ANSWER = 4096  # bytes of a child's answer
PATIENCE = 4  # a row's wall clock, in multiples of its limit: other processes may have the processor
MAX_REASON = 300  # characters
NO_RESULT = "ended without a result"  # begins the reason of a row whose process died


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Guard 1, the allow-list: nodes, builtins and methods that are not named here are refused.
NODES = _words(
    """Module Expr Assign AugAssign AnnAssign Delete Assert Raise Return Pass Break Continue If For While Try
    ExceptHandler FunctionDef Lambda arguments arg keyword Nonlocal Name Constant Attribute Subscript Slice Starred
    Call BinOp UnaryOp BoolOp Compare IfExp NamedExpr Tuple List Set Dict ListComp SetComp DictComp GeneratorExp
    comprehension Yield YieldFrom JoinedStr FormattedValue Load Store Del And Or Not Invert UAdd USub Add Sub Mult
    MatMult Div FloorDiv Mod Pow LShift RShift BitAnd BitOr BitXor Eq NotEq Lt LtE Gt GtE Is IsNot In NotIn"""
)
BUILTINS = _words(
    """abs all any ascii bin bool callable chr complex dict divmod enumerate filter float frozenset hash hex int
    isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice sorted
    str sum tuple zip ArithmeticError AssertionError AttributeError Exception IndexError KeyError LookupError
    NameError NotImplementedError OverflowError RecursionError RuntimeError StopIteration TypeError UnboundLocalError
    ValueError ZeroDivisionError"""
)
METHODS = _words(  # without str.format and format_map, which read attributes, and encode, which imports codecs
    """capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip maketrans partition
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip
    swapcase title translate upper zfill append clear copy extend insert pop remove reverse sort fromkeys get items
    keys popitem setdefault update values add difference difference_update discard intersection intersection_update
    isdisjoint issubset issuperset symmetric_difference symmetric_difference_update union as_integer_ratio bit_count
    bit_length conjugate denominator fromhex imag is_integer numerator real"""
)
_CONSTANTS = (str, int, float, complex, bool, type(None), type(...))
_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*")

# Numbers of system calls on x86_64 and aarch64 (None: it does not exist). Behind guard 1 all others are refused.
_PURE = {
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "futex": (202, 98), "clock_gettime": (228, 113), "getrandom": (318, 278),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
# In bubblewrap these are refused: starting processes and programs, namespaces, access to other processes (the parent
# runs the next rows), memory that no limit counts or that outlives its process, rarely used parts of the kernel, and
# sockets of every family: namespaces do not cover them all (AF_VSOCK reaches the host of a virtual machine).
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "socket": (41, 198), "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30),
}  # fmt: skip
_SOCKETPAIR = (53, 199)  # allowed in bubblewrap for AF_UNIX: two ends in one process, which asyncio needs
_AF_UNIX = 1
_WRITE = (1, 64)
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_MACHINES = ("x86_64", "aarch64")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: set for every class that Python code makes


def refusal(trees: Sequence[ast.AST]) -> str | None:
    """Why syntax trees, of code and its tests with shared names, do not pass the allow-list; None if they pass."""
    nodes = list(_walk(trees))
    bound = set()
    for node, _ in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ExceptHandler):
            bound.add(node.name or "")
    for node, depth in nodes:
        kind = type(node).__name__
        if kind not in NODES:
            return f"{kind} is not on the allow-list"
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH}"
        if isinstance(node, ast.Constant):
            if type(node.value) not in _CONSTANTS:
                return f"a {type(node.value).__name__} literal is not on the allow-list"
            continue
        if isinstance(node, ast.Attribute):
            if node.attr not in METHODS or not isinstance(node.ctx, ast.Load):
                return f"the attribute {node.attr} is not on the allow-list"
            continue
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            return "decorators are not on the allow-list"
        if isinstance(node, ast.Name) and hasattr(builtins, node.id) and node.id not in BUILTINS | bound:
            return f"the builtin {node.id} is not on the allow-list"
        for name in _strings(node):  # all other text in a node is an identifier
            if not _IDENTIFIER.fullmatch(name):
                return f"the name {name} is not on the allow-list"
    return None


def _walk(trees: Sequence[ast.AST]) -> Iterator[tuple[ast.AST, int]]:
    """All nodes with their depth, without recursion, which generated code could exhaust."""
    waiting = [(tree, 0) for tree in trees]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        waiting += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _strings(node: ast.AST) -> Iterator[str]:
    for _, value in ast.iter_fields(node):
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def judge(code: str, tests: Sequence[str], listed: bool) -> tuple[str, str]:
    """Run the code, then its tests. Returns the outcome ("passed", "failed", "error" or "refused") and the reason.

    Args:
        listed: run only code that passes the allow-list, with the builtins listed there; else run any code.
    """
    if listed and len(code) + sum(map(len, tests)) > MAX_SOURCE:
        return "refused", f"longer than {MAX_SOURCE} characters"
    try:
        tree, checks = ast.parse(code), [ast.parse(test) for test in tests]
    except Exception as error:  # SyntaxError, ValueError, RecursionError, MemoryError ...
        return "error", _describe(error)
    if not any(isinstance(node, ast.Assert) for check in checks for node in ast.walk(check)):
        return "error", "no test asserts anything"
    if listed and (reason := refusal([tree, *checks])):
        return "refused", reason
    known, given = _builtins(listed)
    if not listed:
        checks = [_Guarded(check).result for check in checks]
        # Own modules, so that "import builtins" or "import __main__" gives no access to this program's.
        sys.modules.update(builtins=given, __main__=types.ModuleType("__main__"))
    namespace = {"__builtins__": given, "__name__": "snippet"}
    # The tests have their own builtins. A builtin that they use must not be rebound by the code.
    scope = {"__builtins__": known, "__name__": "tests", _Guarded.NAME: _own}
    used = {node.id for check in checks for node in ast.walk(check) if isinstance(node, ast.Name)} & known.keys()
    try:
        program, *asserts = (compile(part, "<row>", "exec", dont_inherit=True) for part in (tree, *checks))
        exec(program, namespace)
    except BaseException as error:
        return "error", _describe(error)
    if used := used & namespace.keys():
        return "failed", f"the code rebinds {', '.join(sorted(used))}, which its tests use"
    scope = namespace | scope
    for compiled, test in zip(asserts, tests, strict=True):
        try:
            exec(compiled, scope)
        except AssertionError as error:
            return "failed", f"{test} {error}".strip()
        except BaseException as error:
            return "error", f"{test}: {_describe(error)}"
    return "passed", ""


@functools.cache
def _builtins(listed: bool) -> tuple[dict[str, Any], Any]:
    """The builtins of the tests, and those of the code, which may change its own."""
    known = dict(vars(builtins))
    if listed:
        known = {name: known[name] for name in BUILTINS} | {"print": lambda *values, **options: None}
        return known, dict(known)
    given = types.ModuleType("builtins")
    vars(given).update(known)
    return known, given


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON]


class _Guarded(ast.NodeTransformer):
    """Rewrites tests so that no operator, truth test or builtin accepts an object of a class that the code defined.

    Such an object could claim to be equal to anything. Needed in bubblewrap only: the allow-list has no classes.
    """

    NAME = "__own__"

    def __init__(self, check: ast.Module) -> None:
        # Expressions that are only called, assigned, passed to the code, or have an attribute read.
        self.free: set[ast.AST | None] = set()
        for node in ast.walk(check):
            if isinstance(node, ast.Call):
                self.free.add(node.func)
                if not (isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id)):
                    self.free.update(node.args, (keyword.value for keyword in node.keywords))
            elif isinstance(node, ast.Attribute | ast.Assign):
                self.free.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                self.free.update(node.values)
            elif isinstance(node, ast.FormattedValue):
                self.free.add(node.format_spec)
        self.result = ast.fix_missing_locations(self.visit(check))

    def visit(self, node: ast.AST) -> Any:
        """Wrap every expression that is read and not free in a call of ``_own``."""
        self.generic_visit(node)
        if not isinstance(node, ast.expr) or isinstance(node, ast.Starred | ast.Slice) or node in self.free:
            return node
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return node
        return ast.Call(func=ast.Name(id=self.NAME, ctx=ast.Load()), args=[node], keywords=[])


def _own(value: Any) -> Any:
    """The value itself, if its class and those of its items are builtin or defined in an imported module.

    Raises:
        AssertionError: a class was defined by the code.
    """
    kind = type(value)
    if type.__dict__["__flags__"].__get__(kind) & _HEAPTYPE:
        home = sys.modules.get(str(type.__getattribute__(kind, "__module__")))
        if vars(home).get(kind.__qualname__) is not kind if home else True:
            raise AssertionError(f"uses an object of the class {kind.__qualname__}, which the code defined")
    if isinstance(value, dict):
        _own([*dict.keys(value), *dict.values(value)])
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _own(item)
    return value


def confine(memory_bytes: int, seconds: float, report: int, listed: bool) -> None:
    """Give up irrevocably what a row does not need.

    Args:
        report: the only descriptor that can still be written to.
        listed: whether the code passed the allow-list; the filter of system calls is stricter then.
    """
    for limit, value in (
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0 if listed else 64),
        (resource.RLIMIT_NPROC, 0),  # does not bind root, hence drop_root and the filter
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    program = _system_call_filter(report, listed)
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1) and program:
        _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program[0]))


@functools.cache
def _find_prctl() -> Any:
    """prctl(2); None without ctypes, or elsewhere than on Linux."""
    call = getattr(ctypes.CDLL(None), "prctl", None) if ctypes else None
    if call is not None:  # a child that made objects of c_ulong would copy the memory of a hundred others
        call.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return call


def _prctl(option: int, *arguments: int) -> bool:
    """Call prctl(2). Returns whether it succeeded."""
    if (call := _find_prctl()) is None:
        return False
    return bool(call(option, *(*arguments, 0, 0, 0, 0)[:4]) == 0)


@functools.cache
def _system_call_filter(report: int, listed: bool) -> tuple[Any, Any] | None:
    """A seccomp filter that answers refused system calls with EPERM (see seccomp(2) and linux/filter.h).

    Returns:
        Its header, and the code that the header has the address of; None where there is no filter.
    """
    if not ctypes or sys.platform != "linux" or os.uname().machine not in _MACHINES or struct.calcsize("P") != 8:
        return None
    column = _MACHINES.index(os.uname().machine)
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # (code, jump if true, jump if false, value)
    allow, refuse = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)
    number, architecture, first_argument = (load, 0, 0, 0), (load, 0, 0, 4), (load, 0, 0, 16)
    program = [architecture, (equal, 1, 0, _AUDIT_ARCH[column]), refuse, number, (at_least, 0, 1, 0x40000000), refuse]
    for call in (_PURE if listed else _REFUSED).values():
        if (wanted := call[column]) is not None:
            program += [(equal, 0, 1, wanted), allow if listed else refuse]
    if listed:
        program += [(equal, 0, 3, _WRITE[column]), first_argument, (equal, 0, 1, report), allow, refuse]
    else:
        program += [(equal, 0, 3, _SOCKETPAIR[column]), first_argument, (equal, 1, 0, _AF_UNIX), refuse, allow]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    return ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code))), code


def drop_root() -> None:
    """Become the user nobody: limits on processes do not bind root, and nobody can read fewer files."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container without that user id
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)


def run_row(code: str, tests: Sequence[str], seconds: float, memory_bytes: int, listed: bool) -> tuple[str, str]:
    """Run one row in a forked child; only an answer that begins with this row's random token is accepted."""
    token = os.urandom(16).hex()
    reading, writing = os.pipe()
    parent = os.getpid()
    # Made here, once for all rows: each child would make them again, and copy the memory of what they refer to.
    _system_call_filter(writing, listed)
    _builtins(listed)
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(null, descriptor)
            os.closerange(3, writing)
            os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
            confine(memory_bytes, seconds, writing, listed)
            if os.getppid() == parent:
                write = os.write  # kept, because the code may patch the module
                outcome, reason = judge(code, tests, listed)
                write(writing, f"{token}{outcome}\n{reason[:MAX_REASON]}".encode(errors="replace"))
        finally:
            os._exit(1)
    os.close(writing)
    answer, ended = _read(reading, child, seconds)
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # not reaped yet, so its pid cannot be another process's
    _, status = os.waitpid(child, 0)
    if answer.startswith(token.encode()):
        outcome, _, reason = answer[len(token) :].decode(errors="replace").partition("\n")
        return outcome, reason
    if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout", f"not finished after {seconds:g} s"
    ending = os.waitstatus_to_exitcode(status)
    how = f"signal {-ending}" if ending < 0 else f"exit status {ending}"
    return "error", f"{NO_RESULT} ({how})"


def _processor_time(pid: int, elapsed: float) -> float:
    """Seconds of processor time that a child has had; on systems that do not tell, the time elapsed."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # Linux's clock of a process (clock_getcpuclockid)
    except OSError:
        return elapsed


def _read(descriptor: int, child: int, seconds: float) -> tuple[bytes, bool]:
    """Read a child's pipe until its end or more than MAX_ANSWER bytes.

    Returns:
        The bytes, and whether that came before the child had had its seconds of processor time, and PATIENCE times as
        many had elapsed.
    """
    begun = time.monotonic()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    answer = b""
    while len(answer) <= MAX_ANSWER:
        elapsed = time.monotonic() - begun
        left = min(seconds - _processor_time(child, elapsed), PATIENCE * seconds - elapsed)
        if left <= 0:
            return answer, False
        if not poll.poll(max(left, 0.01) * 1000):
            continue  # another process may have had the processor meanwhile
        part = os.read(descriptor, MAX_ANSWER)
        if not part:
            break
        answer += part
    return answer, True


def main() -> None:
    """Answer the request on stdin: {"rows", "listed", "seconds", "memory_bytes", "parent"}."""
    request = json.load(sys.stdin.buffer)
    drop_root()
    _prctl(_PR_SET_DUMPABLE, 0)  # a child cannot read its parent's memory
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if request["parent"] not in (None, os.getppid()):
        return
    limits = request["seconds"], request["memory_bytes"], request["listed"]
    gc.freeze()  # a collection in a child would copy the memory of everything that it looks at
    for code, tests in request["rows"]:
        sys.stdout.write(json.dumps(run_row(code, tests, *limits)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

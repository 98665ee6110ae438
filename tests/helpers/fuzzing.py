"""Fuzzing of what is read: files mutated with their structure in mind, and the limits of an example.

``FINETUNE_FUZZ_EXAMPLES=20000`` fuzzes for minutes, as ``make fuzz`` does; without it each test runs a few examples,
always the same.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

_GIVEN = int(os.environ.get("FINETUNE_FUZZ_EXAMPLES", "0"))
_SECONDS = 30.0  # an example that takes longer hangs
_MORE_BYTES = 3 << 30  # what an example may allocate beyond what the process has


def settings(few: int = 60, share: float = 1.0) -> Any:
    """Decorator: how many examples a test runs.

    Args:
        few: examples in `make test`.
        share: examples in `make fuzz`, as a share of FINETUNE_FUZZ_EXAMPLES; below 1 where an example is slow.
    """
    return hypothesis.settings(
        max_examples=max(few, int(_GIVEN * share)) if _GIVEN else few,
        deadline=None,
        derandomize=not _GIVEN,
        database=None,
        phases=[hypothesis.Phase.generate],  # shrinking takes minutes where an example writes files
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Hang(BaseException):
    """An example took too long. No Exception, so that no reader can catch it."""


_watched: list[Path] = []  # the folder of the example that runs, and after it what may be read beside it
_outside: list[str] = []  # files beside the folder that were opened


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        folder = str(_watched[0].parent)
        inside = any(f"{path}/".startswith(f"{allowed}/") for allowed in _watched)
        if f"{path}/".startswith(f"{folder}/") and not inside:
            _outside.append(path)


sys.addaudithook(_audit)


@contextmanager
def limits(folder: Path, *also: Path) -> Iterator[None]:
    """Around the reading of an example: it ends in time, with little memory, and opens no file beside its folder.

    Args:
        folder: what the example may read, of the folder above it.
        also: what it may read besides.
    """
    faulthandler.dump_traceback_later(3 * _SECONDS, exit=True)  # where a hang is not in Python
    handler = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + _MORE_BYTES, hard))
    _watched[:] = [folder, *also]
    _outside.clear()
    try:
        yield
    finally:
        _watched.clear()
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        faulthandler.cancel_dump_traceback_later()
    assert _outside == [], "files beside the folder were opened"


def _hang(number: int, frame: Any) -> None:
    raise Hang(f"an example took longer than {_SECONDS} s")


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmData in /proc/self/status")


# JSON texts that json.dumps does not write; a string with the number of one stands for it.
_RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "9" * 5000,
    "-" + "9" * 30,
    "1e5",
    "1.0",
    "-0",
    "0.1e-400",
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "0" + "}" * 100_000,
    "[" * 100_000,
    '"\\ud800"',
    '"\\u0000"',
    '"' + "x" * 5000 + '"',
    '"' + "../" * 20 + 'etc/hostname"',
    '"/dev/zero"',
    "{}",
    "[]",
    "01",
    "",
)
_MARK = "\ue000raw"
_VALUES = st.one_of(
    st.sampled_from(range(len(_RAW))).map(lambda index: f"{_MARK}{index};"),
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**9, 10**20, -(2**63)]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 5) | st.text(max_size=3) | st.none(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 5) | st.none(), max_size=2),
)
_KEYS = st.text(max_size=6) | st.sampled_from(["\ud800", "\0", "", "..", "/", "x" * 300, "__metadata__"])


class _Doubled(dict[str, Any]):
    """An object that has one of its keys twice in JSON."""

    def __init__(self, plain: dict[str, Any], twice: tuple[str, Any], in_front: bool):
        super().__init__(plain)
        self.twice, self.in_front = twice, in_front

    def __deepcopy__(self, memo: Any) -> _Doubled:
        return _Doubled(copy.deepcopy(dict(self), memo), copy.deepcopy(self.twice, memo), self.in_front)

    def items(self) -> Any:
        pairs = list(super().items())
        return [self.twice, *pairs] if self.in_front else [*pairs, self.twice]


def _containers(value: Any) -> list[Any]:
    """All objects and arrays of a JSON value that are not empty, itself included."""
    found, queue = [], [value]
    while queue:
        each = queue.pop(0)
        if isinstance(each, dict | list) and each:
            found.append(each)
            queue += [inner for inner in (each.values() if isinstance(each, dict) else each)][:60]
    return found


def _mutate(draw: Callable[[Any], Any], value: Any) -> Any:
    """A JSON value with one change, made in place where it is possible."""
    places = _containers(value)
    if not places or draw(st.integers(0, 30)) == 0:
        return draw(_VALUES)
    place = draw(st.sampled_from(places))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["value", "value", "near", "delete", "swap", "copy", "rename", "add", "twice"]))
    if kind == "value":
        place[key] = draw(_VALUES)
    elif kind == "near":
        place[key] = _near(draw, place[key])
    elif kind == "delete":
        del place[key]
    elif kind in ("swap", "copy"):
        other = draw(st.sampled_from(keys))
        place[key], place[other] = place[other], place[key] if kind == "swap" else place[other]
    elif isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]) if kind == "twice" else draw(_VALUES))
    elif kind == "rename":
        place[draw(_KEYS | st.just(f"{key} ") | st.just(key.upper()))] = place.pop(key)
    elif kind == "add":
        place[draw(_KEYS)] = draw(_VALUES)
    elif type(place) is dict:
        twice = (key, draw(_VALUES | st.just(place[key])))
        return _replaced(value, place, _Doubled(place, twice, draw(st.booleans())))
    return value


def _near(draw: Callable[[Any], Any], value: Any) -> Any:
    """A value of the same type that is a little different; of containers, the emptied one."""
    if isinstance(value, bool) or value is None:
        return draw(st.sampled_from([True, False, 0, 1, "true"]))
    if isinstance(value, int | float):
        return draw(
            st.sampled_from([value + 1, value - 1, -value, value * 2, float(value), str(value), value * 10**9])
        )
    if isinstance(value, str):
        return draw(st.sampled_from([value[:-1], f"{value} ", value.upper(), f"../{value}", f"{value}\0", ""]))
    return {} if isinstance(value, dict) else []


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if value is old:
        return new
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _replaced(value[key], old, new)
    elif isinstance(value, list):
        value[:] = [_replaced(inner, old, new) for inner in value]
    return value


def _dump(value: Any, indent: int | None = None) -> str:
    text = json.dumps(value, indent=indent, ensure_ascii=True)
    mark = json.dumps(_MARK)[1:-1]
    for index, raw in enumerate(_RAW):
        text = text.replace(f'"{mark}{index};"', raw)
    return text


_ENCODINGS = st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])


@st.composite
def mutated_bytes(draw: Callable[[Any], Any], content: bytes, most: int = 3) -> bytes:
    """Bytes with up to ``most`` changes: flipped, cut, inserted, repeated, emptied."""
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        end = draw(st.integers(place, min(len(content), place + 64)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "remove", "insert", "repeat", "empty", "append"]))
        if kind == "flip" and content:
            flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
            content = content[:place] + bytes([flipped]) + content[place + 1 :]
        elif kind == "set":
            content = content[:place] + draw(st.binary(max_size=8)) + content[end:]
        elif kind == "cut":
            content = content[:place]
        elif kind == "remove":
            content = content[:place] + content[end:]
        elif kind == "insert":
            content = content[:place] + draw(st.binary(max_size=16)) + content[place:]
        elif kind == "repeat":
            content = content[:end] + content[place:]
        elif kind == "empty":
            content = draw(st.sampled_from([b"", b"\n", b"\0" * 64, b"null", b"\xef\xbb\xbf", b"\xff\xfe"]))
        elif kind == "append":
            content += draw(st.sampled_from([b"\n", b"\0", b"{}", b"\xff", b"\r\n", b"x" * 100]))
    return content


@st.composite
def mutated_values(draw: Callable[[Any], Any], value: Any, most: int = 3) -> Any:
    """A JSON value with up to ``most`` changes. ``as_json`` writes it: it may hold what json.dumps does not know."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        value = _mutate(draw, value)
    return value


def as_json(value: Any) -> bytes:
    """A value of ``mutated_values`` as JSON, if it is JSON, in UTF-8."""
    return _dump(value).encode()


@st.composite
def mutated_json(draw: Callable[[Any], Any], value: Any, most: int = 3) -> bytes:
    """A JSON file with up to ``most`` changes of its values and keys, of its encoding, and of its bytes."""
    text = _dump(draw(mutated_values(value, most)), draw(st.sampled_from([None, 1])))
    content = text.encode(draw(_ENCODINGS), "replace")
    return bytes(draw(mutated_bytes(content, 2)) if draw(st.integers(0, 4)) == 0 else content)


# What may stand in place of a file.
PLACES = st.sampled_from(["file"] * 12 + ["absent", "folder", "loop", "dangling", "pipe", "device", "link"])


def put(path: Path, content: bytes, place: str = "file") -> None:
    """Write a file, or put something else in its place; whatever stood there is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if place == "file":
        path.write_bytes(content)
    elif place == "folder":
        path.mkdir()
    elif place == "loop":
        path.symlink_to(path.name)
    elif place == "dangling":
        path.symlink_to("nothing-is-there")
    elif place == "pipe":
        os.mkfifo(path)
    elif place == "device":
        path.symlink_to("/dev/zero")
    elif place == "link":  # to a whole file elsewhere, as in the hub's cache
        target = path.with_name(f".{path.name}.blob")
        target.write_bytes(content)
        path.symlink_to(target.name)


def check_message(error: Exception, *named: str) -> None:
    """An error is one sentence of bounded length on one line, and names what it is about.

    Args:
        named: of which the message has one.
    """
    message = str(error)
    assert any(name in message for name in named), f"{message!r} names none of {named}"
    assert len(message) < 2000, f"{len(message)} characters: {message[:3000]}"
    assert "\n" not in message, message

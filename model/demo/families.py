"""The grammar's tables: task families with their wordings, frames, and the names of functions and arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FRAMES = (
    "Write a function `{call}` that {task}.",
    "Write a Python function named {name} that takes {args} and {task}.",
    "Create a function {name} with the input {args} which {task}.",
    "Define `{call}`: it {task}.",
    "Implement {name}, which takes {args} and {task}.",
    "Code a function called {name} that {task}. Its input is {args}.",
    "With the input {args}, the function {name} {task}. Write it.",
    "Complete `def {call}:` so that it {task}.",
)
FUNCTIONS = (
    "solve", "compute", "apply", "process", "transform", "convert", "handle", "evaluate",
    "update", "build", "make", "run", "check", "calculate", "helper", "adjust",
    "get_result", "do_step", "run_task", "my_func", "find_answer", "make_value", "work_out", "run_rule",
)  # fmt: skip
ARGUMENTS = {
    "number": ("x", "n", "num", "number", "amount", "size"),
    "string": ("s", "text", "word", "string", "line", "label"),
    "list": ("elements", "values", "numbers", "data", "nums", "entries"),
    "dict": ("d", "table", "mapping", "record", "scores", "info"),
}
ARGUMENT_PAIRS = (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("one", "two"), ("p", "q"))

_NUMBERS = range(2, 50)
_SMALL = range(2, 10)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"  # no punctuation: a tokenizer would join it to the quotes around it
_WORDS = (
    "sun", "red", "box", "top", "end", "new", "old", "cat", "dog", "sea", "sky", "ice", "map", "pen", "name",
    "age", "price", "color", "city", "code", "speed", "page", "index", "team", "day", "rock", "wind", "fire", "gold",
    "blue", "cold", "hand", "road", "door", "book", "fish", "file", "time", "type", "user", "host", "path", "mode",
    "date", "left", "right", "size", "start", "test", "list",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One kind of task.

    Attributes:
        name: begins with the kind of its first argument: number, string, list or dict.
        wordings: verb phrases; {x} and {y} stand for the arguments, a parameter's name in braces for its value.
        body: the function's lines, a template with the same names.
        oracle: computes the right result from the arguments, then the parameters.
        inputs: computes from the parameters the argument tuples to test with, such that near misses fail.
        parameters: name -> possible values.
    """

    name: str
    wordings: tuple[str, str, str]
    body: str
    oracle: Callable[..., Any]
    inputs: Callable[..., Sequence[tuple[Any, ...]]]
    parameters: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def arguments(self) -> Sequence[tuple[str, ...]]:
        """The possible names of its argument, or of both its arguments."""
        if "{y}" in self.body:
            return ARGUMENT_PAIRS
        return [(name,) for name in ARGUMENTS[self.name.split("_")[0]]]


def _around(n: int) -> list[tuple[int]]:
    return [(n - 1,), (n,), (n + 1,), (n + 2,), (n + 60,)]


def _texts(n: int) -> list[tuple[str]]:
    return [(_LETTERS[: n + 3],), (_LETTERS[: n + 1],), ("",), (_LETTERS,)]


def _lists(n: int) -> list[tuple[list[int]]]:
    return [([n - 1, n, n + 1, n + 5],), ([],), ([n + 2, n - 2, n + 9, n, n + 4],)]


def _near_multiples(n: int) -> list[int]:
    """Numbers that n does not divide; every smaller divisor of n divides at least one of them."""
    return [n + n // prime for prime in (2, 3, 5, 7) if n % prime == 0] or [n + 1]


# fmt: off
FAMILIES = (
    Family("number_add", ("returns {x} plus {n}", "adds {n} to {x}", "returns the sum of {x} and {n}"),
           "return {x} + {n}", lambda x, n: x + n, _around, {"n": _NUMBERS}),
    Family("number_subtract", ("returns {x} minus {n}", "subtracts {n} from {x}", "returns {x} reduced by {n}"),
           "return {x} - {n}", lambda x, n: x - n, _around, {"n": _NUMBERS}),
    Family("number_multiply",
           ("returns {x} times {n}", "multiplies {x} by {n}", "returns the product of {x} and {n}"),
           "return {x} * {n}", lambda x, n: x * n, _around, {"n": _NUMBERS}),
    Family("number_above",
           ("checks whether {x} is greater than {n}", "tells whether {x} is above {n}",
            "returns True if {x} exceeds {n}"),
           "return {x} > {n}", lambda x, n: x > n, _around, {"n": _NUMBERS}),
    Family("number_divisible",
           ("checks whether {x} is divisible by {n}", "tells whether {x} is a multiple of {n}",
            "returns True if {n} divides {x}"),
           "return {x} % {n} == 0", lambda x, n: x // n * n == x,
           lambda n: [(n,), (2 * n,), *((x,) for x in _near_multiples(n))], {"n": _NUMBERS}),
    Family("number_at_most",
           ("limits {x} to at most {n}", "returns the smaller of {x} and {n}",
            "returns {x}, but never more than {n}"),
           "return min({x}, {n})", lambda x, n: x if x < n else n, _around, {"n": _NUMBERS}),
    Family("number_between",
           ("checks whether {x} is between {n} and {m} inclusive",
            "tells whether {x} is at least {n} and at most {m}", "returns True if {n} <= {x} <= {m} holds"),
           "return {n} <= {x} <= {m}", lambda x, n, m: x in range(n, m + 1),
           lambda n, m: [(n - 1,), (n,), (n + 1,), (m,), (m + 1,)], {"n": range(2, 25), "m": range(30, 50)}),
    Family("number_linear",
           ("multiplies {x} by {n} and adds {m}", "returns {n} times {x}, plus {m}",
            "scales {x} by {n} and then adds {m}"),
           "return {x} * {n} + {m}", lambda x, n, m: m + n * x,
           lambda n, m: [(0,), (1,), (5,), (-2,)], {"n": _NUMBERS, "m": _NUMBERS}),
    Family("number_difference", ("returns {x} minus {y}", "subtracts {y} from {x}", "returns {x} reduced by {y}"),
           "return {x} - {y}", lambda x, y: x - y, lambda: [(9, 4), (4, 9), (0, 7)]),

    Family("string_repeat",
           ("repeats {x} {n} times", "returns {x} written {n} times", "returns {n} copies of {x} in a row"),
           "return {x} * {n}", lambda x, n: "".join(x for _ in range(n)),
           lambda n: [("ab",), ("",), ("x",)], {"n": _SMALL}),
    Family("string_first",
           ("returns the first {n} characters of {x}", "keeps only the first {n} characters of {x}",
            "cuts {x} down to its first {n} characters"),
           "return {x}[:{n}]", lambda x, n: "".join(c for i, c in enumerate(x) if i < n), _texts, {"n": _SMALL}),
    Family("string_append",
           ('returns {x} followed by "{w}"', 'adds "{w}" to the end of {x}', 'puts "{w}" after {x}'),
           'return {x} + "{w}"', lambda x, w: f"{x}{w}", lambda w: [("green",), ("",), ("a b",)], {"w": _WORDS}),
    Family("string_prefix",
           ('returns "{w}" followed by {x}', 'adds "{w}" to the start of {x}', 'puts "{w}" before {x}'),
           'return "{w}" + {x}', lambda x, w: f"{w}{x}", lambda w: [("green",), ("",), ("a b",)], {"w": _WORDS}),
    Family("string_count",
           ('counts how often "{c}" occurs in {x}', 'returns the number of times "{c}" appears in {x}',
            'counts each "{c}" in {x}'),
           'return {x}.count("{c}")', lambda x, c: sum(letter == c for letter in x),
           lambda c: [(f"{c}{c}X{c}X",), ("",), (f"X{c}Y",), ("XYZ",)], {"c": _LETTERS}),
    Family("string_replace",
           ('replaces every "{c}" in {x} with "{d}"', 'changes each "{c}" in {x} to "{d}"',
            'returns {x} with each "{c}" turned into "{d}"'),
           'return {x}.replace("{c}", "{d}")', lambda x, c, d: "".join(d if letter == c else letter for letter in x),
           lambda c, d: [(f"{c}{d}{c}",), ("XYZ",), (f"{c}X{c}Y{d}",)], {"c": _LETTERS[::2], "d": _LETTERS[1::2]}),
    Family("string_split",
           ('splits {x} at every "{c}"', 'returns the parts of {x} between "{c}"',
            'divides {x} into a list at each "{c}"'),
           'return {x}.split("{c}")', lambda x, c: x.split(c),
           lambda c: [(f"X{c}Y{c}Z",), ("X",), (f"{c}X{c}{c}Y",)], {"c": _LETTERS}),
    Family("string_starts",
           ('checks whether {x} starts with "{w}"', 'tells whether {x} begins with "{w}"',
            'returns True if "{w}" opens {x}'),
           'return {x}.startswith("{w}")', lambda x, w: x[: len(w)] == w,
           lambda w: [(f"{w}ny",), (f"a{w}",), (w,), (w[:-1],)], {"w": _WORDS}),
    Family("string_reverse",
           ("reverses {x}", "returns {x} backwards", "returns the characters of {x} in reverse order"),
           "return {x}[::-1]", lambda x: "".join(reversed(x)), lambda: [("abc",), ("",), ("on top",)]),

    Family("list_first",
           ("returns the first {n} items of {x}", "keeps only the first {n} items of {x}",
            "cuts {x} down to its first {n} items"),
           "return {x}[:{n}]", lambda x, n: [item for i, item in enumerate(x) if i < n],
           lambda n: [(list(range(n + 3)),), (list(range(n + 1, 0, -1)),), ([],)], {"n": _SMALL}),
    Family("list_item",
           ("returns the item of {x} at index {n}", "gets the item at index {n} of {x}", "looks up index {n} in {x}"),
           "return {x}[{n}]", lambda x, n: dict(enumerate(x))[n],
           lambda n: [(list(range(20, 23 + n)),), (list(range(n + 1, 0, -1)),), (list(_LETTERS[: n + 2]),)],
           {"n": _SMALL}),
    Family("list_above",
           ("returns the items of {x} that are greater than {n}", "keeps only the items of {x} above {n}",
            "filters {x} for the items that exceed {n}"),
           "return [item for item in {x} if item > {n}]", lambda x, n: list(filter(lambda item: item > n, x)),
           _lists, {"n": _NUMBERS}),
    Family("list_remove",
           ("removes every {n} from {x}", "returns {x} without any {n}", "drops the items of {x} that equal {n}"),
           "return [item for item in {x} if item != {n}]", lambda x, n: list(filter(lambda item: item != n, x)),
           _lists, {"n": _NUMBERS}),
    Family("list_add",
           ("adds {n} to every item of {x}", "returns each item of {x} plus {n}",
            "increases all items of {x} by {n}"),
           "return [item + {n} for item in {x}]", lambda x, n: list(map(lambda item: n + item, x)),
           lambda n: [([1, 2, 3],), ([],), ([10, -4],)], {"n": _NUMBERS}),
    Family("list_count_above",
           ("counts the items of {x} that are greater than {n}", "returns how many items of {x} are above {n}",
            "returns the number of items of {x} that exceed {n}"),
           "count = 0\nfor item in {x}:\n    if item > {n}:\n        count += 1\nreturn count",
           lambda x, n: sum(item > n for item in x), _lists, {"n": _NUMBERS}),
    Family("list_sum_divisible",
           ("adds up the items of {x} that are divisible by {n}",
            "returns the sum of the items of {x} that {n} divides", "sums all multiples of {n} in {x}"),
           "total = 0\nfor item in {x}:\n    if item % {n} == 0:\n        total += item\nreturn total",
           lambda x, n: sum(item for item in x if item // n * n == item),
           lambda n: [([n, n + 1, 2 * n],), ([],), ([*_near_multiples(n), 3 * n],)], {"n": _NUMBERS}),
    Family("list_concatenate",
           ("returns {x} followed by {y}", "adds the items of {y} to the end of {x}", "puts {y} after {x}"),
           "return {x} + {y}", lambda x, y: [*x, *y], lambda: [([1, 2], [3]), ([], [5]), ([7], [])]),
    Family("list_descending",
           ("sorts {x} in descending order", "sorts {x} from largest to smallest",
            "returns the items of {x}, largest first"),
           "return sorted({x}, reverse=True)", lambda x: sorted(x)[::-1],
           lambda: [([3, 1, 2],), ([],), ([5, 9, 9, -1],)]),

    Family("dict_get",
           ('returns the value of "{k}" in {x}, or {n} if it is missing',
            'looks up "{k}" in {x} with the default {n}', 'gets "{k}" from {x}, and {n} without such a key'),
           'return {x}.get("{k}", {n})', lambda x, k, n: next((x[key] for key in x if key == k), n),
           lambda k, n: [({k: n + 1},), ({},), ({"other": 4},), ({k: 0, "other": 1},)],
           {"k": _WORDS, "n": _NUMBERS}),
    Family("dict_has",
           ('checks whether {x} has the key "{k}"', 'tells whether "{k}" is in {x}',
            'returns True if "{k}" is a key of {x}'),
           'return "{k}" in {x}', lambda x, k: any(key == k for key in x),
           lambda k: [({k: 1},), ({},), ({"other": k},), ({"other": 2, k: 0},)], {"k": _WORDS}),
    Family("dict_set",
           ('sets "{k}" to {n} in {x} and returns {x}', 'stores {n} under "{k}" in {x} and returns {x}',
            'returns {x} with "{k}" set to {n}'),
           '{x}["{k}"] = {n}\nreturn {x}', lambda x, k, n: {**x, k: n},
           lambda k, n: [({},), ({k: 5},), ({"other": 1},)], {"k": _WORDS, "n": _NUMBERS}),
    Family("dict_increase",
           ('adds {n} to "{k}" in {x}, or to 0 if it is missing, and returns {x}',
            'increases "{k}" in {x} by {n}, from 0 if it is missing, and returns {x}',
            'returns {x} with {n} added to "{k}", which is 0 if it is missing'),
           '{x}["{k}"] = {x}.get("{k}", 0) + {n}\nreturn {x}', lambda x, k, n: {**x, k: n + {k: 0, **x}[k]},
           lambda k, n: [({},), ({k: 5},), ({"other": 1, k: -2},)], {"k": _WORDS, "n": _NUMBERS}),
    Family("dict_sum",
           ('returns the sum of "{k}" and "{j}" in {x}', 'adds the values of "{k}" and "{j}" in {x}',
            'returns "{k}" plus "{j}" from {x}'),
           'return {x}["{k}"] + {x}["{j}"]', lambda x, k, j: sum(value for key, value in x.items() if key in (k, j)),
           lambda k, j: [({k: 2, j: 3},), ({k: 10, j: -4, "other": 7},), ({"other": 1, j: 6, k: 0},)],
           {"k": _WORDS[::2], "j": _WORDS[1::2]}),
    Family("dict_without",
           ('removes the key "{k}" from {x}', 'returns {x} without the key "{k}"', 'drops the entry "{k}" of {x}'),
           'return {{key: value for key, value in {x}.items() if key != "{k}"}}',
           lambda x, k: dict(pair for pair in x.items() if pair[0] != k),
           lambda k: [({k: 1, "other": 2},), ({},), ({"one": 1, "two": 2},)], {"k": _WORDS}),
    Family("dict_above",
           ("returns the entries of {x} with a value greater than {n}",
            "keeps only the entries of {x} with a value above {n}",
            "filters {x} for the entries whose value exceeds {n}"),
           "return {{key: value for key, value in {x}.items() if value > {n}}}",
           lambda x, n: dict(pair for pair in x.items() if pair[1] > n),
           lambda n: [({"a": n - 1, "b": n, "c": n + 1},), ({},), ({"k": n + 7, "m": n - 2},)], {"n": _NUMBERS}),
    Family("dict_multiply",
           ("multiplies every value of {x} by {n}", "returns {x} with each value times {n}",
            "scales all values of {x} by {n}"),
           "return {{key: value * {n} for key, value in {x}.items()}}",
           lambda x, n: dict(zip(x, (n * value for value in x.values()), strict=True)),
           lambda n: [({"a": 1, "b": 2},), ({},), ({"k": -4, "m": 10},)], {"n": _NUMBERS}),
    Family("dict_merge",
           ("merges {y} into {x} and returns {x}", "updates {x} with {y} and returns {x}",
            "returns {x} updated with {y}"),
           "{x}.update({y})\nreturn {x}", lambda x, y: {**x, **y},
           lambda: [({"a": 1}, {"b": 2}), ({"a": 1, "b": 2}, {"b": 3}), ({}, {"k": 4})]),
)
# fmt: on

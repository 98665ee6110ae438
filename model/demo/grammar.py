"""The project's own instruction set: short Python tasks from a small grammar, with assertions for every answer.

A row is one choice on each of four axes:

- a *family*, such as ``number_add``: what to do, in three wordings, and the code that does it;
- its *parameters*: numbers, letters or words that prompt and completion share;
- a *phrasing*: one of the family's wordings inside one of the frames that all families share;
- *names*: of the function, which says nothing about the task, and of its arguments.

A test row is new on three axes at once, so that no training row remembered answers it:

- *phrasing*: 6 of a family's 24 combinations of wording and frame are in test only. Training has each wording in
  six other frames, and each frame around at least two other wordings of the family. No wording is held out as a
  whole: that "tells whether" means ``>`` or ``in`` has to be seen once;
- *parameters*: a fifth of a family's values (or of their combinations) is in test only, while other families train
  with the same numbers and words: the answer is to be copied from the prompt;
- *names*: a sixth of the pairs of function and argument names is in test only, in all families alike, while each
  of the two is trained with other partners.

The few families without parameters are new in phrasing and names. So no prompt and no combination of task,
parameter values and phrasing is in both splits, yet every piece of a test row is somewhere in training: the split
measures whether pieces are recombined and the prompt is followed, not whether unknown words are guessed.

Completions use builtins and methods of builtin types only. Expected values come from a family's ``oracle``, never
from running its code, so that the two check one another. All is a function of the seed, and only
``random.Random.random`` is drawn from, whose sequence Python promises to keep.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

TRAIN_ROWS = 100  # of each family
TEST_ROWS = 9
_HELD_OUT_PARAMETERS = 5  # one in so many parameter values is test
_HELD_OUT_NAMES = 6  # one in so many pairs of names is test

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

_T = TypeVar("_T")


@dataclass(frozen=True)
class Family:
    """One kind of task.

    Attributes:
        name: begins with the kind of its first argument: number, string, list or dict.
        wordings: verb phrases with {x} (and {y}) the arguments and the parameters' names in braces.
        body: the function's lines, as a template over the same names.
        oracle: the right result, of the arguments and then the parameters.
        inputs: the argument tuples to test with, chosen by the parameters so that near misses fail.
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
        """The names that its argument, or its two, may have."""
        if "{y}" in self.body:
            return ARGUMENT_PAIRS
        return [(name,) for name in ARGUMENTS[self.name.split("_")[0]]]


@dataclass(frozen=True)
class Example:
    """One choice on each axis, and the row that it makes.

    Attributes:
        family: what is asked.
        parameters: values in the order of ``family.parameters``.
        wording: index into ``family.wordings``.
        frame: index into FRAMES.
        function: name of the function.
        arguments: names of its arguments.
    """

    family: Family
    parameters: tuple[Any, ...]
    wording: int
    frame: int
    function: str
    arguments: tuple[str, ...]

    def _fill(self, template: str) -> str:
        names = dict(zip("xy", self.arguments, strict=False))
        return template.format(**names, **dict(zip(self.family.parameters, self.parameters, strict=True)))

    @property
    def call(self) -> str:
        """The function's signature."""
        return f"{self.function}({', '.join(self.arguments)})"

    @property
    def prompt(self) -> str:
        """What is asked, naming function and arguments."""
        task = self._fill(self.family.wordings[self.wording])
        return FRAMES[self.frame].format(
            call=self.call, name=self.function, args=" and ".join(self.arguments), task=task
        )

    @property
    def completion(self) -> str:
        """The reference answer."""
        lines = self._fill(self.family.body).split("\n")
        return "\n".join([f"def {self.call}:", *(f"    {line}" for line in lines)])

    @property
    def tests(self) -> list[str]:
        """Assertions that a right answer passes; near misses fail at least one."""
        tests = []
        for values in self.family.inputs(*self.parameters):
            call = f"{self.function}({', '.join(map(repr, values))})"
            expected = self.family.oracle(*values, *self.parameters)
            tests.append(f"assert {call} {'is' if isinstance(expected, bool) else '=='} {expected!r}")
        return tests

    def row(self) -> dict[str, Any]:
        """The row of the data set."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "tests": self.tests,
            "family": self.family.name,
        }


def _around(n: int) -> list[tuple[int]]:
    return [(n - 1,), (n,), (n + 1,), (n + 2,), (n + 60,)]


def _texts(n: int) -> list[tuple[str]]:
    return [(_LETTERS[: n + 3],), (_LETTERS[: n + 1],), ("",), (_LETTERS,)]


def _lists(n: int) -> list[tuple[list[int]]]:
    return [([n - 1, n, n + 1, n + 5],), ([],), ([n + 2, n - 2, n + 9, n, n + 4],)]


def _near_multiples(n: int) -> list[int]:
    """No multiples of n, but every smaller divisor of n divides one of them."""
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


def make_examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and test examples, which the rows are made from; every family equally often, in random order."""
    rng = random.Random(seed)
    train: list[Example] = []
    test: list[Example] = []
    for number, family in enumerate(FAMILIES):
        values = _shuffled(rng, list(itertools.product(*family.parameters.values())))
        cut = len(values) // _HELD_OUT_PARAMETERS
        # Without parameters there is one empty combination, which both splits have.
        train += _draw(rng, number, values[cut:], TRAIN_ROWS, held_out=False)
        test += _draw(rng, number, values[:cut] or values, TEST_ROWS, held_out=True)
    return _shuffled(rng, train), _shuffled(rng, test)


def make_rows(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows: ``prompt``, ``completion``, ``tests`` (assert statements) and ``family``."""
    train, test = make_examples(seed)
    return [example.row() for example in train], [example.row() for example in test]


def write_rows(directory: Path, seed: int = 0) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``; the directory is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "test"), make_rows(seed), strict=True):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_bytes(lines.encode())


def held_out_phrasing(family: int, wording: int, frame: int) -> bool:
    """Whether a family, by its place in FAMILIES, keeps a phrasing for test.

    Two frames of each wording are, no frame of two wordings, and over the families each frame about equally often.
    """
    return (family + 3 * wording + frame) % len(FRAMES) < 2


def held_out_names(function: int, argument: int) -> bool:
    """Whether a pair of names, by their places in their lists, is kept for test: a sixth of each name's."""
    return (function + argument) % _HELD_OUT_NAMES == 0


def _draw(
    rng: random.Random, number: int, values: Sequence[tuple[Any, ...]], count: int, held_out: bool
) -> Iterable[Example]:
    """Distinct examples of one family and split, its phrasings in turn and the rest at random."""
    family = FAMILIES[number]
    phrasings = [
        pair
        for pair in itertools.product(range(len(family.wordings)), range(len(FRAMES)))
        if held_out_phrasing(number, *pair) == held_out
    ]
    names = [
        (FUNCTIONS[i], family.arguments[j])
        for i, j in itertools.product(range(len(FUNCTIONS)), range(len(family.arguments)))
        if held_out_names(i, j) == held_out
    ]
    found: dict[str, Example] = {}
    while len(found) < count:
        phrasing = phrasings[len(found) % len(phrasings)]
        example = Example(family, _pick(rng, values), *phrasing, *_pick(rng, names))
        found.setdefault(example.prompt, example)
    return found.values()


def _pick(rng: random.Random, choices: Sequence[_T]) -> _T:
    return choices[int(rng.random() * len(choices))]


def _shuffled(rng: random.Random, things: Sequence[_T]) -> list[_T]:
    return sorted(things, key=lambda _: rng.random())

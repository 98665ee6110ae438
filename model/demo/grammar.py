"""The project's own instruction set: short Python tasks from a small grammar, with assertions for every answer.

A row is one choice on each of four axes:

- a *family*, such as ``number_add``: a task in three wordings, and the code that solves it;
- its *parameters*: numbers, letters or words that prompt and completion share;
- a *phrasing*: one of the family's wordings inside one of the frames that all families share;
- *names*: of the function, which says nothing about the task, and of its arguments.

A test row is new on three axes at once, so that no memorised training row answers it:

- *phrasing*: 6 of a family's 24 combinations of wording and frame are in test only. Training has each wording in
  six other frames, and each frame around at least two other wordings of the family. No wording is held out
  completely: a model cannot know that "tells whether" means ``>`` or ``in`` without having seen it once;
- *parameters*: a fifth of a family's values (or of their combinations) is in test only. Other families train with
  the same numbers and words, so the model has to copy them from the prompt;
- *names*: a sixth of the pairs of function and argument names is in test only, in all families alike, while each
  name of such a pair is trained with other partners.

The few families without parameters are new in phrasing and names. So no prompt and no combination of task,
parameter values and phrasing is in both splits, but every part of a test row occurs in training: the split measures
whether the model recombines parts and follows the prompt, not whether it guesses unknown words.

Completions use builtins and methods of builtin types only. Expected values come from a family's ``oracle``, never
from running its code, so that the two check each other. The rows depend on the seed alone. All random numbers come
from ``random.Random.random``, whose sequence Python guarantees across versions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from model.demo import families
from model.demo.families import FAMILIES, FRAMES, FUNCTIONS, Family

TRAIN_ROWS = 100  # of each family
TEST_ROWS = 9
_HELD_OUT_PARAMETERS = 5  # one of this many parameter values is in test only
_HELD_OUT_NAMES = 6  # one of this many pairs of names is in test only

_T = TypeVar("_T")


@dataclass(frozen=True)
class Example:
    """One choice on each axis, and its row.

    Attributes:
        family: the task.
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
        """The request, with the names of function and arguments."""
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


def make_examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and test examples; every family has the same number, in random order."""
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


def code_sha256() -> str:
    """The sha256 in hex of the code that makes the rows: this file and the tables."""
    sources = (Path(__file__), Path(families.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def held_out_phrasing(family: int, wording: int, frame: int) -> bool:
    """Whether a phrasing of a family is in test only.

    Each wording is held out in two frames, each frame with at most one wording; over all families, every frame is
    held out about equally often.

    Args:
        family: index into FAMILIES.
        wording: index into the family's wordings.
        frame: index into FRAMES.
    """
    return (family + 3 * wording + frame) % len(FRAMES) < 2


def held_out_names(function: int, argument: int) -> bool:
    """Whether a pair of names is in test only: a sixth of the pairs of every name.

    Args:
        function: index into FUNCTIONS.
        argument: index into the family's argument names.
    """
    return (function + argument) % _HELD_OUT_NAMES == 0


def _draw(
    rng: random.Random, number: int, values: Sequence[tuple[Any, ...]], count: int, held_out: bool
) -> Iterable[Example]:
    """Distinct examples of one family and split: phrasings in turn, parameters and names at random.

    Args:
        number: of the family in FAMILIES.
        values: combinations of parameters to draw from.
        count: number of examples.
        held_out: draw from the phrasings and names of test, else from those of train.
    """
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

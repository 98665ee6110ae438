"""The instruction set: what test holds out, reference answers that pass, near misses that fail."""

from __future__ import annotations

import ast
import builtins
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer

from model.data.formats import read_records
from model.data.layout import find_splits
from model.data.rows import prompt_key
from model.data.schemas import normalize_row
from model.demo.families import ARGUMENT_PAIRS, ARGUMENTS, FAMILIES, FRAMES, FUNCTIONS, Family
from model.demo.grammar import TEST_ROWS, TRAIN_ROWS, Example, code_sha256, make_examples, make_rows, write_rows
from model.files import sha256_json
from model.net.prompt import format_prompt

TRAIN, TEST = make_examples()
ROWS_SHA256 = "b58daad91e0fe58ab8dcab6ed215cf3b1167c49062249a08a381fd7e7495ea3b"
METHODS = {"count", "get", "items", "replace", "split", "startswith", "update"}
# Operators that a model might write by mistake.
OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add, ast.FloorDiv),
    ast.Mult: (ast.Add, ast.Pow),
    ast.Mod: (ast.FloorDiv, ast.Mult),
    ast.Gt: (ast.GtE, ast.Lt, ast.LtE),
    ast.LtE: (ast.Lt, ast.Gt, ast.GtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
}


def passes(completion: str, tests: list[str]) -> bool:
    """Whether a completion of the grammar passes assertions."""
    scope: dict[str, Any] = {}
    try:
        exec("\n".join([completion, *tests]), scope)
    except Exception:
        return False
    return True


def of_family(family: Family, examples: list[Example]) -> list[Example]:
    return [example for example in examples if example.family is family]


def phrasing(example: Example) -> tuple[str, int, int]:
    return example.family.name, example.wording, example.frame


def names(example: Example) -> tuple[str, tuple[str, ...]]:
    return example.function, example.arguments


def test_rows_are_fixed(tmp_path: Path) -> None:
    """Rows are the same on every machine and in every version; another seed gives other rows."""
    rows = make_rows()
    assert rows == make_rows() == ([e.row() for e in TRAIN], [e.row() for e in TEST])
    assert sha256_json(rows) == ROWS_SHA256
    assert make_rows(seed=1) != rows
    write_rows(tmp_path / "rows")
    splits = find_splits(tmp_path / "rows")
    assert [list(read_records(path)) for split in ("train", "test") for path in splits[split]] == list(rows)
    assert sorted(splits) == ["test", "train"]


def test_code_sha256_covers_tables_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of either file gives another folder of rows."""
    before = code_sha256()
    copy = tmp_path / "copy.py"
    for module in ("model.demo.grammar", "model.demo.families"):
        with monkeypatch.context() as patch:
            source = Path(sys.modules[module].__file__ or "")
            copy.write_bytes(source.read_bytes())
            patch.setattr(f"{module}.__file__", str(copy))
            assert code_sha256() == before
            copy.write_bytes(source.read_bytes() + b"\n")
            assert code_sha256() != before


def test_counts_and_columns() -> None:
    """Enough rows, every family equally often, columns as documented and accepted by the row reader."""
    train, test = make_rows()
    assert len(train) >= 3000
    assert 300 <= len(test) <= 400
    assert 30 <= len(FAMILIES) <= 45
    assert Counter(row["family"] for row in train) == dict.fromkeys((f.name for f in FAMILIES), TRAIN_ROWS)
    assert Counter(row["family"] for row in test) == dict.fromkeys((f.name for f in FAMILIES), TEST_ROWS)
    assert {family.name.split("_")[0] for family in FAMILIES} == {"number", "string", "list", "dict"}
    for row in train + test:
        assert list(row) == ["prompt", "completion", "tests", "family"]
        assert normalize_row(row).items() <= row.items()
        assert 2 <= len(row["completion"].splitlines()) <= 6
        assert 3 <= len(row["tests"]) <= 5


def test_names_and_wordings_are_distinct() -> None:
    """No frame, name or wording occurs twice, and no name shadows a builtin or a variable of the code."""
    arguments = [name for kind in ARGUMENTS.values() for name in kind]
    assert len(set(arguments)) == len(arguments)
    for group in (FRAMES, FUNCTIONS, ARGUMENT_PAIRS, [f.name for f in FAMILIES]):
        assert len(set(group)) == len(group)
    taken = {*dir(builtins), "item", "key", "value", "count", "total"}
    assert not taken & {*arguments, *FUNCTIONS, *itertools.chain(*ARGUMENT_PAIRS)}
    wordings = Counter(
        (wording, "{y}" in family.body, family.arguments[0])
        for family in FAMILIES
        for wording in family.wordings
        if "{y}" not in wording
    )
    assert set(wordings.values()) == {1}  # a wording belongs to one family


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_are_disjoint(seed: int) -> None:
    """No prompt is in both splits; nor is, within a family, a phrasing, a pair of names or a set of parameters."""
    train, test = make_examples(seed)
    prompts = {prompt_key(example.prompt) for example in train + test}
    assert len(prompts) == len(train) + len(test)  # no prompt twice, whatever its case and spacing
    for key in (
        lambda e: (phrasing(e), e.parameters),
        phrasing,
        names,
        lambda e: (e.family.name, e.parameters or e.prompt),
    ):
        assert not {key(e) for e in train} & {key(e) for e in test}, key


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_has_every_piece_of_the_test_rows(seed: int) -> None:
    """Each wording and frame of a family, each name and each parameter value of a test row occurs in training."""
    train, test = make_examples(seed)
    for part in (
        lambda e: {(e.family.name, e.wording)},
        lambda e: {(e.family.name, e.frame)},
        lambda e: {e.function},
        lambda e: {(e.family.name.split("_")[0], e.arguments)},
        lambda e: set(e.parameters),
    ):
        assert set.union(*map(part, test)) <= set.union(*map(part, train))
    assert {e.frame for e in test} == set(range(len(FRAMES)))
    assert {(e.family.name, e.wording) for e in test} == {(f.name, w) for f in FAMILIES for w in range(3)}


def test_prompts_name_all_that_the_tests_need() -> None:
    """The prompt contains function name, argument names and parameter values."""
    for example in TRAIN + TEST:
        prompt = example.prompt
        assert "{" not in prompt
        words = "".join(c if c.isalnum() or c == "_" else " " for c in prompt).split()
        assert {example.function, *example.arguments} <= set(words), prompt
        for value in example.parameters:
            assert str(value) in words if isinstance(value, int) else f'"{value}"' in prompt


def test_references_pass_their_tests() -> None:
    """The code and the oracle of every row agree."""
    for row in itertools.chain(*make_rows()):
        assert passes(row["completion"], row["tests"]), row


def test_completions_and_tests_use_builtins_only() -> None:
    """No imports, no attributes except methods of builtin types; tests compare with literals."""
    for example in TRAIN + TEST:
        tree = ast.parse(example.completion)
        (function,) = tree.body
        assert isinstance(function, ast.FunctionDef)
        assert [argument.arg for argument in function.args.args] == list(example.arguments)
        nodes = list(ast.walk(tree))
        assert not [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom | ast.While | ast.Lambda)]
        assert {n.attr for n in nodes if isinstance(n, ast.Attribute)} <= METHODS
        bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        used = {n.id for n in nodes if isinstance(n, ast.Name)} - bound - set(example.arguments)
        assert used <= {"min", "sorted"}
        for test in example.tests:
            (statement,) = ast.parse(test).body
            assert isinstance(statement, ast.Assert)
            comparison = statement.test
            assert isinstance(comparison, ast.Compare)
            call, (expected,) = comparison.left, comparison.comparators
            assert isinstance(call, ast.Call)
            assert isinstance(call.func, ast.Name)
            assert call.func.id == example.function
            for value in (*call.args, expected):
                ast.literal_eval(value)


def mutants(completion: str) -> Iterator[str]:
    """The completion with one operator replaced, one constant off, or its two arguments swapped."""
    tree = ast.parse(completion)

    def changed(node: Any, attribute: str, value: Any) -> str:
        old = getattr(node, attribute)
        setattr(node, attribute, value)
        text = ast.unparse(tree)
        setattr(node, attribute, old)
        return text

    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            for operator in OPERATORS[type(node.op)]:
                yield changed(node, "op", operator())
        elif isinstance(node, ast.Compare):
            for i, old in enumerate(node.ops):
                for operator in OPERATORS[type(old)]:
                    yield changed(node, "ops", [*node.ops[:i], operator(), *node.ops[i + 1 :]])
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield changed(node, "value", not node.value)
            elif isinstance(node.value, int):
                yield changed(node, "value", node.value + 1)
                yield changed(node, "value", node.value - 1)
            else:
                yield changed(node, "value", node.value + "q")
                yield changed(node, "value", node.value[:-1])
        elif isinstance(node, ast.arguments) and len(node.args) == 2:
            yield changed(node, "args", node.args[::-1])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_near_misses_fail(family: Family) -> None:
    """Another operator, a constant off by one, swapped arguments, no function, or a function that does nothing."""
    for example in of_family(family, TEST):
        wrong = [*mutants(example.completion), "", f"def {example.call}:\n    pass"]
        wrong.append(f"def {example.call}:\n    return {example.arguments[0]}")
        for completion in wrong:
            assert not passes(completion, example.tests), completion
        assert not passes(example.completion.replace(example.function, "other", 1), example.tests)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_other_parameters_and_other_families_fail(family: Family) -> None:
    """The answer to the same task with one other value, or to another task with the same names, fails."""
    for example in of_family(family, TEST)[::3]:
        for place, choices in enumerate(family.parameters.values()):
            for value in set(choices) - {example.parameters[place]}:
                parameters = (*example.parameters[:place], value, *example.parameters[place + 1 :])
                assert not passes(replace(example, parameters=parameters).completion, example.tests), parameters
        for other in TRAIN:
            if other.family is not family and other.family.arguments == family.arguments:
                answer = replace(other, function=example.function, arguments=example.arguments)
                if answer.completion != example.completion:  # strings and lists may share "a + b"
                    assert not passes(answer.completion, example.tests), (example, answer)


def test_examples_are_short() -> None:
    """With a byte-level BPE of 4,096 trained on the rows: at most 128 tokens, half of them at most 70."""
    rows = list(itertools.chain(*make_rows()))
    texts = [format_prompt(row) for row in rows]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<|endoftext|>"], show_progress=False)
    lengths = sorted(len(bpe.encode(text).ids) + 1 for text in texts)
    assert lengths[len(lengths) // 2] <= 70
    assert lengths[-1] <= 128

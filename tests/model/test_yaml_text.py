"""YAML: its value, or one error of one line, and soon."""

from __future__ import annotations

import pytest
import yaml

from model.yaml_text import parse_yaml


@pytest.mark.parametrize(
    "text", ["a: 1", "[1, 2.5, x, null, true]", "a: &a {b: 1}\nc: {<<: *a, b: 2, d: 3}", "", "x"]
)
def test_the_value_is_that_of_pyyaml(text: str) -> None:
    """Merge keys included: a key may be there again after a merge."""
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: 2001-99-99",
        "a: !!bool x",
        "a: !!int ''",
        "a: !!timestamp x",
        "a: =",
        "[" * 5000,
        "a: " + "9" * 5000,
        "a: !!python/object/apply:os.getcwd []",
        "? {a: b}\n: c",
        "&a [*a]",
        "a: &a {<<: *a}",
    ],
)
def test_what_is_no_yaml_is_one_error(text: str) -> None:
    """PyYAML raises KeyError, AttributeError, RecursionError and others for some of these."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # each has its own sentence
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["a: 1\na: 1", "{b: {a: 1, c: 2, a: 3}}", "a: &a {b: 1}\nc: {<<: *a, d: 2, d: 3}"])
def test_a_key_that_is_there_twice(text: str) -> None:
    """PyYAML takes the last value without a word."""
    with pytest.raises(ValueError, match=r"the key '[ad]' is there twice"):
        parse_yaml(text)


@pytest.mark.parametrize("line", ["a{}: &a{} {{<<: [*a{}, *a{}]}}", "a{}: &a{} {{x: *a{}, y: *a{}}}"])
def test_aliases_of_aliases_are_refused(line: str) -> None:
    """Each line doubles the one before: the value of 60 lines fills any memory once somebody merges or prints it."""
    lines = ["a0: &a0 {x: 1}", *(line.format(n, n, n - 1, n - 1) for n in range(1, 60))]
    with pytest.raises(ValueError, match="more than 100000 values"):
        parse_yaml("\n".join(lines))
    assert parse_yaml("\n".join(lines[:5])) == yaml.safe_load("\n".join(lines[:5]))

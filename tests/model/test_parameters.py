"""Parameters are read from the fields of their dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from model.parameters import Count, Parameters, Positive, Seed, Seeded, Share, internal, refusal_reason


@dataclass(frozen=True)
class _Example(Seeded):
    """A configuration of the test's own."""

    rate: float = 0.5
    """A rate that needs two lines
    to be described."""
    hidden: int = internal(3)


def test_declarations_are_read_from_the_fields() -> None:
    """Inherited ones too; internal fields are no parameters, and are not filled from outside."""
    assert [(each.name, each.default, each.meaning) for each in _Example.declared()] == [
        ("seed", 42, "Decides the order of rows, dropout and sampling."),
        ("rate", 0.5, "A rate that needs two lines to be described."),
    ]
    assert _Example.take({"rate": 0.1, "hidden": 9, "other": 1}) == _Example(rate=0.1)
    assert Parameters.declared() == ()


@pytest.mark.parametrize(
    ("annotation", "value", "said"),
    [
        (Count, 0, "at least 1 is needed, not 0"),
        (Count, "abc", "a whole number is needed, not 'abc'"),
        (Count, 1.5, "a whole number is needed, not 1.5"),
        (Count, None, "a whole number is needed, not null"),
        (Count, True, "a number is needed, not true or false"),
        (Share, 1, "less than 1 is needed, not 1"),
        (Positive, 0, "more than 0 is needed, not 0"),
        (Positive, float("nan"), "a finite number is needed, not nan"),
        (Seed, 2**32, "at most 4294967295 is needed, not 4294967296"),
        (bool, "maybe", "true or false is needed, not 'maybe'"),
        (Literal["a", "b"], "c", "'a' or 'b' is needed, not 'c'"),
        (Annotated[str, Field(pattern="^[ab]$")], "c", "'c' is none of these: a or b"),
        (Annotated[str, Field(min_length=1)], "", "a text is needed, not ''"),
        (dict[str, list[int]], 3, "a name with its values is needed, not 3"),
    ],
)
def test_why_a_value_is_refused(annotation: Any, value: Any, said: str) -> None:
    """In a sentence with what is needed and what was given, instead of pydantic's words."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(annotation).validate_python(value)
    assert refusal_reason(dict(caught.value.errors()[0]), "a or b.") == said

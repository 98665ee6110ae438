"""Parameters are read from the fields of their dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from model.parameters import Parameters, Seeded, internal


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

"""Parameters of the pipeline: each is declared once, as a dataclass field with default, bounds and meaning.

A configuration is a frozen dataclass that derives from ``Parameters``. A field's annotation carries its bounds, and
the string below the field says what it means, as in litgpt's ``args.py``. The flow's signature, its description on
Prefect's server and the table of the README are made from these fields (``flows/job.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

_INTERNAL = "internal"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the flow.

    Attributes:
        name: the name that users type.
        annotation: type with bounds.
        default: value if none is given.
        meaning: one sentence.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str


@dataclass(frozen=True)
class Parameters:
    """Base of all configurations. Values are checked by Prefect against the annotations, not here."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(use_attribute_docstrings=True)

    @classmethod
    def take(cls, values: Mapping[str, Any]) -> Self:
        """Fill the parameters by name from a mapping that may hold more."""
        names = [each.name for each in fields(cls) if not each.metadata.get(_INTERNAL)]
        return cls(**{name: values[name] for name in names if name in values})

    @classmethod
    @cache
    def declared(cls) -> tuple[Parameter, ...]:
        """The parameters among the fields, in their order; fields made by ``internal`` are left out."""
        hints = get_type_hints(cls, include_extras=True)
        meanings: dict[str, str] = {}
        for base in filter(is_dataclass, reversed(cls.__mro__)):  # pydantic reads the strings of one class at a time
            for name, described in TypeAdapter(base).json_schema().get("properties", {}).items():
                meanings[name] = described.get("description") or meanings.get(name, "")
        return tuple(
            Parameter(each.name, hints[each.name], each.default, " ".join(meanings[each.name].split()))
            for each in fields(cls)
            if not each.metadata.get(_INTERNAL)
        )


@dataclass(frozen=True)
class Seeded(Parameters):
    """A configuration that draws random numbers."""

    seed: WholeNumber = 42
    """Decides splits, order of rows, dropout and sampling."""


def internal(default: Any) -> Any:
    """A field that code sets and users do not: it is not a parameter of the flow."""
    return field(default=default, metadata={_INTERNAL: True})

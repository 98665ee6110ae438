"""Parameters of the pipeline: each is declared once, as a dataclass field with default, bounds and meaning.

A configuration is a frozen dataclass that derives from ``Parameters``. A field's annotation carries its bounds, and
the string below the field says what it means, as in litgpt's ``args.py``. The flow's signature, its description on
Prefect's server and the tables of docs/parameters.md are made from these fields (``flows/job.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from model.files import shown


def _no_truth(value: Any) -> Any:
    """Refuse true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


_NUMBER = BeforeValidator(_no_truth)
# Upper bounds are far above any sensible value. They refuse typing errors, and what databases cannot hold.
MOST = 10**8 - 1  # the number of a step has eight digits in a checkpoint's name
LARGEST = 1e6

Count = Annotated[int, Field(ge=1, le=MOST), _NUMBER]
WholeNumber = Annotated[int, Field(ge=0, le=MOST), _NUMBER]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), _NUMBER]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False), _NUMBER]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False), _NUMBER]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _NUMBER]
WholeShare = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _NUMBER]

_INTERNAL = "internal"
# By pydantic's type of an error, what is needed; its context has the bounds.
_NEEDED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:.15g}",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "string_too_short": "a text",
    "string_too_long": "a text of at most {max_length} characters",
    "literal_error": "{expected}",
    "list_type": "a list of values",
    "dict_type": "a name with its values",
}


def refusal_reason(detail: Mapping[str, Any], meaning: str = "") -> str:
    """Why a value is refused, of an entry of pydantic's errors: what is needed, and what was given.

    Args:
        meaning: of the parameter; it is shown where a pattern says what is allowed.
    """
    context = detail.get("ctx", {})
    if isinstance(own := context.get("error"), ValueError):
        return str(own)
    given = "null" if detail["input"] is None else shown(detail["input"])
    if detail["type"] == "string_pattern_mismatch" and meaning:
        return f"{given} is none of these: {meaning.rstrip('.')}"
    if detail["type"] not in _NEEDED:
        return str(detail["msg"])
    return f"{_NEEDED[detail['type']].format_map(context)} is needed, not {given}"


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

    seed: Seed = 42
    """Decides the order of rows, dropout and sampling."""


def internal(default: Any) -> Any:
    """A field that code sets and users do not: it is not a parameter of the flow."""
    return field(default=default, metadata={_INTERNAL: True})

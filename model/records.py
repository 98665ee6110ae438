"""What is read back from the disk is validated: a damaged record is refused by name, never taken on trust."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from model.files import read_bytes, unique_keys

T = TypeVar("T")


def parse_record(content: str | bytes, kind: type[T], what: str) -> T:
    """A JSON text as a value of a type, without conversions: 1.0 is no int, and "1" is no number.

    Args:
        content: JSON in UTF-8.
        kind: a pydantic model, or any type that pydantic can validate.
        what: begins the error message, such as a path.

    Raises:
        ValueError: the text is not JSON, not of that type, or has a key twice.
    """
    try:
        json.loads(content, object_pairs_hook=unique_keys)  # pydantic would take the last one
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is damaged: it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is damaged: {error}") from error
    try:
        return _adapter(cast(Any, kind)).validate_json(content, strict=True)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ValueError(f"{what} is damaged: {_explain(error)}") from error


def check_record(value: Any, kind: type[T], what: str) -> T:
    """A value that was read already, as ``parse_record`` returns it.

    Raises:
        ValueError: it is not of that type.
    """
    try:
        return _adapter(cast(Any, kind)).validate_python(value, strict=True)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ValueError(f"{what} is damaged: {_explain(error)}") from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What validates a type. Making it takes twenty times as long as reading a line of a journal."""
    return TypeAdapter(kind)


def read_record(path: Path, kind: type[T]) -> T:
    """The content of a JSON file as a value of a type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no file, or not of that type; the message names the file.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}") from error
    return parse_record(content, kind, str(path))


def _explain(error: ValidationError) -> str:
    """The first three complaints, each with the place in the record."""

    def place(complaint: Any) -> str:
        where = ".".join(str(part)[:100] for part in complaint["loc"])
        return f"{where}: {complaint['msg']}" if where else str(complaint["msg"])

    return "; ".join(place(complaint) for complaint in error.errors()[:3])

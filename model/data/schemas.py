"""Records of any schema in SCHEMAS, normalised to rows of prompt and completion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# Reasons for which a row cannot be used at all; the share of these is bounded by max_dropped_share.
UNUSABLE = (
    "invalid_json",
    "invalid_unicode",
    "not_an_object",
    "duplicate_field",
    "missing_field",
    "null_field",
    "not_a_string",
    "empty_field",
    "not_a_conversation",
    "tests_not_strings_in_a_list",
)
# Reasons that do not make a row unusable: longer than max_length, its prompt is also in a held-out split, or it is a
# conversation of more than one question and one answer.
PROMPT_TOO_LONG = "prompt_too_long"
IN_HELD_OUT = "prompt_in_held_out"
MULTI_TURN = "multi_turn"

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class UnusableRow(ValueError):
    """A row that is not trained on; ``reason`` is one of UNUSABLE, or MULTI_TURN."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def normalize_row(record: Any) -> dict[str, Any]:
    """Bring a record of any of SCHEMAS to ``prompt`` and ``completion``; ``tests`` and ``family`` are kept.

    ``tests`` are assert statements that a right completion passes; ``family`` groups rows in the report. An optional
    field is absent if it is null, NaN, empty or blank, and for ``tests`` an empty list.

    Raises:
        UnusableRow: with the reason.
    """
    if isinstance(record, UnusableRow):
        raise record
    if not isinstance(record, dict):
        raise UnusableRow("not_an_object")
    for fields, convert in SCHEMAS.items():
        if all(field in record for field in fields):
            prompt, completion = convert(record)
            break
    else:
        raise UnusableRow("missing_field")
    row: dict[str, Any] = {"prompt": prompt, "completion": completion}
    if tests := _tests(record):
        row |= {"tests": tests, "family": _optional_text(record, "family") or "all"}
    return row


def _prompt_completion(record: dict[str, Any]) -> tuple[str, str]:
    """The schema of CodeAlpaca's copy on the Hugging Face hub, with an optional input."""
    return _with_input(_text(record, "prompt"), record), _text(record, "completion")


def _instruction_output(record: dict[str, Any]) -> tuple[str, str]:
    """The original CodeAlpaca's schema: instruction, optional input, output."""
    return _with_input(_text(record, "instruction"), record), _text(record, "output")


def _with_input(prompt: str, record: dict[str, Any]) -> str:
    """A prompt with its input, joined as in the copy on the hub: prompt, newline, input."""
    text = _optional_text(record, "input")
    return f"{prompt}\n{text}" if text else prompt


def _messages(record: dict[str, Any]) -> tuple[str, str]:
    """OpenAI's chat schema: a list of ``role`` and ``content``."""
    return _conversation(record["messages"], "role", "content")


def _conversations(record: dict[str, Any]) -> tuple[str, str]:
    """ShareGPT's schema: a list of ``from`` and ``value``."""
    return _conversation(record["conversations"], "from", "value")


def _conversation(turns: Any, role: str, content: str) -> tuple[str, str]:
    """Prompt and completion of a conversation: system (if any), newline, user; and assistant.

    Raises:
        UnusableRow: it is no such list, or has more turns.
    """
    if _is_absent(turns):
        raise UnusableRow("null_field")
    if not isinstance(turns, list):
        raise UnusableRow("not_a_conversation")
    if not all(isinstance(turn, dict) and {role, content} <= turn.keys() for turn in turns):
        raise UnusableRow("not_a_conversation")
    roles = [_ROLES.get(turn[role]) if isinstance(turn[role], str) else None for turn in turns]
    system = None
    if roles[:1] == ["system"]:
        system = _optional_text(turns[0], content)
        turns, roles = turns[1:], roles[1:]
    if roles[:2] != ["user", "assistant"] or None in roles:
        raise UnusableRow("not_a_conversation")
    if len(turns) > 2:
        raise UnusableRow(MULTI_TURN)
    prompt, completion = _text(turns[0], content), _text(turns[1], content)
    return f"{system}\n{prompt}" if system else prompt, completion


# Row schemas by their required fields; the first whose fields a record has converts it to prompt and completion.
SCHEMAS: Mapping[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, str]]] = {
    ("prompt", "completion"): _prompt_completion,
    ("instruction", "output"): _instruction_output,
    ("messages",): _messages,
    ("conversations",): _conversations,
}
# All that is read of a record; other columns of a table are not even converted.
COLUMNS = frozenset(field for fields in SCHEMAS for field in fields) | {"input", "tests", "family"}


def _is_absent(value: Any) -> bool:
    """Whether a value stands for nothing: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(record: Mapping[str, Any], field: str) -> str:
    """A field's text; raises UnusableRow unless it is a non-blank string of valid Unicode."""
    value = record[field]
    if _is_absent(value):
        raise UnusableRow("null_field")
    if not isinstance(value, str):
        raise UnusableRow("not_a_string")
    if not value.strip():
        raise UnusableRow("empty_field")
    return _checked(value)


def _optional_text(record: Mapping[str, Any], field: str) -> str | None:
    """A field's text, None where it is absent or blank; raises UnusableRow for any other value."""
    value = record.get(field)
    if _is_absent(value) or (isinstance(value, str) and not value.strip()):
        return None
    return _text(record, field)


def _tests(record: Mapping[str, Any]) -> list[str] | None:
    """The tests of a row; None where they are absent or empty."""
    tests = record.get("tests")
    if _is_absent(tests) or tests in ("", []):
        return None
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise UnusableRow("tests_not_strings_in_a_list")
    return [_checked(test) for test in tests]


def _checked(text: str) -> str:
    """The text, if it is valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise UnusableRow("invalid_unicode") from None
    return text

"""Rows of every schema, and every reason to drop one."""

from __future__ import annotations

from typing import Any

import pytest

from model.data.schemas import COLUMNS, MULTI_TURN, SCHEMAS, UNUSABLE, UnusableRow, normalize_row

# Records of each schema with the prompt that each becomes; the completion is "c". A new entry of SCHEMAS needs one.
SAMPLES: dict[tuple[str, ...], list[tuple[dict[str, Any], str]]] = {
    ("prompt", "completion"): [
        ({"prompt": "Add\n1", "completion": "c"}, "Add\n1"),
        ({"prompt": "Add", "input": "1", "completion": "c"}, "Add\n1"),
    ],
    ("instruction", "output"): [
        ({"instruction": "Add", "input": "1", "output": "c"}, "Add\n1"),
        ({"instruction": "Add", "input": "", "output": "c"}, "Add"),
        ({"instruction": "Add", "input": None, "output": "c"}, "Add"),
        ({"instruction": "Add", "output": "c"}, "Add"),
    ],
    ("messages",): [
        ({"messages": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "c"}]}, "Add"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Add"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "Be brief.\nAdd",
        ),
    ],
    ("conversations",): [
        ({"conversations": [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "c"}]}, "Add"),
        ({"conversations": [{"from": "user", "value": "Add"}, {"from": "assistant", "value": "c"}]}, "Add"),
    ],
}


def _turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_every_schema_has_a_sample() -> None:
    """A schema that is added without a sample here fails, and so does a sample without a schema."""
    assert SAMPLES.keys() == SCHEMAS.keys(), "add the schema to SAMPLES"
    assert all(field in COLUMNS for fields in SCHEMAS for field in fields)


@pytest.mark.parametrize("fields", SCHEMAS, ids=" + ".join)
def test_every_schema_becomes_prompt_and_completion(fields: tuple[str, ...]) -> None:
    """The required fields are enough; each has its reason if it is absent or null."""
    for record, prompt in SAMPLES[fields]:
        assert normalize_row(record) == {"prompt": prompt, "completion": "c"}
        for field in fields:
            with pytest.raises(UnusableRow, match="missing_field"):
                normalize_row({key: value for key, value in record.items() if key != field})
            with pytest.raises(UnusableRow, match="null_field"):
                normalize_row({**record, field: None})


def test_the_first_schema_wins() -> None:
    """A record with the fields of both schemas is read as prompt + completion, even if these are unusable."""
    other = {"instruction": "i", "output": "o"}
    assert normalize_row({**other, "prompt": "p", "completion": "c"}) == {"prompt": "p", "completion": "c"}
    with pytest.raises(UnusableRow, match="null_field"):
        normalize_row({**other, "prompt": "p", "completion": None})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["prompt", "completion"], "not_an_object"),
        ("text", "not_an_object"),
        (None, "not_an_object"),
        ({"prompt": "p"}, "missing_field"),
        ({"instruction": "i", "completion": "c"}, "missing_field"),
        ({}, "missing_field"),
        ({"prompt": None, "completion": "c"}, "null_field"),
        ({"prompt": "p", "completion": None}, "null_field"),
        ({"prompt": 5, "completion": "c"}, "not_a_string"),
        ({"prompt": "p", "completion": ["c"]}, "not_a_string"),
        ({"instruction": "i", "input": 5, "output": "o"}, "not_a_string"),
        ({"prompt": "p", "completion": ""}, "empty_field"),
        ({"prompt": " \n", "completion": "c"}, "empty_field"),
        ({"prompt": "a\ud800b", "completion": "c"}, "invalid_unicode"),
        ({"instruction": "i", "input": "\udfff", "output": "o"}, "invalid_unicode"),
        (UnusableRow("invalid_json"), "invalid_json"),
    ],
)
def test_unusable_rows_have_a_reason(record: Any, reason: str) -> None:
    """An unusable record gives its reason, and never the text "None"."""
    with pytest.raises(UnusableRow) as caught:
        normalize_row(record)
    assert caught.value.reason == reason
    assert reason in UNUSABLE


def test_tests_and_family_are_kept() -> None:
    """Rows keep their tests for the pass rate; tests that are not a list of strings make the row unusable."""
    row = {"prompt": "p", "completion": "c", "tests": ["assert f(1) == 2"], "family": "number_add", "more": 1}
    assert normalize_row(row) == {key: row[key] for key in ("prompt", "completion", "tests", "family")}
    assert normalize_row({**row, "family": None})["family"] == "all"
    for bad in ("assert True", [1], {"a": "b"}):
        with pytest.raises(UnusableRow, match="tests_not_strings_in_a_list"):
            normalize_row({**row, "tests": bad})


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " \n"])
def test_an_absent_optional_field_is_no_input(nothing: Any) -> None:
    """null, NaN and blank text are no input, no family and no tests, with every schema that has an input."""
    for record in ({"prompt": "p", "completion": "c"}, {"instruction": "p", "output": "c"}):
        assert normalize_row({**record, "input": nothing}) == {"prompt": "p", "completion": "c"}
    tested = {"prompt": "p", "completion": "c", "tests": ["assert f()"], "family": nothing}
    assert normalize_row(tested)["family"] == "all"


@pytest.mark.parametrize("tests", [None, float("nan"), "", []])
def test_no_tests_are_no_field(tests: Any) -> None:
    """An empty list and null give the same row, and so the same key in the ledger."""
    record = {"prompt": "p", "completion": "c", "tests": tests, "family": "x"}
    assert normalize_row(record) == {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize("value", [0, 0.0, False, 7, [], {}, ["x"]])
def test_any_other_value_makes_the_row_unusable(value: Any) -> None:
    """0, false and empty lists do not vanish: what is neither text nor absent is unusable, in every text field."""
    for record in (
        {"prompt": "p", "input": value, "completion": "c"},
        {"instruction": "p", "input": value, "output": "c"},
        {"prompt": value, "completion": "c"},
        {"prompt": "p", "completion": "c", "tests": ["assert f()"], "family": value},
        _turns(("user", value), ("assistant", "c")),
    ):
        with pytest.raises(UnusableRow, match="not_a_string"):
            normalize_row(record)


def test_every_text_is_checked_for_valid_unicode() -> None:
    """A lone surrogate cannot be stored by Prefect or MLflow: it is found in any field when the row is read."""
    row = {"prompt": "p", "completion": "c", "tests": ["assert f()"], "family": "x"}
    for change in ({"family": "\ud800"}, {"tests": ["\udfff"]}, {"input": "a\ud800"}):
        with pytest.raises(UnusableRow, match="invalid_unicode"):
            normalize_row(row | change)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], MULTI_TURN),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], MULTI_TURN),
        ([("user", "a")], "not_a_conversation"),
        ([], "not_a_conversation"),
        ([("assistant", "a"), ("user", "b")], "not_a_conversation"),
        ([("system", "s"), ("assistant", "a")], "not_a_conversation"),
        ([("user", "a"), ("tool", "b"), ("assistant", "c")], "not_a_conversation"),
        ([("user", "a"), ("assistant", None)], "null_field"),
        ([("user", "a"), ("assistant", " ")], "empty_field"),
    ],
)
def test_conversations_of_another_form_are_dropped(turns: list[tuple[str, Any]], reason: str) -> None:
    """One question and one answer make a row; a longer conversation counts as multi_turn, not as unusable."""
    with pytest.raises(UnusableRow) as caught:
        normalize_row(_turns(*turns))
    assert caught.value.reason == reason
    assert (reason in UNUSABLE) is (reason != MULTI_TURN)


@pytest.mark.parametrize("messages", ["text", [1], [{"role": "user"}], {"role": "user", "content": "x"}])
def test_messages_of_another_type_are_unusable(messages: Any) -> None:
    """They are no list of turns."""
    with pytest.raises(UnusableRow, match="not_a_conversation"):
        normalize_row({"messages": messages})

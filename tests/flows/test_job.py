"""The flow's parameters: declared once, told to Prefect and to docs/parameters.md, and sorted into their groups."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

from flows.arguments import complaint
from flows.finetune import finetune
from flows.job import Job, all_parameters, parameter_tables, write_tables
from model.parameters import Parameter

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_the_tables(tmp_path: Path) -> None:
    """docs/parameters.md has the tables that are made from the declarations; ``make parameters`` writes them anew."""
    text = (ROOT / "docs" / "parameters.md").read_text()
    missing = [line for line in parameter_tables().splitlines() if line not in text.splitlines()]
    assert not missing, f"run `make parameters`: docs/parameters.md lacks {missing}"
    assert parameter_tables() in text
    shown = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(shown) == sorted(each.name for each in all_parameters()), "each stands there once"
    page = tmp_path / "parameters.md"
    page.write_text(text.replace("| `epochs` | `3` |", "| `epochs` | `4` |"))
    write_tables(page)
    assert page.read_text() == text


def test_a_page_without_the_tables_is_refused(tmp_path: Path) -> None:
    """Nothing is written to it."""
    page = tmp_path / "page.md"
    page.write_text("no table\n")
    with pytest.raises(ValueError, match="has 0 places"):
        write_tables(page)
    assert page.read_text() == "no table\n"


def test_prefect_is_told_every_parameter() -> None:
    """Prefect's schema of the flow has each parameter's name, default, bounds and meaning."""
    schema = finetune.parameters.properties
    assert list(schema) == [parameter.name for parameter in all_parameters()]
    for parameter in all_parameters():
        assert schema[parameter.name]["default"] == parameter.default
        assert schema[parameter.name]["description"] == parameter.meaning
        assert parameter.meaning.endswith(".")
    assert schema["dropout"] | {"minimum": 0, "exclusiveMaximum": 1} == schema["dropout"]


def test_values_reach_their_groups() -> None:
    """By name; a parameter of several groups reaches all of them, and internal fields keep their defaults."""
    assert Job.from_parameters({}).flat() == {parameter.name: parameter.default for parameter in all_parameters()}
    given: dict[str, Any] = {"seed": 7, "batch_size": 5, "sample_rows": 3, "num_unfrozen_layers": 2}
    job = Job.from_parameters(given)
    assert {name: job.flat()[name] for name in given} == given
    assert job.train.seed == job.sampling.seed == 7
    assert job.prepare.split_seed == 42
    assert job.prepare.subset_keys is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subset": "next", "subset_start": 4}, "subset_start 4 selects rows by position.*leave one out"),
        ({"num_unfrozen_layers": 13}, "num_unfrozen_layers 13 is not between 0 and 12, the blocks of 124m"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"humaneval_samples": 1, "humaneval_k": 2}, "humaneval_samples=1"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], message: str) -> None:
    """Before anything is fetched."""
    with pytest.raises(ValueError, match=message):
        Job.from_parameters(given)


def test_layers_are_ignored_where_nothing_is_frozen() -> None:
    """freeze_layers=false trains everything."""
    assert not Job.from_parameters({"freeze_layers": False, "num_unfrozen_layers": 13}).freeze.freeze_layers


def test_an_unknown_parameter_is_refused() -> None:
    """A name that no group has is not dropped in silence; sizes may be written in capitals."""
    with pytest.raises(TypeError, match="there is no parameter epoch"):
        Job.from_parameters({"epoch": 9})
    assert Job.from_parameters({"model_size": "355M"}).sources.model_size == "355m"


def _is_number(annotation: Any) -> bool:
    """Whether an annotation is a number with bounds, or such a number and None or a word."""
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return any(_is_number(part) for part in get_args(annotation))
    if get_origin(annotation) is not Annotated:
        return False
    kind = get_args(annotation)[0]
    return kind in (int, float) or _is_number(kind)


NUMBERS = [parameter for parameter in all_parameters() if _is_number(parameter.annotation)]


@pytest.mark.parametrize("parameter", NUMBERS, ids=[parameter.name for parameter in NUMBERS])
def test_every_number_has_bounds(parameter: Parameter) -> None:
    """What no run can mean is refused at once, by name, on the command line as on Prefect's server."""
    refused = [
        1e300,
        -1e300,
        math.inf,
        -math.inf,
        math.nan,
        2**64,
        -(2**64),
        "",
        " ",
        "1e300",
        "inf",
        "nan",
        True,
        [1],
    ]
    refused += [-1] if "seed" in parameter.name else [10**9, -1]
    for value in refused:
        message = complaint({parameter.name: value})
        assert message is not None, value
        assert parameter.name in message
    assert complaint({parameter.name: parameter.default}) is None
    told = finetune.parameters.properties[parameter.name]
    (bounds,) = [part for part in told.get("anyOf", [told]) if part.get("type") != "null" and "const" not in part]
    assert bounds.keys() & {"maximum", "exclusiveMaximum"}
    assert bounds.keys() & {"minimum", "exclusiveMinimum"}


def test_no_number_without_bounds() -> None:
    """The list above has every parameter that is a number."""
    defaults = {
        p.name for p in all_parameters() if isinstance(p.default, int | float) and not isinstance(p.default, bool)
    }
    assert defaults <= {parameter.name for parameter in NUMBERS}
    assert len(NUMBERS) == 36

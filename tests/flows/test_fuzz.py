"""Fuzzing of what people type: prefect.yaml and parameters give a job, or one message that says what is wrong."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import (
    PLACES,
    check_message,
    hypothesis,
    limits,
    mutated_bytes,
    mutated_json,
    put,
    settings,
    st,
)
from hard_yaml import HARD_YAML

from flows.arguments import complaint, parse
from flows.commands import DEPLOYMENTS, UsageError
from flows.finetune import finetune
from flows.job import Job, all_parameters
from model.net.config import normalize_size

TEXT = DEPLOYMENTS.read_bytes()
VALID = yaml.safe_load(TEXT)
NAMES = [parameter.name for parameter in all_parameters()]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the prefect.yaml that is read."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.commands.DEPLOYMENTS", folder / "prefect.yaml")
        yield folder


def _job_or_complaint(parameters: dict[str, Any]) -> Job | None:
    """The job of parameters that nothing is said against."""
    if said := complaint(parameters):
        assert len(said) < 10_000
        assert "Traceback" not in said
        return None
    values = finetune.validate_parameters(copy.deepcopy(parameters))
    try:
        job = Job.from_parameters(values)
    except ValueError as error:
        check_message(error, *NAMES, *map(str, parameters.values()))
        return None
    flat = job.flat()
    for name, given in parameters.items():
        _check_same(flat[name], given)
    return job


def _check_same(taken: Any, given: Any) -> None:
    """A parameter has the value that was typed, as a number if it is one."""
    if isinstance(given, str) and isinstance(taken, int | float):
        assert float(given) == taken
    elif isinstance(given, bool | int | float) and not isinstance(taken, str):
        assert taken == given
    else:
        assert taken == given or taken == normalize_size(given)
    assert not isinstance(taken, float) or math.isfinite(taken)


@settings(few=25, share=0.5)
@hypothesis.given(data=st.data())
def test_any_list_of_deployments_is_read_or_refused(here: Path, data: Any) -> None:
    """The parameters are those that the file says."""
    texts = st.one_of(mutated_json(VALID), mutated_bytes(TEXT), st.sampled_from(HARD_YAML).map(str.encode))
    content, place = data.draw(texts), data.draw(PLACES)
    put(here / "prefect.yaml", content, place)
    name = data.draw(st.sampled_from(["tiny", "355m", "nightly", "x"]))
    try:
        with limits(here):
            found = parse([name]).parameters
    except UsageError as error:
        check_message(error, str(here), "has no deployment")
        return
    with limits(here):
        _job_or_complaint(found)
    said = [each for each in yaml.safe_load(content.decode())["deployments"] if each["name"] == name]
    assert [each["parameters"] for each in said] == [found]


_WORDS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["tiny", "124M", " 355m ", "null", "~", "true", "no", "1e5", "1_000", "0x10", "0o7", "1:30", "bf16"]
    ),
    st.sampled_from(
        ["cpu", "cuda:99", "cuda:" + "9" * 30, "base", "champion", "models:/x", "models:/\n", "next", "demo"]
    ),
    st.sampled_from(["[1]", "{a: b}", "2026-01-01", "'\\ud800'", '"\\ud800"', '"\\0"', "&a [*a]", "&a {b: *a}"]),
    st.sampled_from(HARD_YAML),
)


@settings(few=60, share=0.5)
@hypothesis.given(
    arguments=st.lists(
        st.builds("{}={}".format, st.sampled_from([*NAMES, *NAMES, "x", "", "self"]) | st.text(max_size=5), _WORDS)
        | st.sampled_from(["tiny", "124m", "tiny ", "x", "=", "-x"]),
        max_size=4,
    )
)
def test_any_command_line_is_a_job_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str]
) -> None:
    """Each parameter has the value that was typed."""
    job = None
    with limits(tmp_path_factory.getbasetemp()):
        try:
            job = _job_or_complaint(parse(arguments).parameters)
        except UsageError as error:
            check_message(error, "")
    if job:
        assert all(isinstance(job.flat()[name], str | int | float | None) for name in NAMES)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | _WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(few=60, share=0.5)
@hypothesis.given(given=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), _JSON, max_size=3))
def test_any_parameters_of_prefect_s_server_are_a_job_or_one_message(given: dict[str, Any]) -> None:
    """They arrive as JSON, of any type."""
    _job_or_complaint(json.loads(json.dumps(given)))

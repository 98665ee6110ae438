"""Helpers that are started while the command line imports torch and Prefect."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest
from made_up import wait_for

from flows.ahead import helpers_ahead
from flows.arguments import parse
from flows.local import RUN
from ops.machine.process import identify_process
from tasks import trial_helpers


def helpers() -> list[psutil.Process]:
    """The helpers that this process has started."""
    return [child for child in psutil.Process().children() if trial_helpers._MODULE in child.cmdline()]


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many as this variable names; their helpers never come so far as to use one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv(RUN, "")  # it is as it was afterwards
    yield
    trial_helpers.dismiss_helpers()


@pytest.mark.parametrize(("grid", "count"), [("[0.1, 0.2]", 1), ("[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]", 3)])
def test_one_for_each_further_gpu_that_gets_a_trial(grid: str, count: int) -> None:
    """They are there while the body imports, and gone after it, at once."""
    request = parse(["sweep-124m", f"grid={{learning_rate: {grid}}}"])
    with helpers_ahead(request):
        wait_for("they are started", lambda: len(helpers()) == count, 30)
        time.sleep(0.5)
        assert len(helpers()) == count
        assert {helper.environ()[RUN] for helper in helpers()} == {identify_process().to_json()}
        begun = time.monotonic()
    assert helpers() == []
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "words",
    [
        ["124m"],
        ["sweep-124m", "device=cpu"],
        ["sweep-124m", "device=cuda:1"],
        ["sweep-124m", "grid={learning_rate: [0.1]}"],
        ["sweep-124m", "grid={learning_rate: [0]}"],
        ["sweep-124m", "grid=3"],
        ["sweep-124m", "no_parameter=3"],
    ],
)
def test_none_where_one_process_trains_or_none(words: list[str]) -> None:
    """Another flow, one device, one trial, a mistake."""
    with helpers_ahead(parse(words)):
        time.sleep(0.5)
        assert helpers() == []


def test_none_on_a_machine_with_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or without any."""
    for visible in ("0", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with helpers_ahead(parse(["sweep-124m"])):
            time.sleep(0.5)
            assert helpers() == []

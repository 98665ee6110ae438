"""Prefect's and MLflow's pages in a real browser, with real servers and three runs of different learning rates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
from made_up import MadeUp, made_up

from ops.tracking.runs import client

pytestmark = pytest.mark.slow
RATES = ("0.0001", "0.0003", "0.001")
FEW_STEPS = ("max_steps=20", "eval_freq=5", "eval_rows=20", "sample_rows=1", "pass_rows=1", "max_new_tokens=4")
# No request goes to other hosts than the two servers. Chromium's sandbox does not work for root.
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 60  # time limit for a page to show something, on a busy machine
DRAWN = """
    () => [...document.querySelectorAll(".js-plotly-plot")].map(plot => ({
        curves: Object.fromEntries(plot.data.map(curve => [curve.name, [...curve.y]])),
        lines: [...plot.querySelectorAll(".scatterlayer path.js-line")].map(line => line.getAttribute("d")),
    }))
"""


@dataclass(frozen=True)
class Seen:
    """A finished run: its ids and names in Prefect and MLflow, its learning rate and its values of eval/loss."""

    flow_run: str
    flow_name: str
    run_id: str
    name: str
    rate: float
    losses: list[float]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of the system's Chromium, high enough for lists that draw only visible entries."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (pip install -c constraints.txt -e '.[dev,pages]')",
    )
    with api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, *sandbox])
        try:
            opened = browser.new_page(viewport={"width": 1400, "height": 1600})
            opened.set_default_timeout(SECONDS * 1000)
            yield opened
        finally:
            browser.close()


@contextmanager
def _ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def platform(page: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUp]:
    """Both servers and a worker. Depends on the browser, so that nothing is started without one."""
    with made_up(tmp_path_factory.mktemp("platform"), FINETUNE_GPUS="1") as made:
        yield made


@pytest.fixture(scope="module")
def runs(platform: MadeUp) -> list[Seen]:
    """One run for each of RATES, all Completed."""
    submitted = [platform.run(*FEW_STEPS, f"learning_rate={rate}") for rate in RATES]
    with _ended(submitted):
        outputs = [process.communicate(timeout=500)[0] for process in submitted]
    mlflow = client(platform.mlflow)
    experiment = mlflow.get_experiment_by_name("finetune").experiment_id
    seen = []
    for rate, output in zip(RATES, outputs, strict=True):
        flow_run = platform.flow_run(output)
        (run,) = mlflow.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{flow_run}'")
        assert run.info.status == "FINISHED", output[-3000:]
        history = sorted(mlflow.get_metric_history(run.info.run_id, "eval/loss"), key=lambda point: point.step)
        flow_name = platform.api(f"/flow_runs/{flow_run}")["name"]
        losses = [point.value for point in history]
        seen.append(Seen(flow_run, flow_name, run.info.run_id, run.info.run_name, float(rate), losses))
    return seen


def _experiment(platform: MadeUp) -> str:
    return client(platform.mlflow).get_experiment_by_name("finetune").experiment_id


def _text(page: Any, wanted: str) -> None:
    """Wait until the page shows the text."""
    page.get_by_text(wanted).filter(visible=True).first.wait_for()


def _check_curves(page: Any, runs: list[Seen]) -> None:
    """Exactly one curve for each run is drawn, with the points that were logged."""
    page.wait_for_function(f"() => {{ const p = ({DRAWN})(); return p.length === 1 && p[0].lines.length > 0; }}")
    (plot,) = page.evaluate(DRAWN)
    assert set(plot["curves"]) == {run.name for run in runs}
    for run in runs:
        assert plot["curves"][run.name] == pytest.approx(run.losses)
        assert len(run.losses) == 5  # before the first step, and every 5 of 20
    # Plotly draws each curve twice, the second time for its points; the rates give different curves.
    assert len(set(plot["lines"])) == len(runs) == len(RATES)
    for run in runs:
        _text(page, f"{run.name} (eval/loss)")  # the legend


def test_compare_page_shows_three_runs_and_their_curves(page: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """The page of the button Compare: names and the differing parameter; a metric's name links to its curves."""
    chosen, experiments = (quote(json.dumps(ids)) for ids in ([r.run_id for r in runs], [_experiment(platform)]))
    page.goto(
        f"{platform.mlflow}/#/compare-runs?runs={chosen}&experiments={experiments}&workflowType=machine_learning"
    )
    _text(page, "Comparing 3 Runs from 1 Experiment")
    assert len({run.name for run in runs}) == 3
    for run in runs:
        _text(page, run.name)
        assert page.get_by_role("link", name=run.run_id, exact=True).count() == 1
    shown = page.inner_text("body").split()
    for run in runs:
        assert str(run.rate) in shown

    page.get_by_role("link", name="eval/loss", exact=True).click()
    _text(page, "Completed Runs")
    _check_curves(page, runs)


def test_chart_view_shows_three_curves(page: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """The experiment's charts, searched for eval/loss, in MLflow's pages for model training."""
    page.goto("about:blank")
    page.goto(
        f"{platform.mlflow}/#/experiments/{_experiment(platform)}/runs"
        "?compareRunsMode=CHART&workflowType=machine_learning"
    )
    _text(page, f"{len(RATES)} matching runs")
    page.get_by_placeholder("Search metric charts").fill("eval/loss")
    _check_curves(page, runs)


def test_prefect_page_leads_to_mlflow_and_back(page: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """State and artifacts of a flow run; its artifact mlflow-run links to the MLflow run, whose note links back."""
    run = runs[0]
    page.goto(f"{platform.prefect}/runs/flow-run/{run.flow_run}")
    _text(page, run.flow_name)
    _text(page, "Completed")
    page.get_by_text("Artifacts", exact=True).first.click()
    for key in ("mlflow-run", "train-progress", "samples"):
        _text(page, key)
    page.get_by_text("mlflow-run", exact=True).first.click()
    link = page.locator(f"a[href*='{run.run_id}']").first
    link.wait_for()

    page.goto(link.get_attribute("href"))
    _text(page, run.name)
    back = page.locator(f"a[href*='{run.flow_run}']").first
    back.wait_for()
    page.goto(back.get_attribute("href"))
    _text(page, run.flow_name)
    _text(page, "Completed")


def test_prefect_lists_the_deployments(page: Any, platform: MadeUp) -> None:
    page.goto(f"{platform.prefect}/deployments")
    _text(page, "6 Deployments")
    for name in ("tiny", "124m", "355m", "774m", "1558m", "sweep-tiny", "sweep-124m", "sweep-355m", "nightly"):
        page.get_by_role("link", name=name, exact=True).first.wait_for()
    _text(page, "At 02:00 AM every day")

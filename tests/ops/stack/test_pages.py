"""Prefect's and MLflow's pages and the reports in a real browser, with real servers and three runs.

FINETUNE_SCREENSHOTS=docs/images takes the pictures of docs/reports.md, of longer trainings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser import SCREENSHOTS, open_browser, save_picture
from finished_runs import HOSTILE, make_records
from made_up import MadeUp, made_up

from ops.report.contents import extreme_rows
from ops.report.render import render
from ops.tracking.connection import client
from ops.tracking.views import view_url

pytestmark = pytest.mark.slow
RATES = ("0.0001", "0.0003", "0.001")
FEW_STEPS = (
    ("max_steps=160", "eval_freq=40", "max_new_tokens=64")
    if SCREENSHOTS
    else ("max_steps=20", "eval_freq=5", "eval_rows=20", "score_rows=40", "pass_rows=1", "max_new_tokens=4")
)
WIDTHS = (1280, 390)
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
    with open_browser() as browser:
        opened = browser.new_page(viewport={"width": 1400, "height": 1600})
        opened.set_default_timeout(SECONDS * 1000)
        yield opened


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
        assert len(run.losses) == 5  # before the first step, and at each quarter of the steps
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
    """The nights are listed with their hour once they are switched on."""
    switch = [sys.executable, "-m", "ops.stack.nightly"]
    subprocess.run([*switch, "on"], env=platform.client_environment, check=True)
    page.goto(f"{platform.prefect}/deployments")
    names = ("tiny", "124m", "355m", "774m", "1558m", "sweep-tiny", "sweep-124m", "sweep-355m", "nightly")
    _text(page, f"{len(names)} Deployments")
    for name in names:
        page.get_by_role("link", name=name, exact=True).first.wait_for()
    _text(page, "At 02:00 AM every day")
    subprocess.run([*switch, "off"], env=platform.client_environment, check=True)


@pytest.fixture(scope="module")
def files(platform: MadeUp, runs: list[Seen], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages that `make report` and `make compare` write, and one of hostile rows."""
    folder = tmp_path_factory.mktemp("files")
    made = {name: folder / f"{name}.html" for name in ("report", "comparison", "hostile")}
    for target in (
        ("report", f"RUN={runs[2].run_id}", f"ARGS=--html {made['report']}"),
        ("compare", f"A={runs[0].run_id}", f"B={runs[2].run_id}", f"ARGS=--html {made['comparison']}"),
    ):
        done = platform.make(*target)
        assert done.returncode == 0, done.stdout
    best, worst = extreme_rows(make_records(40, texts=HOSTILE))
    made["hostile"].write_text(
        render(
            "report.html", title=HOSTILE[0], subtitle=HOSTILE[5], result=HOSTILE[6], links=[], lines=[], no_rows="",
            metric_rows=[(HOSTILE[5], HOSTILE[0], HOSTILE[1])], curves=None, gains=None, legend=(), validation="",
            failures=[(HOSTILE[5], "1", "2")], best=best, worst=worst, data_rows=[("rows", HOSTILE[5])], dropped=[],
            files=[(HOSTILE[5], "train", "1")], lengths=None, changed=[(HOSTILE[5], HOSTILE[5], HOSTILE[0])],
            definitions=[],
        )
    )  # fmt: skip
    return made


@pytest.fixture
def fresh(page: Any) -> Iterator[Any]:
    """A page of a browser that has seen nothing yet: MLflow's pages remember searches and columns."""
    opened = page.context.browser.new_page(viewport={"width": 1280, "height": 800})
    opened.set_default_timeout(SECONDS * 1000)
    yield opened
    opened.close()


def _screenshot(page: Any, name: str) -> None:
    if SCREENSHOTS:
        assistant = page.get_by_role("button", name="Close")  # MLflow Assistant takes a quarter of the window
        if name.startswith("mlflow") and assistant.count():
            assistant.first.click()
            page.wait_for_timeout(1000)
        save_picture(page, name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "comparison", "hostile"])
def test_pages_fit_a_desktop_and_a_phone(
    page: Any, files: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    """No page is wider than the window, asks for anything, or runs what a row holds; dark pages are dark."""
    asked: list[str] = []
    opened = page.context.browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    opened.on("request", lambda request: asked.append(request.url))
    try:
        opened.goto(files[name].as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        cut = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
        assert opened.evaluate(f"{cut}.length") == 0
        assert asked == [files[name].as_uri()]
        assert opened.title() != "hacked"
        assert opened.evaluate("document.scripts.length + document.images.length") == 0
        ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        if name != "hostile":
            assert opened.locator("svg polyline").count() == {"report": 2, "comparison": 4}[name]
            assert opened.locator("article").count() == 10
            if scheme == ("light" if name == "report" else "dark"):
                _screenshot(opened, f"{name}-{width}")
    finally:
        opened.close()


def test_prefect_leads_to_the_report_in_mlflow(page: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """The artifact samples links to the report, which MLflow shows among the run's files."""
    run = runs[2]
    page.goto("about:blank")
    page.goto(f"{platform.prefect}/runs/flow-run/{run.flow_run}")
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("samples", exact=True).first.click()
    link = page.get_by_role("link", name="report", exact=True).first
    link.wait_for()
    page.goto(link.get_attribute("href"))
    report = page.frame_locator("iframe")
    report.get_by_role("heading", name="Rows that changed most").wait_for()
    assert report.get_by_role("heading", level=1).inner_text() == run.name


def test_mlflow_shows_what_decides_first(fresh: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """Charts and comparison begin with the best loss, and end with what the training does not change."""
    fresh.goto(
        f"{platform.mlflow}/#/experiments/{_experiment(platform)}/runs"
        "?compareRunsMode=CHART&workflowType=machine_learning"
    )
    fresh.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length > 0")
    sections = fresh.get_by_test_id("experiment-view-compare-runs-section-header").all_inner_texts()
    names = [text.split("(")[0].strip() for text in sections]
    assert names[0] == "best", names
    assert names.index("untuned") > names.index("train"), names

    chosen, experiments = (quote(json.dumps(ids)) for ids in ([r.run_id for r in runs], [_experiment(platform)]))
    fresh.goto("about:blank")
    fresh.goto(
        f"{platform.mlflow}/#/compare-runs?runs={chosen}&experiments={experiments}&workflowType=machine_learning"
    )
    _text(fresh, "Comparing 3 Runs from 1 Experiment")
    metrics = fresh.locator("a[href*='plot_metric_keys']").all_inner_texts()  # those in sight
    assert metrics[0] == "best/eval_loss", metrics
    assert not [name for name in metrics if name.startswith("untuned/")], metrics
    axes = fresh.locator("svg text.axis-title")  # of the parallel coordinates
    axes.first.wait_for()
    assert axes.all_text_contents() == ["learning_rate", "eval/loss"]
    _screenshot(fresh, "mlflow-comparison")

    run = runs[2]
    fresh.goto("about:blank")
    fresh.set_viewport_size({"width": 1280, "height": 1000})
    fresh.goto(
        f"{platform.mlflow}/#/experiments/{_experiment(platform)}/runs/{run.run_id}?workflowType=machine_learning"
    )
    _text(fresh, "The tuned model is better than the base: test loss")
    _text(fresh, "Report")
    metrics = fresh.locator("a[href$='/model-metrics']", has_text="/")
    metrics.first.wait_for()
    assert metrics.first.inner_text() == "eval/loss"
    assert run.name.startswith("tiny lr 1e-3 top 2, ")
    _text(fresh, run.name)
    _screenshot(fresh, "mlflow-run")


def test_the_registry_says_first_how_good_a_version_is(fresh: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """The page of a version: result with interval; no hash of a file. Model and experiment are described."""
    (version,) = client(platform.mlflow).search_model_versions(f"run_id = '{runs[0].run_id}'")
    of_version = f"{platform.mlflow}/#/models/{version.name}/versions/{version.version}?workflowType=machine_learning"
    fresh.goto(of_version)
    _text(fresh, "The tuned model is better than the base: test loss")
    assert "model.safetensors" not in fresh.inner_text("body")
    _screenshot(fresh, "mlflow-version")
    fresh.goto("about:blank")
    fresh.goto(f"{platform.mlflow}/#/models/{version.name}?workflowType=machine_learning")
    _text(fresh, "GPT-2 tiny, its top blocks fine-tuned on code instructions.")


def test_the_page_that_make_up_names(fresh: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """It shows the runs, and not MLflow's pages for traces."""
    (line,) = [line for line in platform.output.splitlines() if line.startswith("MLflow ")]
    fresh.goto(line.split()[1])
    for run in runs:
        _text(fresh, run.name[:20])
    _text(fresh, "GPT-2 fine-tuned on code instructions by the flows")


def test_mlflow_has_the_ready_made_view(fresh: Any, platform: MadeUp, runs: list[Seen]) -> None:
    """The menu of views lists it; its table has the results, its charts the scores."""
    fresh.set_viewport_size({"width": 2000, "height": 800})  # the table draws only the columns in sight
    fresh.goto(f"{platform.mlflow}/#/experiments/{_experiment(platform)}/runs?workflowType=machine_learning")
    fresh.get_by_role("button", name="Views").click()
    fresh.get_by_text("Scores", exact=True).first.click()
    for column in ("result", "changed", "test/loss", "best/eval_loss"):
        _text(fresh, column)
    assert fresh.get_by_text(": test loss ").count() == len(runs)
    fresh.set_viewport_size({"width": 1280, "height": 800})
    # By its link too, which keeps MLflow's pages for trainings.
    link = view_url(platform.mlflow, _experiment(platform))
    fresh.goto("about:blank")
    fresh.goto(link)
    _text(fresh, "result")
    _screenshot(fresh, "mlflow-view")
    fresh.goto("about:blank")
    fresh.goto(link.replace("TABLE", "CHART"))
    _text(fresh, "Scores on the test split")
    _text(fresh, "Loss curves")

"""The report of a run: what it says, where it is logged, and the command that writes it."""

from __future__ import annotations

import math
from html import unescape
from pathlib import Path

import pytest
from finished_runs import log_finished, make_records, own_settings

from model.evaluation.comparison import compare
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.finished import read_run
from ops.tracking.report import describe, log_report, main, report_page, run_lines
from ops.tracking.runs import RunRef, tracked_run


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    settings = own_settings(tmp_path, mlflow_database)
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(settings.data_root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    return settings


def _page(settings: Settings, ref: RunRef) -> str:
    run = read_run(settings.tracking_uri, ref.run_id)
    return unescape(report_page(run, run_lines(run)))


def test_the_page_has_what_a_reader_asks_for(settings: Settings) -> None:
    page = _page(settings, log_finished(settings, "tiny lion", make_records(60), {"epochs": 1}))
    for words in (
        "<title>tiny lion</title>",
        "The tuned model is better than the base: test loss",
        "Of 60 rows, 60 have a lower loss under the tuned model than under the base, and 0 a higher one.",
        "The result is the checkpoint of step 20. Its validation loss is 1.5000 nats per token.",
        "Largest gains or smallest losses of tuned",
        '<th scope="row">training rows</th><td>60</td>',
        '<th scope="row">empty prompt</th><td>2</td>',
        '<th scope="row">rows.jsonl</th><td>train</td><td>60</td>',
        '<th scope="row">epochs</th><td>1</td><td>3</td>',
        '<th scope="row">SyntaxError: invalid syntax</th><td>60</td><td>60</td>',
        "cross-entropy on response tokens",
    ):
        assert words in page, words


def test_differences_of_the_evaluation_give_the_same_page(settings: Settings) -> None:
    """The records in MLflow are rounded to ten digits, which no page shows."""
    records = make_records(60)
    run = read_run(settings.tracking_uri, log_finished(settings, "a run", records).run_id)
    assert run_lines(run) == run_lines(run, compare(records, 42))


def test_a_broken_model_is_the_result(settings: Settings) -> None:
    """On the page, in the description and in the tag; other rows keep their cards."""
    records = make_records(60)
    records[3]["loss"] = math.inf
    ref = log_finished(settings, "broken", records)
    log_report(settings.tracking_uri, ref.run_id)
    said = "he tuned model is broken, its loss is infinite on 1 of 60 rows: losses are not compared"
    tags = client(settings.tracking_uri).get_run(ref.run_id).data.tags
    assert tags["result"] == f"broken: t{said}"
    assert tags["mlflow.note.content"].startswith(f"**T{said}")
    page = _page(settings, ref)
    assert f"T{said}" in page
    assert "Of 59 rows, " in page


def test_facts_have_their_digits(settings: Settings) -> None:
    data = {"data/train_rows": 3600, "data/truncated_share": 0.0, "data/dropped/multi_turn": 1200}
    ref = log_finished(settings, "a run", make_records(20), {"max_steps": 1234}, data)
    page = _page(settings, ref)
    assert '<th scope="row">training rows</th><td>3,600</td>' in page
    assert '<th scope="row">rows cut at max_length</th><td>0.0%</td>' in page
    assert '<th scope="row">multi turn</th><td>1,200</td>' in page


def test_defaults_are_written_as_users_write_them(settings: Settings) -> None:
    defaults = {"max_steps": None, "promote": False}
    with tracked_run(settings, "a run", {"max_steps": 5, "promote": True}, {}, defaults) as ref:
        pass
    page = _page(settings, ref)
    assert '<th scope="row">max_steps</th><td>5</td><td>null</td>' in page
    assert '<th scope="row">promote</th><td>true</td><td>false</td>' in page
    assert client(settings.tracking_uri).get_run(ref.run_id).data.tags["changed"] == "max_steps=5, promote=true"


def test_a_run_without_records_says_so(settings: Settings) -> None:
    page = _page(settings, log_finished(settings, "old", None, {}))
    assert "This run has no records of its test rows with content keys" in page
    assert "All parameters have their defaults." in page
    assert "Rows that changed most" not in page


def test_the_report_is_logged_with_result_and_description(settings: Settings) -> None:
    ref = log_finished(settings, "a run", make_records(60), {"epochs": 1})
    log_report(settings.tracking_uri, ref.run_id)
    mlflow = client(settings.tracking_uri)
    assert [file.path for file in mlflow.list_artifacts(ref.run_id, "report")] == ["report/report.html"]
    tags = mlflow.get_run(ref.run_id).data.tags
    assert tags["result"].startswith("better: test loss 2.")
    assert tags["mlflow.note.content"].startswith("**The tuned model is better than the base: test loss 2.")
    assert "Scores that are better: test loss, test perplexity" in tags["mlflow.note.content"]
    assert "`epochs=1`" in tags["mlflow.note.content"]
    log_report(settings.tracking_uri, ref.run_id)  # again, as after a retry


def test_the_description_links_to_report_view_and_prefect(settings: Settings) -> None:
    ref = log_finished(settings, "a run", make_records(60))
    run = read_run(settings.tracking_uri, ref.run_id)
    run.tags["prefect.flow_run_url"] = "http://127.0.0.1:4200/runs/flow-run/x"
    served = RunRef("http://user:secret@127.0.0.1:5000", ref.experiment_id, ref.run_id)
    run.__dict__["ref"] = served
    text = describe(run, run_lines(run))
    page = f"http://127.0.0.1:5000/#/experiments/{ref.experiment_id}/runs"
    assert f"[Report]({page}/{ref.run_id}/artifacts/report/report.html?workflowType=machine_learning)" in text
    assert "[Prefect run](http://127.0.0.1:4200/runs/flow-run/x)" in text
    assert f"[All runs]({page}?viewStateShareKey=finetune-scores" in text
    assert "secret" not in text


def test_the_command_writes_the_same_page(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = log_finished(settings, "a run", make_records(60))
    log_report(settings.tracking_uri, ref.run_id)
    file = tmp_path / "page.html"
    assert main([ref.run_id, "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    logged = client(settings.tracking_uri).download_artifacts(ref.run_id, "report/report.html", str(tmp_path))
    assert file.read_text() == Path(logged).read_text()


def test_what_cannot_be_written_is_one_sentence(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = log_finished(settings, "a run", make_records(5))
    assert main([ref.run_id, "--html", "/nowhere/page.html"]) == 1
    assert main([ref.run_id, "--html", str(tmp_path)]) == 1
    assert main(["0" * 32]) == 2
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("the page cannot be written to '/nowhere/page.html': No such file or directory. Name ")
    assert second.startswith(f"the page cannot be written to '{tmp_path}': Is a directory. Name another file")

"""Two runs side by side: what differs, on which rows, and what cannot be compared."""

from __future__ import annotations

import math
import os
import pty
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from finished_runs import HOSTILE, log_finished, make_records, own_settings

from model.evaluation.comparison import compare
from model.evaluation.scores import HUMANEVAL
from ops.settings import Settings
from ops.tracking.compare import compare_runs, comparison_page, comparison_text, main
from ops.tracking.connection import client
from ops.tracking.data import log_table
from ops.tracking.finished import read_run
from ops.tracking.report import run_lines
from ops.tracking.runs import tracked_run


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    settings = own_settings(tmp_path, mlflow_database)
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(settings.data_root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    return settings


@pytest.fixture
def two(settings: Settings) -> tuple[str, str]:
    """Runs of 60 and 55 rows, 50 of them common; the second is better, and has other parameters and data."""
    first = log_finished(settings, "tiny lion", make_records(60, gain=0.5))
    records = make_records(55, gain=0.9, seed=1, first=10)
    second = log_finished(settings, "tiny bear", records, {"epochs": 1}, {"data/train_rows": 80})
    return first.run_id, second.run_id


def test_the_second_run_is_judged_on_common_rows(settings: Settings, two: tuple[str, str]) -> None:
    compared = compare_runs(settings.tracking_uri, *two)
    assert (len(compared.records), compared.only_first, compared.only_second) == (50, 10, 5)
    assert compared.common == "50 test rows are in both runs; left out: 10 that only A has, 5 that only B has."
    loss = compared.lines[0]
    assert (loss.title, loss.verdict, loss.rows) == ("test loss", "better", "50")
    assert compared.parameters == [("epochs", "3", "1")]
    assert compared.data == [("training rows", "60", "80")]
    other = compare_runs(settings.tracking_uri, *reversed(two))
    assert other.lines[0].verdict == "worse"
    assert (other.only_first, other.only_second) == (5, 10)


@pytest.mark.parametrize(("k", "titles"), [(2, ["HumanEval pass@1", "HumanEval pass@k"]), (5, ["HumanEval pass@1"])])
def test_tasks_of_humaneval_are_compared_if_both_have_them(settings: Settings, k: int, titles: list[str]) -> None:
    """pass@k of another k is another score."""
    runs = []
    for name, passes, parameter in (("one", 0.0, 2), ("two", 1.0, k)):
        run = log_finished(settings, name, make_records(40), {"humaneval_k": parameter})
        runs.append(run.run_id)
        tasks = [
            {
                "key": f"HumanEval/{index}", "row": index, "prompt": "p", "reference": "r",
                "base_pass_at_1": 0.0, "base_pass_at_k": 0.0, "base_text": "", "base_samples": 2, "base_passes": 0,
                "pass_at_1": passes, "pass_at_k": passes, "text": "", "samples": 2, "passes": 0,
            }
            for index in range(20)
        ]  # fmt: skip
        log_table(run, tasks, "humaneval")
    lines = compare_runs(settings.tracking_uri, *runs).lines
    found = [line for line in lines if line.title.startswith("HumanEval")]
    assert [line.title for line in found] == titles
    assert {(line.old, line.new, line.verdict) for line in found} == {("0.00%", "100.00%", "better")}
    plain = log_finished(settings, "plain", make_records(40)).run_id
    lines = compare_runs(settings.tracking_uri, runs[0], plain).lines
    assert not [line for line in lines if line.title.startswith("HumanEval")]


def test_tasks_and_rows_are_corrected_together(settings: Settings) -> None:
    """A difference that would count alone is none among nine, in a comparison and in a report."""
    gains = [0.0] * 5 + [0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.3]
    runs = []
    for name in ("one", "two"):
        run = log_finished(settings, name, make_records(40, gain=0.0))
        runs.append(run.run_id)
        tasks = [
            {
                "key": f"HumanEval/{index}", "row": index, "prompt": "p", "reference": "r", "base_text": "",
                "text": "", "base_pass_at_1": 0.0, "pass_at_1": gain if name == "two" else 0.0,
            }
            for index, gain in enumerate(gains)
        ]  # fmt: skip
        log_table(run, tasks, "humaneval")
    second = read_run(settings.tracking_uri, runs[1])
    (alone,) = compare(second.tasks, second.seed, scoreboard=HUMANEVAL)
    assert alone.verdict == "better"
    for lines in (compare_runs(settings.tracking_uri, *runs).lines, run_lines(second)):
        (line,) = [line for line in lines if line.title == "HumanEval pass@1"]
        assert line.verdict == "no difference"


def test_a_run_like_another_is_no_difference(settings: Settings) -> None:
    """Equal records: every score is equal, and so are parameters and data."""
    runs = [log_finished(settings, name, make_records(60)).run_id for name in ("one", "two")]
    compared = compare_runs(settings.tracking_uri, *runs)
    assert {line.verdict for line in compared.lines} == {"no difference"}
    text = comparison_text(compared)
    assert "No difference between B and A is shown" in text
    assert "60 test rows are in both runs, and no other." in text
    assert "All parameters are equal." in text
    assert "The data are equal." in text


@pytest.mark.parametrize("loss", [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])
def test_a_broken_model_is_named(settings: Settings, two: tuple[str, str], loss: float) -> None:
    """JSON has no infinity: the row of a broken model is kept, and the result says that the model is broken."""
    records = make_records(60)
    for row in (3, 7):
        records[row]["loss"] = loss
    run = log_finished(settings, "broken", records)
    said = "B is broken, its loss is infinite on 2 of 60 rows: losses are not compared"
    compared = compare_runs(settings.tracking_uri, two[0], run.run_id)
    assert len(compared.records) == 60
    assert "test loss" not in {line.title for line in compared.lines}
    assert compared.result.startswith(said)
    for shown in (
        comparison_text(compared),
        unescape(comparison_page(compared)),
        _at_a_terminal([two[0], run.run_id]),
    ):
        assert said in " ".join(shown.split())
    other = compare_runs(settings.tracking_uri, run.run_id, two[0])
    assert other.result.startswith("A is broken, its loss is infinite on 2 of 60 rows")


def test_an_infinite_loss_of_an_earlier_version_is_read(settings: Settings, two: tuple[str, str]) -> None:
    """It logged null; a row whose other scores are null has none."""
    records = make_records(60)
    records[3] |= {"loss": None, "chrf": None}
    run = log_finished(settings, "broken", records)
    compared = compare_runs(settings.tracking_uri, two[0], run.run_id)
    assert compared.result.startswith("B is broken, its loss is infinite on 1 of 60 rows")
    assert {line.rows for line in compared.lines if line.title == "chrF"} == {"59"}


def test_null_is_written_as_users_write_it(settings: Settings) -> None:
    runs = [
        log_finished(settings, name, make_records(20), {"max_steps": steps, "train_head": steps is None})
        for name, steps in (("one", None), ("two", 5))
    ]
    compared = compare_runs(settings.tracking_uri, *(run.run_id for run in runs))
    assert compared.parameters == [("max_steps", "null", "5"), ("train_head", "true", "false")]


def test_the_correction_is_said(settings: Settings, two: tuple[str, str]) -> None:
    """On the page, in plain text and on a terminal; and all of them say difference."""
    compared = compare_runs(settings.tracking_uri, *two)
    page = unescape(comparison_page(compared))
    for shown in (comparison_text(compared), page, _at_a_terminal(list(two))):
        words = " ".join(shown.split())
        assert "its p, corrected for the number of scores (Holm), is below 0.05" in words
        assert "difference" in words
    assert ">change<" not in page
    assert "p, corrected" in comparison_text(compared)


def test_text_and_page_say_the_same(settings: Settings, two: tuple[str, str]) -> None:
    compared = compare_runs(settings.tracking_uri, *two)
    text, page = comparison_text(compared), unescape(comparison_page(compared))
    assert compared.result.startswith("B is better than A: test loss")
    for part in (
        compared.result,
        compared.common,
        *two,
        "epochs",
        "tiny lion",
        "tiny bear",
        compared.lines[0].interval,
    ):
        assert part in text, part
        assert part in page, part
    assert "Largest gains or smallest losses of B" in page
    assert page.count("<polyline") == 4, "training and validation of both runs"


def test_a_name_moves_no_cursor(settings: Settings) -> None:
    """Anyone can name a run in MLflow; a parameter on several lines would break the columns."""
    names = "wipe\x1b[2J", "turn\u202e"
    runs = [log_finished(settings, name, make_records(10), {"dataset": f"{name}\n"}).run_id for name in names]
    for text in (comparison_text(compare_runs(settings.tracking_uri, *runs)), _at_a_terminal(runs)):
        assert "\x1b[2J" not in text
        assert "\u202e" not in text
        assert "wipe\\x1b[2J\\n" in text


def test_hostile_names_stay_text(settings: Settings) -> None:
    evil = HOSTILE[0]
    texts = [text for text in HOSTILE if text.isascii()]  # no table holds a lone surrogate
    runs = [
        log_finished(
            settings, f"{evil}{index}", make_records(20, texts=texts, seed=index), {"dataset": f"{evil}{index}"}
        )
        for index in range(2)
    ]
    page = comparison_page(compare_runs(settings.tracking_uri, *(run.run_id for run in runs)))
    assert "<script" not in page
    assert "<img" not in page


def test_versions_and_aliases_name_runs(settings: Settings, two: tuple[str, str]) -> None:
    mlflow = client(settings.tracking_uri)
    mlflow.create_registered_model("gpt2-code-tiny")
    for run_id in two:
        mlflow.create_model_version("gpt2-code-tiny", "nowhere", run_id)
    mlflow.set_registered_model_alias("gpt2-code-tiny", "champion", "2")
    compared = compare_runs(settings.tracking_uri, "models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny@champion")
    assert (compared.first.ref.run_id, compared.second.ref.run_id) == two
    assert ("version", "models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny/2") in compared.identity


def _refused(capsys: pytest.CaptureFixture[str], first: str, second: str, status: int = 2) -> str:
    assert main([first, second]) == status
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line


def test_what_cannot_be_compared_is_one_sentence(
    settings: Settings, two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = two
    mlflow = client(settings.tracking_uri)
    mlflow.create_registered_model("gpt2-code-tiny")
    for _ in range(2):
        mlflow.create_model_version("gpt2-code-tiny", "nowhere", first)
    versions = "models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny/2"
    assert _refused(capsys, *versions) == f"{' and '.join(versions)} are of one run, {first}: name two runs"
    assert _refused(capsys, first, first).endswith("name two runs")
    assert _refused(capsys, first, "0" * 32).startswith(f"there is no run {'0' * 32} at sqlite:")
    assert _refused(capsys, first, "lion").startswith("'lion' is none of a run id")
    assert "models:/gpt2-code-tiny/9 is not registered at" in _refused(capsys, "models:/gpt2-code-tiny/9", second)
    apart = log_finished(settings, "apart", make_records(20, first=1000)).run_id
    sentence = _refused(capsys, first, apart)
    assert sentence.startswith("none of the 60 test rows of the first run is among the 20 of the second")


def test_a_run_from_before_the_records_is_named(
    settings: Settings, two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with tracked_run(settings, "old one", {}, {}) as old:
        pass
    sentence = _refused(capsys, two[0], old.run_id)
    assert sentence.startswith(f"{old.run_id} (old one) cannot be compared: MLflow at sqlite:")
    assert "made by an earlier version" in sentence
    assert two[0] not in sentence


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sentence = _refused(capsys, "0" * 32, "1" * 32, 1)
    assert sentence.startswith("MLflow at http://127.0.0.1:9 does not answer (Connection refused): ")


def test_a_wrong_command_line_has_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["one"])
    assert ended.value.code == 2
    assert "the following arguments are required: B" in capsys.readouterr().err


def _at_a_terminal(arguments: list[str]) -> str:
    """What a command shows where its stdout is a terminal."""
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.tracking.compare", *arguments], stdout=inner, stderr=inner, env=environment
    )
    os.close(inner)
    output = b""
    try:
        while part := os.read(outer, 65_536):
            output += part
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(outer)
    assert process.wait(timeout=120) == 0, output.decode()
    return output.decode()


def test_colours_are_for_terminals(
    settings: Settings, two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe gets plain text, a terminal the same words with colours."""
    page = tmp_path / "page.html"
    assert main([*two, "--html", str(page)]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert plain.endswith(f"{page}\n")
    assert page.read_text() == comparison_page(compare_runs(settings.tracking_uri, *two))
    shown = _at_a_terminal(list(two))
    assert "\x1b[32mbetter" in shown
    for word in ("tiny lion", "tiny bear", "epochs", "left out: 10 that only A has"):
        assert word in shown

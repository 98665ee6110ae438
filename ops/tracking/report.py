"""``finetune report RUN``: write the report of a finished run as one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from model.evaluation.comparison import Difference, compare, judge
from model.evaluation.scores import ALL_SCORES, HUMANEVAL, Record
from model.evaluation.tables import formatted
from ops.mistakes import refuse
from ops.parsers import report_parser
from ops.report.contents import (
    SCORE_NOTES,
    ScoreLine,
    broken,
    extreme_rows,
    failures,
    gains,
    lengths,
    score_lines,
    summary,
)
from ops.report.differences import shortened
from ops.report.pictures import Curve, curves
from ops.report.render import render, write_page
from ops.settings import Settings
from ops.text import as_setting, escape_output, storable
from ops.tracking.connection import client, refusal
from ops.tracking.finished import FinishedRun, read_run
from ops.tracking.models import describe_version
from ops.tracking.runs import EARLY_END_TAG, REPORT_FILE, RESULT_TAG, brief, set_tags

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

NO_ROWS = (
    "This run has no records of its test rows with content keys: it was made by a version before the report. The "
    "scores below are those that it logged; they have no intervals."
)
_FILES = 40  # shown of a data set
_CELL_CHARACTERS = 300
_LEGEND = [("second", "validation"), ("second faint", "training")]


def run_lines(run: FinishedRun, differences: Sequence[Difference] | None = None) -> list[ScoreLine]:
    """The scores of a run's tuned model against those of its base; empty for a run without records.

    Args:
        differences: of its records, if they are known already.
    """
    if not run.records:
        return []
    if differences is None:
        tasks = compare(run.tasks, run.seed, scoreboard=HUMANEVAL) if run.tasks else []
        differences = judge([*compare(run.records, run.seed), *tasks])
    return score_lines(differences, run.metrics)


def report_page(run: FinishedRun, lines: Sequence[ScoreLine]) -> str:
    """The report of a run as HTML.

    Args:
        lines: as ``run_lines`` gives them.
    """
    records = run.records or []
    best, worst = extreme_rows(records)
    return render(
        "report.html",
        title=run.name,
        subtitle=subtitle(run),
        result=summary(lines, "the base", "the tuned model", records) if lines else NO_ROWS,
        links=_links(run),
        lines=lines,
        notes=SCORE_NOTES,
        no_rows=NO_ROWS,
        metric_rows=_metric_rows(run),
        curves=loss_curves([("second", "", run)]),
        legend=_LEGEND,
        validation=_validation(run),
        gains=gains(records, "the base", "the tuned model"),
        failures=failures(records),
        best=best,
        worst=worst,
        data_rows=data_rows(run),
        dropped=dropped_rows(run),
        files=_file_rows(run),
        lengths=lengths(records),
        changed=_changed_rows(run),
        definitions=definitions(lines),
    )


def subtitle(run: FinishedRun) -> str:
    """Size, data and date of a run, on a line."""
    size, data = run.params.get("model_size", "?"), run.params.get("dataset", "?")
    return f"GPT-2 {size} on {_cell(data)}, {run.started:%Y-%m-%d %H:%M} UTC, run {run.ref.run_id}"


def _links(run: FinishedRun) -> list[tuple[str, str]]:
    links = {"MLflow run": run.ref.url, "Prefect run": run.tags.get("prefect.flow_run_url")}
    # A tag can be changed by anyone: javascript: is no address.
    return [(text, url) for text, url in links.items() if url and url.startswith(("http://", "https://"))]


def loss_curves(runs: Sequence[tuple[str, str, FinishedRun]]) -> Any:
    """Training and validation loss of runs in one picture; None without journals.

    Args:
        runs: for each its style, its name in the legend, and the run.
    """
    found = []
    for style, name, run in runs:
        found.append(Curve(f"{name} training".strip(), run.curve("train/loss"), f"{style} faint"))
        found.append(Curve(f"{name} validation".strip(), run.curve("eval/loss"), style))
    ends = [f"{c.name} from {c.points[0][1]:.4f} to {c.points[-1][1]:.4f}" for c in found if c.points]
    return curves(found, "optimizer step", "loss, nats per token", f"Loss curves: {', '.join(ends)}.")


def _file_rows(run: FinishedRun) -> list[tuple[str, str, str]]:
    """The files of the data set; of many, the first."""
    rows = [(_cell(f.get("file")), _cell(f.get("split")), _cell(f.get("rows"))) for f in run.files[:_FILES]]
    more = len(run.files) - len(rows)
    return [*rows, (f"and {more:,} more files", "", "")] if more else rows


def _changed_rows(run: FinishedRun) -> list[tuple[str, str, str]] | None:
    if run.changed is None:
        return None
    return [
        (name, _cell(as_setting(value)), _cell(as_setting(default))) for name, (value, default) in run.changed.items()
    ]


def _cell(value: Any) -> str:
    """A value in a table."""
    return shortened(str(value), _CELL_CHARACTERS)


def _validation(run: FinishedRun) -> str:
    best, step = run.metrics.get("best/eval_loss"), run.metrics.get("best/step")
    if best is None or step is None:
        return ""
    text = f"The result is the checkpoint of step {step:,.0f}. Its validation loss is {best:.4f} nats per token."
    early = run.tags.get(EARLY_END_TAG)
    return f"{text} The training {early}." if early else text


def _metric_rows(run: FinishedRun) -> list[tuple[str, str, str]]:
    return [
        (score.title, formatted(run.metrics[score.base], score.form), formatted(run.metrics[score.tuned], score.form))
        for score in ALL_SCORES
        if score.base in run.metrics and score.tuned in run.metrics
    ]


_DATA_FACTS = {
    "training rows": "data/train_rows",
    "validation rows": "data/validation_rows",
    "test rows": "data/test_rows",
    "training tokens": "data/train_tokens",
    "dropped rows": "data/dropped_rows",
}
_CUT_SHARE = "data/truncated_share"


def data_rows(run: FinishedRun) -> list[tuple[str, str]]:
    """What a run's data were: name, rows, tokens and hash, as far as they were logged."""
    facts = {"data set": _cell(run.params.get("dataset", ""))}
    facts |= {title: _counted(run.fact(name)) for title, name in _DATA_FACTS.items()}
    if share := run.fact(_CUT_SHARE):
        facts["rows cut at max_length"] = f"{float(share):.1%}"
    window = run.tags.get("subset", "")
    facts |= {
        "rows used": "all" if window == "0:" else window,
        "sha256 of all rows used": run.tags.get("data_sha256", ""),
    }
    return [(title, value) for title, value in facts.items() if value]


def _counted(number: str) -> str:
    """A number of rows or tokens with its thousands apart."""
    return f"{int(number):,}" if number.isdecimal() else number


def dropped_rows(run: FinishedRun) -> list[tuple[str, str]]:
    """Dropped rows by reason."""
    prefix = "data/dropped/"
    names = sorted(name for name in {*run.params, *run.metrics} if name.startswith(prefix))
    return [(name.removeprefix(prefix).replace("_", " "), _counted(run.fact(name))) for name in names]


def definitions(lines: Sequence[ScoreLine]) -> list[tuple[str, str]]:
    """What the scores of a page mean."""
    shown = {line.title for line in lines}
    return [(s.title, s.source) for s in ALL_SCORES if s.title in shown or (not shown and s.headline)]


def short_result(lines: Sequence[ScoreLine], records: Sequence[Record] = ()) -> str:
    """The result for a narrow column: the verdict comes first."""
    if said := broken(records, "the base", "the tuned model"):
        return f"broken: {said}"
    first, *others = lines
    same = [line.title for line in others if line.verdict == "worse"]
    text = f"{first.verdict}: {first.title} {first.old} → {first.new} ({first.difference})"
    return f"{text}; worse: {', '.join(same)}" if same else text


def describe(run: FinishedRun, lines: Sequence[ScoreLine]) -> str:
    """A run in Markdown, for its description in MLflow: result, links, data, changed parameters."""
    said = summary(lines[:1], "the base", "the tuned model", run.records or ())
    paragraphs = [f"**{said}**"] if lines else []
    links = [f"[Report]({run.ref.report_url})"] if run.ref.report_url else []
    links += [f"[{text}]({url})" for text, url in _links(run) if text != "MLflow run"]
    links += [f"[All runs]({run.ref.view_url})"] if run.ref.view_url else []
    if links:  # MLflow folds a long description: the links stay visible
        paragraphs.append(" · ".join(links))
    for verdict in ("better", "worse"):
        if titles := [line.title for line in lines if line.verdict == verdict]:
            paragraphs.append(f"Scores that are {verdict}: {', '.join(titles)}.")
    if early := run.tags.get(EARLY_END_TAG):
        paragraphs.append(f"The training {early}.")
    rows = ", ".join(f"{run.fact(f'data/{split}_rows')} {split}" for split in ("train", "validation", "test"))
    paragraphs.append(f"Data: `{_cell(run.params.get('dataset'))}`, rows: {rows}.")
    if run.changed is not None:
        changed = ", ".join(f"`{name}={shortened(as_setting(v), 80)}`" for name, (v, _) in run.changed.items())
        paragraphs.append(f"Parameters that differ from their defaults: {changed or 'none'}.")
    return "\n\n".join(paragraphs)


def log_report(
    tracking_uri: str,
    run_id: str,
    differences: Sequence[Difference] | None = None,
    version: ModelVersion | None = None,
) -> None:
    """Log a run's report as an artifact, and its result as description and tag.

    Args:
        differences: of its records, if they are known already.
        version: the registered version that it tells of, which gets the same description.

    Raises:
        MlflowException: the server cannot be reached.
        ValueError: what the run has is damaged.
    """
    run = read_run(tracking_uri, run_id)
    lines = run_lines(run, differences)
    client(tracking_uri).log_text(run_id, report_page(run, lines), REPORT_FILE)
    text = storable(describe(run, lines))
    tags = {"mlflow.note.content": text}
    if lines:
        tags[RESULT_TAG] = brief(short_result(lines, run.records or ()))
    set_tags(run.ref, tags)
    if version is not None:
        describe_version(client(tracking_uri), version, text)


def main(arguments: list[str] | None = None) -> int:
    """Write a finished run's report. Returns the exit status."""
    from mlflow.exceptions import MlflowException

    given = report_parser().parse_args(arguments)
    uri = Settings.load().tracking_uri
    try:
        run = read_run(uri, given.run)
        write_page(given.html, report_page(run, run_lines(run)))
    except (LookupError, OSError, ValueError) as error:
        return refuse(error)
    except MlflowException as error:
        print(refusal(uri, error), file=sys.stderr)
        return 1
    print(given.html)
    return 0


if __name__ == "__main__":
    escape_output()
    sys.exit(main())

"""``finetune compare A B``: what differs between two runs, and which model is better.

A and B are run ids, models:/NAME/VERSION or models:/NAME@ALIAS.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from model.evaluation.comparison import Difference, compare, join, judge
from model.evaluation.scores import HUMANEVAL
from ops.mistakes import refuse
from ops.parsers import compare_parser
from ops.redaction import without_credentials
from ops.report.contents import SCORE_NOTES, ScoreLine, extreme_rows, failures, gains, score_lines, summary
from ops.report.render import render, write_page
from ops.settings import Settings
from ops.text import escape_output, printable
from ops.tracking.connection import refusal
from ops.tracking.finished import FinishedRun, read_run
from ops.tracking.report import data_rows, definitions, dropped_rows, loss_curves

_SCORE_TITLES = ("score", "A", "B", "difference", "95 % interval", "result", "p, corrected", "rows")
_LEGEND = [("first", "A, validation"), ("second", "B, validation"), ("faint", "training, thin")]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; the second is called better or worse than the first.

    Attributes:
        first, second: the runs, A and B.
        records: the rows that both have, as ``join`` gives them.
        lines: the scores of both tuned models on these rows.
        only_first, only_second: rows that one run alone has; they are left out.
        parameters: those that differ: name, value in A, value in B.
        data: facts about the data that differ, likewise.
    """

    first: FinishedRun
    second: FinishedRun
    records: list[dict[str, Any]]
    lines: list[ScoreLine]
    only_first: int
    only_second: int
    parameters: list[tuple[str, str, str]]
    data: list[tuple[str, str, str]]

    @property
    def result(self) -> str:
        """The result in a sentence."""
        return summary(self.lines, "A", "B", self.records)

    @property
    def common(self) -> str:
        """How many rows were compared, and how many were left out, in a sentence."""
        sentence = f"{len(self.records):,} test rows are in both runs"
        if self.only_first or self.only_second:
            return f"{sentence}; left out: {self.only_first:,} that only A has, {self.only_second:,} that only B has."
        return f"{sentence}, and no other."

    @property
    def identity(self) -> list[tuple[str, str, str]]:
        """Which runs these are: name, id, version and time of each."""
        return [
            ("run", self.first.name, self.second.name),
            ("id", self.first.ref.run_id, self.second.ref.run_id),
            ("version", ", ".join(self.first.versions) or "none", ", ".join(self.second.versions) or "none"),
            ("started, UTC", f"{self.first.started:%Y-%m-%d %H:%M}", f"{self.second.started:%Y-%m-%d %H:%M}"),
        ]


def compare_runs(tracking_uri: str, first: str, second: str) -> Comparison:
    """Compare two runs by their parameters, their data, and their scores on the rows that both have.

    Args:
        first, second: run ids, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    Raises:
        ValueError: both are one run, a run has no records, or they have no row in common.
        LookupError: there is no such run or version.
        MlflowException: the server cannot be reached.
    """
    runs = [read_run(tracking_uri, name) for name in (first, second)]
    a, b = runs
    if a.ref.run_id == b.ref.run_id:
        raise ValueError(f"{first} and {second} are of one run, {a.ref.run_id}: name two runs")
    if missing := [f"{run.asked} ({run.name})" for run in runs if not run.records]:
        raise ValueError(
            f"{' and '.join(missing)} cannot be compared: MLflow at {without_credentials(tracking_uri)} has no "
            "records of test rows with content keys, because the run is not finished or was made by an earlier "
            "version; train it again, or compare the scores on the pages of the runs"
        )
    assert a.records
    assert b.records
    records = join(a.records, b.records)
    return Comparison(
        a,
        b,
        records,
        score_lines(judge([*compare(records, b.seed), *_task_differences(a, b)])),
        len(a.records) - len(records),
        len(b.records) - len(records),
        _differing(_parameters(a), _parameters(b)),
        _differing(dict([*data_rows(a), *_dropped(a)]), dict([*data_rows(b), *_dropped(b)])),
    )


def _task_differences(first: FinishedRun, second: FinishedRun) -> list[Difference]:
    """Differences on HumanEval's tasks, if both runs have them; pass@k only for equal k."""
    if not first.tasks or not second.tasks:
        return []
    equal_k = first.params.get("humaneval_k") == second.params.get("humaneval_k")
    scores = HUMANEVAL if equal_k else HUMANEVAL[:1]
    return compare(join(first.tasks, second.tasks), second.seed, scoreboard=scores)


def _parameters(run: FinishedRun) -> dict[str, str]:
    return {name: value for name, value in run.params.items() if not name.startswith("data/")}


def _dropped(run: FinishedRun) -> list[tuple[str, str]]:
    return [(f"dropped, {reason}", rows) for reason, rows in dropped_rows(run)]


def _differing(first: dict[str, str], second: dict[str, str]) -> list[tuple[str, str, str]]:
    """The entries that are not equal; a hyphen stands for one that is missing."""
    names = dict.fromkeys([*first, *second])
    return [(n, first.get(n, "-"), second.get(n, "-")) for n in names if first.get(n) != second.get(n)]


def comparison_page(compared: Comparison) -> str:
    """The comparison as HTML."""
    best, worst = extreme_rows(compared.records)
    return render(
        "comparison.html",
        title=f"{compared.first.name} (A) and {compared.second.name} (B)",
        result=compared.result,
        identity=compared.identity,
        lines=compared.lines,
        notes=SCORE_NOTES,
        common=compared.common,
        parameters=compared.parameters,
        data_rows=compared.data,
        curves=loss_curves([("first", "A", compared.first), ("second", "B", compared.second)]),
        legend=_LEGEND,
        gains=gains(compared.records, "A", "B"),
        failures=failures(compared.records),
        best=best,
        worst=worst,
        definitions=definitions(compared.lines),
    )


def comparison_text(compared: Comparison) -> str:
    """The comparison as plain text."""
    scores = [(x.title, x.old, x.new, x.difference, x.interval, x.verdict, x.p, x.rows) for x in compared.lines]
    blocks = [
        compared.result,
        _columns([("", "A", "B"), *compared.identity]),
        _columns([_SCORE_TITLES, *scores]),
        SCORE_NOTES,
        compared.common,
        _columns([("parameter", "A", "B"), *compared.parameters])
        if compared.parameters
        else "All parameters are equal.",
        _columns([("data", "A", "B"), *compared.data]) if compared.data else "The data are equal.",
    ]
    return "\n\n".join(blocks) + "\n"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def show(compared: Comparison) -> None:
    """Print the comparison: with rich where stdout is a terminal, else as plain text."""
    if not sys.stdout.isatty():
        print(comparison_text(compared), end="")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    colours = {"better": "green", "worse": "red"}

    def table(rows: Sequence[Sequence[str]], *titles: str) -> None:
        made = Table(box=None, pad_edge=False, header_style="bold")
        for title in titles:
            made.add_column(title, overflow="fold")
        for row in rows:
            # Text, not markup: values of parameters may hold square brackets.
            made.add_row(*(Text(printable(cell), style=colours.get(cell, "")) for cell in row))
        console.print(made)
        console.print()

    console.print(Text(compared.result, style="bold"))
    console.print()
    table(compared.identity, "", "A", "B")
    scores = [(x.title, x.old, x.new, x.difference, x.interval, x.verdict, x.p, x.rows) for x in compared.lines]
    table(scores, *_SCORE_TITLES)
    console.print(Text(SCORE_NOTES))
    console.print()
    console.print(Text(compared.common))
    console.print()
    for rows, title, nothing in (
        (compared.parameters, "parameter", "All parameters are equal."),
        (compared.data, "data", "The data are equal."),
    ):
        if rows:
            table(rows, title, "A", "B")
        else:
            console.print(nothing)


def main(arguments: list[str] | None = None) -> int:
    """Print a comparison, and write it as a page. Returns the exit status."""
    from mlflow.exceptions import MlflowException

    given = compare_parser().parse_args(arguments)
    uri = Settings.load().tracking_uri
    try:
        compared = compare_runs(uri, given.first, given.second)
        if given.html:
            write_page(given.html, comparison_page(compared))
    except (LookupError, OSError, ValueError) as error:
        return refuse(error)
    except MlflowException as error:
        print(refusal(uri, error), file=sys.stderr)
        return 1
    show(compared)
    if given.html:
        print(given.html)
    return 0


if __name__ == "__main__":
    escape_output()
    sys.exit(main())

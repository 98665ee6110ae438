"""What ``make run`` prints at the end: scores, samples and seconds, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.evaluation.comparison import Difference
from model.evaluation.tables import score_table
from tasks.references import TrialResult
from tasks.trial_records import ranked

_SHOWN_LINES = 8  # of a completion


def before_and_after(
    metrics: Mapping[str, float], differences: Sequence[Difference], samples: Sequence[Mapping[str, Any]]
) -> str:
    """The untouched base beside the tuned model, as a table of at most 80 columns, and a few samples."""
    lines = ["", f"{'held-out rows':<16}{'base':>9}{'tuned':>8}{'difference':>11}  95 % interval"]
    for line in score_table(metrics, differences):
        shown = (
            f"{line.title:<16}{line.base:>9}{line.tuned:>8}{line.difference:>11}  {line.interval:<20} {line.verdict}"
        )
        lines.append(shown.rstrip())
    ceilings = [f"{line.title} {line.reference}" for line in score_table(metrics) if line.reference]
    if ceilings:
        lines.append(f"the references themselves: {', '.join(ceilings)}")
    for sample in samples:
        lines += ["", sample["prompt"]]
        for title in ("base", "tuned"):
            lines += [f"  {title}:", *(f"    {line}" for line in sample[title].splitlines()[:_SHOWN_LINES])]
    return "\n".join(lines) + "\n"


def trial_table(results: Sequence[TrialResult]) -> str:
    """The trials of a sweep, best first, as a table."""
    width = max(len("trial"), *(len(each.trial.name) for each in results))
    lines = [f"{'trial':<{width}}{'validation loss':>18}{'at step':>10}  outcome"]
    for each in ranked(results):
        found = each.outcome
        loss = "none" if found.best_eval_loss is None else f"{found.best_eval_loss:.4f}"
        lines.append(f"{each.trial.name:<{width}}{loss:>18}{found.best_step:>10}  {found.describe()}")
    return "\n".join(lines) + "\n"


def time_table(seconds: Mapping[str, float]) -> str:
    """Seconds and share of each step, and their sum, as a table."""
    total = sum(seconds.values())
    lines = [f"{'time':<16}{'seconds':>10}{'share':>10}"]
    for step, taken in (*seconds.items(), ("total", total)):
        lines.append(f"{step:<16}{taken:>10.2f}{taken / total:>10.1%}")
    return "\n".join(lines) + "\n"

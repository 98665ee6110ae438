"""What ``make run`` prints at the end: scores, samples and seconds, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.evaluation.scores import score_table
from tasks.references import TrialResult
from tasks.trial_records import ranked

_SHOWN_LINES = 8  # of a completion


def before_and_after(metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> str:
    """The untouched base beside the tuned model, as a table, and a few samples."""
    lines = ["", f"{'held-out rows':<18}{'base':>10}{'tuned':>10}"]
    lines += [
        f"{title:<18}{base:>10}{tuned:>10}  {unit}".rstrip() for title, base, tuned, unit in score_table(metrics)
    ]
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

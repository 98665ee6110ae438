"""Texts about a finished run: the card of its model, and Prefect's artifact with scores and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.evaluation.comparison import Difference
from model.evaluation.scores import describe_failures, score_sources
from model.evaluation.tables import score_table_markdown
from model.files import sha256_json
from model.net.prompt import format_prompt
from ops.hub import DEFAULT_DATASET, PINNED_WEIGHTS
from ops.sandbox.guards import INSTALL
from ops.tracking.runs import RunRef
from tasks.references import EvaluationRef, Sources, TrainingRef

_WEIGHTS_LICENCE = "OpenAI's GPT-2 weights are under a modified MIT licence."
_ROWS_LICENCE = "CC BY-NC 4.0: a model trained on them is for non-commercial use."
_SHOWN = 5  # samples in Prefect's artifact
_SHOWN_CHARACTERS = 600


def model_card(
    sources: Sources, training: TrainingRef, metrics: Mapping[str, float], differences: Sequence[Difference]
) -> str:
    """The README.md of a registered version: origin, licences, prompt format and scores."""
    model, plan = training.model, training.plan
    head = ["pipeline_tag: text-generation"]
    if sources.weights.revision:
        head.insert(0, f"base_model: {model.source}")
    lines = [
        "---",
        *head,
        "---",
        f"# GPT-2 {model.model_size}, fine-tuned for code instructions",
        "",
        *_origins(sources, training),
        f"- Trained: {plan.trainable:,} of {plan.total:,} parameters; the other tensors equal the base's.",
        f"- Context: {model.config['n_positions']} tokens.",
        "",
        "The model was trained on prompts of this form, and answers behind the last line:",
        "",
        *(f"    {line}".rstrip() for line in format_prompt({"prompt": "<the request>"}).splitlines()),
        "",
        "## Scores",
        "",
        *score_table_markdown(metrics, differences),
        "",
        *score_sources(metrics),
        "",
    ]
    return "\n".join(lines)


def _origins(sources: Sources, training: TrainingRef) -> list[str]:
    """Base and data, with the licences that are known to apply."""
    model, data = training.model, sources.dataset
    # A registered version that this one started from passes its licences on.
    card = Path(model.directory) / "README.md"
    inherited = card.read_text() if model.source.startswith("models:/") and card.exists() else ""
    lines = [f"- Base: {model.source}, {_origin(sources.weights.revision, model.sha256)}."]
    if model.source in {repo for repo, _ in PINNED_WEIGHTS.values()} or _WEIGHTS_LICENCE in inherited:
        lines.append(f"  {_WEIGHTS_LICENCE}")
    files = sha256_json([file.sha256 for files in data.splits.values() for file in files])
    lines.append(f"- Data: {data.source}, {_origin(data.revision, files)}.")
    if data.source == DEFAULT_DATASET:
        lines.append(f"  Its rows are under {_ROWS_LICENCE}")
    elif _ROWS_LICENCE in inherited:
        lines.append(f"  {DEFAULT_DATASET}'s rows, which the base was trained on, are under {_ROWS_LICENCE}")
    return lines


def _origin(revision: str | None, sha256: str) -> str:
    return f"hub commit {revision}" if revision else f"a local copy (sha256 {sha256[:12]}), licence not known here"


def sample_report(samples: list[dict[str, Any]], evaluation: EvaluationRef, run: RunRef, uri: str) -> str:
    """The text of Prefect's artifact: scores of both models, a few completions, and a link to the MLflow run."""
    metrics = evaluation.metrics
    report = f"[report]({run.report_url}), " if run.report_url else ""
    lines = [
        f"{report}MLflow run {run.link}, model `{uri}`",
        "",
        *score_table_markdown(metrics, evaluation.differences),
    ]
    if evaluation.failures:
        lines += ["", f"Commonest reasons of failure, tuned model: {describe_failures(evaluation.failures)}"]
    refused = metrics.get("untuned/not_executed", 0) + metrics.get("sample/not_executed", 0)
    if refused:
        lines += ["", f"{refused:.0f} completions were not executed and count as failed: {INSTALL}"]
    for sample in samples[:_SHOWN]:
        lines += ["", f"### Row {sample['row']}"]
        for title, key in (("Prompt", "prompt"), ("Reference", "reference"), ("Base", "base"), ("Tuned", "tuned")):
            # Indented, not fenced: a completion may hold a fence of its own.
            text = sample[key][:_SHOWN_CHARACTERS].splitlines()
            if not sample[key].strip():
                text = [f"(only white space, {len(sample[key])} characters)"]
            lines += ["", f"{title}:", "", *(f"    {line}" for line in text)]
    return "\n".join(lines) + "\n"

"""Texts about a finished run: the card of its model, and Prefect's artifact with scores and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.evaluation.comparison import Difference
from model.evaluation.scores import ALL_SCORES, HUMANEVAL, VALIDATION_LOSS, Score, describe_failures, score_sources
from model.evaluation.tables import score_table_markdown
from model.files import sha256_json
from model.net.prompt import format_prompt
from ops.hub import DEFAULT_DATASET, PINNED_WEIGHTS
from ops.sandbox.guards import INSTALL
from ops.tracking.registry import model_name
from ops.tracking.runs import RunRef
from tasks.licences import (
    CODEALPACA_ROWS,
    DEMO_ROWS,
    EMBEDDED_WEIGHTS,
    OPENAI_WEIGHTS,
    UNKNOWN,
    Licence,
    inherited_licences,
    metadata,
)
from tasks.references import DatasetRef, EvaluationRef, ModelRef, Sources, TrainingRef

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_HUMANEVAL = "openai/openai_humaneval"  # on the hub
_SHOWN = 5  # samples in Prefect's artifact
_SHOWN_CHARACTERS = 600


def model_card(
    sources: Sources, training: TrainingRef, metrics: Mapping[str, float], differences: Sequence[Difference]
) -> str:
    """The README.md of a registered version: origin, licences, prompt format, use and scores.

    Its metadata is that of the Hugging Face hub, with the scores as the results of an evaluation.
    """
    from huggingface_hub import ModelCard

    model, plan = training.model, training.plan
    name = model_name(model.model_size)
    prompt = format_prompt({"prompt": "<the request>"})
    lines = [
        f"# GPT-2 {model.model_size}, fine-tuned for code instructions",
        "",
        *_origins(sources, training),
        f"- Trained: {plan.trainable:,} of {plan.total:,} parameters; the other tensors equal the base's.",
        f"- Context: {model.config['n_positions']} tokens, for the prompt and the answer together.",
        "",
        "## Prompt format",
        "",
        "The model was trained on prompts of this form, and answers behind the last line:",
        "",
        *(f"    {line}".rstrip() for line in prompt.splitlines()),
        "",
        "The tokenizer's chat template renders messages in this form. The model was trained on one question and one "
        "answer, with a system message in front of the question at most:",
        "",
        "```python",
        "import transformers",
        "",
        'ask = transformers.pipeline("text-generation", "DIRECTORY")  # of these files, or the repository on the hub',
        'ask([{"role": "user", "content": "<the request>"}], max_new_tokens=128)',
        "```",
        "",
        "`mlflow models serve` takes the request alone, renders it, and gives back the answer alone:",
        "",
        "```",
        f"mlflow models serve --model-uri models:/{name}/VERSION --env-manager local --port 5001",
        """curl http://127.0.0.1:5001/invocations --json '{"inputs": ["<the request>"], "params": """
        """{"max_new_tokens": 128}}'""",
        "```",
        "",
        "## Scores",
        "",
        *score_table_markdown(metrics, differences),
        "",
        *score_sources(metrics),
        "",
    ]
    data = _metadata(sources, training, metrics, name)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines)))


def _metadata(sources: Sources, training: TrainingRef, metrics: Mapping[str, float], name: str) -> ModelCardData:
    """The card's metadata; base and data sets are named if the hub has them."""
    from huggingface_hub import ModelCard, ModelCardData

    model, data = training.model, sources.dataset
    before = ModelCard(inherited, ignore_metadata_errors=True).data if (inherited := _inherited(model)) else None
    used = [*(getattr(before, "datasets", None) or []), *([data.source] if data.revision else [])]
    return ModelCardData(
        model_name=name,
        base_model=model.source if sources.weights.revision else getattr(before, "base_model", None),
        datasets=list(dict.fromkeys(used)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["code"],
        eval_results=[_result(score, data, metrics) for score in ALL_SCORES if score.tuned in metrics],
        **metadata([*_of_weights(model), _of_rows(data)]),
    )


def _result(score: Score, data: DatasetRef, metrics: Mapping[str, float]) -> EvalResult:
    """A score as an entry of the hub's model index."""
    from huggingface_hub import EvalResult

    rows, revision = (data.source if data.revision else Path(data.source).name), data.revision
    if score in HUMANEVAL:
        rows, revision = _HUMANEVAL, None
    return EvalResult(
        task_type="text-generation",
        dataset_type=rows,
        dataset_name=rows,
        dataset_revision=revision,
        dataset_split="validation" if score is VALIDATION_LOSS else "test",
        metric_type=score.tuned.rpartition("/")[2],
        metric_name=score.title,
        metric_value=metrics[score.tuned],
    )


def _inherited(model: ModelRef) -> str:
    """The card of the registered version that a training started from. No other card is believed."""
    card = Path(model.directory) / "README.md"
    return card.read_text() if model.source.startswith("models:/") and card.exists() else ""


def _of_weights(model: ModelRef) -> list[Licence]:
    """The licences that bind the base."""
    if model.source.startswith("models:/"):
        return inherited_licences(_inherited(model))
    if model.source == "embedded":
        return [EMBEDDED_WEIGHTS]
    return [OPENAI_WEIGHTS if model.source in {repo for repo, _ in PINNED_WEIGHTS.values()} else UNKNOWN]


def _of_rows(data: DatasetRef) -> Licence:
    """The licence of the rows."""
    return {DEFAULT_DATASET: CODEALPACA_ROWS, "demo": DEMO_ROWS}.get(data.source, UNKNOWN)


def _origins(sources: Sources, training: TrainingRef) -> list[str]:
    """Base and data, with the licences that are known to apply."""
    model, data = training.model, sources.dataset
    weights, rows = _of_weights(model), _of_rows(data)
    files = sha256_json([file.sha256 for files in data.splits.values() for file in files])
    return [
        f"- Base: {_origin(model.source, sources.weights.revision, model.sha256)}",
        *(f"  {licence.sentence}" for licence in weights if licence is not rows or licence is UNKNOWN),
        f"- Data: {_origin(data.source, data.revision, files)}",
        f"  {rows.sentence}",
    ]


def _origin(source: str, revision: str | None, sha256: str) -> str:
    """Where weights or rows are from. Of a path the name alone is said: a card may be published."""
    if revision:
        return f"{source}, hub commit {revision}."
    named = source in ("embedded", "demo") or source.startswith("models:/")
    return f"{source if named else Path(source).name}, a local copy (sha256 {sha256[:12]})."


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

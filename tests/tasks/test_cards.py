"""The model card: metadata of the hub, and licences that are handed down from version to version."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from model import GPTModel
from model.demo import EMBEDDED_BASE
from model.engine.config import TrainConfig
from model.evaluation.scores import HUMANEVAL, SCOREBOARD, VALIDATION_LOSS
from model.net.config import FreezeConfig
from model.net.freezing import plan_freeze
from model.net.prompt import format_prompt
from ops.hub import DEFAULT_DATASET
from tasks.cards import model_card
from tasks.references import DatasetRef, ModelRef, Sources, TokensRef, TrainingRef, WeightsRef

WEIGHTS, ROWS = (
    "OpenAI's GPT-2 weights are under a modified MIT licence",
    "are under CC BY-NC 4.0: a model trained on them is for non-commercial use",
)


(LOSS,) = [score for score in SCOREBOARD if score.name == "loss"]
METRICS = {LOSS.base: 2.5, LOSS.tuned: 1.25}


def _card(
    directory: Path,
    source: str,
    dataset: str,
    revision: str | None = None,
    commit: str | None = None,
    metrics: dict[str, float] = METRICS,
) -> str:
    network = GPTModel.from_pretrained(EMBEDDED_BASE)
    weights = WeightsRef(source, commit, str(directory), {}, str(directory), {})
    model = ModelRef("tiny", str(directory), str(directory), source, "0" * 64, asdict(network.config), {}, {})
    plan = plan_freeze(network.config, FreezeConfig(num_unfrozen_layers=2))
    training = TrainingRef(TokensRef("", "", "", {}), model, plan, TrainConfig(), {}, "", "")
    return model_card(Sources(DatasetRef(dataset, revision, {}), weights), training, metrics, [])


def _fields(card: str) -> dict[str, Any]:
    """The metadata, read back by the hub's own library, which refuses a model index that is not right."""
    return ModelCard(card).data.to_dict()


HUB_BASE, HUB_COMMIT = "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.mark.parametrize("dataset", ["rows.jsonl", "demo", DEFAULT_DATASET])
def test_licences_are_handed_down(tmp_path: Path, dataset: str) -> None:
    """A champion of a champion of OpenAI's weights and CodeAlpaca's rows is bound by both, whatever it saw last."""
    (tmp_path / "README.md").write_text(_card(tmp_path, HUB_BASE, DEFAULT_DATASET, "1" * 40, HUB_COMMIT))
    for _ in range(2):
        card = _card(tmp_path, "models:/gpt2-code-tiny/1", dataset)
        assert card.count(WEIGHTS) == card.count(ROWS) == 1
        fields = _fields(card)
        assert fields["license"] == ("unknown" if dataset == "rows.jsonl" else "cc-by-nc-4.0")
        assert fields["base_model"] == HUB_BASE
        assert fields["datasets"] == [DEFAULT_DATASET]
        (tmp_path / "README.md").write_text(card)


def test_a_card_of_the_first_release_binds_too(tmp_path: Path) -> None:
    """Its sentences about the rows had other words around the same middle."""
    old = f"- Data: {DEFAULT_DATASET}, hub commit 1.\n  Its rows {ROWS}.\n- Base: x\n  {WEIGHTS}."
    (tmp_path / "README.md").write_text(old)
    card = _card(tmp_path, "models:/gpt2-code-tiny/1", "demo")
    assert card.count(WEIGHTS) == card.count(ROWS) == 1
    assert _fields(card)["license"] == "cc-by-nc-4.0"


def test_a_local_directorys_card_is_not_believed(tmp_path: Path) -> None:
    """Only what this project wrote is read: a stranger's README says nothing about the licence."""
    (tmp_path / "README.md").write_text(f"{WEIGHTS}. {ROWS}")
    card = _card(tmp_path, str(tmp_path), "rows.jsonl")
    assert WEIGHTS not in card
    assert ROWS not in card
    assert _fields(card)["license"] == "unknown"


@pytest.mark.parametrize(
    ("source", "dataset", "licence", "name"),
    [
        ("embedded", "demo", "other", "psf-2.0"),
        (HUB_BASE, "demo", "other", "modified-mit"),
        (HUB_BASE, DEFAULT_DATASET, "cc-by-nc-4.0", None),
        ("embedded", "rows.jsonl", "unknown", None),
        ("some/weights", DEFAULT_DATASET, "unknown", None),
    ],
)
def test_the_licence_of_the_metadata(
    tmp_path: Path, source: str, dataset: str, licence: str, name: str | None
) -> None:
    """The one that binds most; where one part is unknown, so is the whole."""
    fields = _fields(_card(tmp_path, source, dataset))
    assert (fields["license"], fields.get("license_name")) == (licence, name)


def test_the_evaluation_is_in_the_metadata(tmp_path: Path) -> None:
    """Each score that was computed is a result of the model index, of the split that it was computed on."""
    both = METRICS | {VALIDATION_LOSS.base: 2.0, VALIDATION_LOSS.tuned: 1.0}
    both |= {HUMANEVAL[0].base: 0.0, HUMANEVAL[0].tuned: 0.0125}
    fields = _fields(_card(tmp_path, HUB_BASE, DEFAULT_DATASET, "1" * 40, HUB_COMMIT, both))
    assert {name: fields[name] for name in ("base_model", "datasets", "pipeline_tag", "library_name")} == {
        "base_model": HUB_BASE,
        "datasets": [DEFAULT_DATASET],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
    }
    (index,) = fields["model-index"]
    assert index["name"] == "gpt2-code-tiny"
    found = {
        (result["dataset"]["type"], result["dataset"]["split"], metric["name"]): (metric["type"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert found == {
        (DEFAULT_DATASET, "validation", "validation loss"): ("eval_loss", 1.0),
        (DEFAULT_DATASET, "test", "test loss"): ("loss", 1.25),
        ("openai/openai_humaneval", "test", "HumanEval pass@1"): ("pass_at_1", 0.0125),
    }
    assert {result["dataset"].get("revision") for result in index["results"]} == {"1" * 40, None}


def test_no_path_of_this_machine_is_in_a_card(tmp_path: Path) -> None:
    """A card may be published: of local weights and rows it has the names alone."""
    card = _card(tmp_path, str(tmp_path / "weights"), str(tmp_path / "rows.jsonl"))
    assert str(tmp_path) not in card
    assert "- Base: weights, a local copy (sha256 000000000000)." in card
    assert "- Data: rows.jsonl, a local copy" in card


def test_the_card_shows_the_prompt_format_and_the_scores(tmp_path: Path) -> None:
    """The prompt is the renderer's own, and the scores are those of the scoreboard that were computed."""
    card = _card(tmp_path, "embedded", "rows.jsonl")
    lines = "\n".join(line.removeprefix("    ") for line in card.splitlines())
    assert format_prompt({"prompt": "<the request>"}).rstrip() in lines
    assert "| test loss | 2.5000 | 1.2500 |  |  |  | nats per token | lower |" in card
    assert "- test loss: cross-entropy on response tokens" in card
    assert "pass rate" not in card

"""The model card: licences are handed down from version to version."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from model import GPTModel
from model.demo import EMBEDDED_BASE
from model.engine.config import TrainConfig
from model.net.config import FreezeConfig
from model.net.freezing import plan_freeze
from model.net.prompt import format_prompt
from ops.hub import DEFAULT_DATASET
from tasks.cards import model_card
from tasks.references import DatasetRef, ModelRef, Sources, TokensRef, TrainingRef, WeightsRef

WEIGHTS, ROWS = (
    "OpenAI's GPT-2 weights are under a modified MIT licence",
    "CC BY-NC 4.0: a model trained on them is for",
)


def _card(directory: Path, source: str, dataset: str) -> str:
    network = GPTModel.from_pretrained(EMBEDDED_BASE)
    weights = WeightsRef(source, None, str(directory), {}, str(directory), {})
    model = ModelRef("tiny", str(directory), str(directory), source, "0" * 64, asdict(network.config), {}, {})
    plan = plan_freeze(network.config, FreezeConfig(num_unfrozen_layers=2))
    training = TrainingRef(TokensRef("", "", "", {}), model, plan, TrainConfig(), {}, "", "")
    metrics = {"untuned/test_loss": 2.5, "test/loss": 1.25}
    return model_card(Sources(DatasetRef(dataset, None, {}), weights), training, metrics, [])


@pytest.mark.parametrize("dataset", ["rows.jsonl", DEFAULT_DATASET])
def test_licences_are_handed_down(tmp_path: Path, dataset: str) -> None:
    """A champion of a champion of OpenAI's weights and CodeAlpaca's rows is bound by both, whatever it saw last."""
    (tmp_path / "README.md").write_text(_card(tmp_path, "openai-community/gpt2", DEFAULT_DATASET))
    for _ in range(2):
        card = _card(tmp_path, "models:/gpt2-code-tiny/1", dataset)
        assert card.count(WEIGHTS) == card.count(ROWS) == 1
        (tmp_path / "README.md").write_text(card)


def test_a_local_directorys_card_is_not_believed(tmp_path: Path) -> None:
    """Only what this project wrote is read: a stranger's README says nothing about the licence."""
    (tmp_path / "README.md").write_text(f"{WEIGHTS}. {ROWS}")
    card = _card(tmp_path, str(tmp_path), "rows.jsonl")
    assert WEIGHTS not in card
    assert ROWS not in card


def test_the_card_shows_the_prompt_format_and_the_scores(tmp_path: Path) -> None:
    """The prompt is the renderer's own, and the scores are those of the scoreboard that were computed."""
    card = _card(tmp_path, "embedded", "rows.jsonl")
    lines = "\n".join(line.removeprefix("    ") for line in card.splitlines())
    assert format_prompt({"prompt": "<the request>"}).rstrip() in lines
    assert "| test loss | 2.5000 | 1.2500 |  |  |  | nats per token | lower |" in card
    assert "- test loss: cross-entropy on response tokens" in card
    assert "pass rate" not in card

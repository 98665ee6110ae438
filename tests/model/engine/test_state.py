"""The state of a training and its form in state.json."""

from __future__ import annotations

import json

from model.engine.state import TrainingState

STATE = TrainingState("me", 512, step=8, base_eval_loss=0.1 + 0.2, best_eval_loss=0.25, best_step=4, journal_lines=11)


def test_names_in_the_file() -> None:
    """Checkpoints of earlier versions have these keys, in this order, and are resumed."""
    assert json.dumps(STATE.to_json()) == (
        '{"identity": "me", "base_eval_loss": 0.30000000000000004, "best_eval_loss": 0.25, "best_step": 4, '
        '"journal_lines": 11, "micro_batch_tokens": 512, "step": 8, "world": 1}'
    )


def test_round_trip() -> None:
    """Every digit is restored; the tokens per pass are those of the attempt that resumes."""
    record = {**json.loads(json.dumps(STATE.to_json())), "files": {}}
    assert TrainingState.from_json(record, 512) == STATE
    assert TrainingState.from_json(record, 256).micro_batch_tokens == 256

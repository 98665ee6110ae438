"""Early stopping: a training ends when several validations in a row have found no lower loss."""

from __future__ import annotations

from model.engine.config import TrainConfig


def ran_out(step: int, best_step: int, config: TrainConfig) -> bool:
    """Whether ``patience`` validations since the best one have found no lower loss.

    Validations are ``eval_freq`` steps apart, so that step and best step say how many there were. A checkpoint has
    both: a resumed training ends at the same step as an uninterrupted one.

    Args:
        step: optimizer steps done; where it is a multiple of eval_freq, its validation is over.
        best_step: step of the lowest validation loss so far.
    """
    return config.patience is not None and step - best_step >= config.patience * config.eval_freq


def early_end(steps: int, total: int, config: TrainConfig) -> str:
    """A sentence about a training that ended early."""
    return (
        f"ended early after step {steps} of {total}: {config.patience} validations in a row found no lower loss "
        "(patience)"
    )

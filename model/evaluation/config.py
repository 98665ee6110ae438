"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from model.parameters import Count, NonNegative, Positive, Seeded, WholeNumber, WholeShare


@dataclass(frozen=True)
class SamplingConfig(Seeded):
    """How completions are drawn; base and tuned model draw with the same seed."""

    sample_rows: WholeNumber = 16
    """Prompts of the test split, from its beginning, that both models complete."""
    pass_rows: WholeNumber = 500
    """Rows of the test split with tests, from its beginning, whose greedy completions are run in a sandbox."""
    max_new_tokens: Count = 128
    """Length limit of a completion."""
    temperature: NonNegative = 0.7
    """Divides the logits; 0 is greedy."""
    top_k: Count | None = 50
    """Sample among this many most probable tokens; null sets no limit."""
    top_p: Annotated[WholeShare, Field(gt=0)] | None = 0.95
    """Sample within this probability mass; null sets no limit."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of tokens that the text has, and multiplies negative ones; 1 changes nothing."""

"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from model.parameters import Count, NonNegative, Positive, Seeded, WholeNumber, WholeShare


@dataclass(frozen=True)
class SamplingConfig(Seeded):
    """How completions are drawn; base and tuned model draw with the same seed."""

    score_rows: Count | None = None
    """Rows of the test split, from its beginning, that base and tuned model are scored on; null takes all."""
    sample_rows: WholeNumber | None = None
    """Of these, the rows whose prompts both models complete, from the beginning; null completes all."""
    pass_rows: WholeNumber | None = None
    """Of the scored rows with tests, those whose greedy completions are run in a sandbox; null runs all."""
    humaneval_samples: WholeNumber = 0
    """Completions of each of HumanEval's 164 tasks, for both models; 0 leaves HumanEval out."""
    humaneval_k: Count = 1
    """k of HumanEval's pass@k, at most humaneval_samples; pass@1 is always reported."""
    max_new_tokens: Count = 128
    """Length limit of a completion."""
    temperature: NonNegative = 0.7
    """Divides the logits; 0 is greedy."""
    top_k: Count | None = 50
    """Sample among this many most probable tokens; null sets no limit."""
    top_p: Annotated[WholeShare, Field(gt=0)] | None = 0.95
    """Sample within this probability mass; null sets no limit."""
    repetition_penalty: Annotated[Positive, Field(ge=1e-6)] = 1.0
    """Divides positive logits of tokens that the text has, and multiplies negative ones; 1 changes nothing."""

"""Base and tuned model side by side: a loss for every row, and completions for a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from model.data.tokens import CodeAlpacaDataset
from model.net.device import autocast
from model.net.gpt import GPTModel
from model.net.prompt import encode_prompts
from model.net.sampling import generate
from model.parameters import Count, NonNegative, Seeded, WholeNumber, internal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    """Sample within this probability mass; null sets no limit."""
    batch_size: int = internal(64)
    """Prompts generated together."""


def complete(
    model: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: SamplingConfig,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[str, bool]]:
    """Answer prompts; each prompt is rendered exactly as in training.

    Returns:
        For each, the text without the end-of-text token, and whether the model stopped by itself.
    """
    answers: list[tuple[str, bool]] = []
    for start in range(0, len(prompts), config.batch_size):
        ids = encode_prompts(tokenizer, prompts[start : start + config.batch_size])
        with autocast(model.wte.weight.device, dtype):
            new = generate(
                model,
                ids,
                config.max_new_tokens,
                tokenizer.eos_token_id,
                config.temperature,
                config.top_k,
                config.top_p,
                config.seed + start,
            )
        for tokens in new:
            stopped = bool(tokens) and tokens[-1] == tokenizer.eos_token_id
            answers.append((str(tokenizer.decode(tokens[:-1] if stopped else tokens)), stopped))
    return answers


def row_table(
    dataset: CodeAlpacaDataset, base: tuple[np.ndarray, np.ndarray], tuned: tuple[np.ndarray, np.ndarray]
) -> list[dict[str, Any]]:
    """One record per row: its number in the source, prompt, response tokens, loss of both models (nats/token)."""
    return [
        {
            "row": row["row"],
            "prompt": row["prompt"],
            "tokens": int(count),
            "base_loss": float(before / count),
            "loss": float(after / count),
        }
        for row, before, after, count in zip(dataset.rows, base[0], tuned[0], tuned[1], strict=True)
    ]


def sample_table(
    rows: list[dict[str, Any]], base: list[tuple[str, bool]], tuned: list[tuple[str, bool]]
) -> list[dict[str, Any]]:
    """One record per prompt: reference, both completions, and which of them stopped by itself."""
    return [
        {
            "row": row["row"],
            "prompt": row["prompt"],
            "reference": row["completion"],
            "base": before,
            "base_stopped": before_stopped,
            "tuned": after,
            "tuned_stopped": after_stopped,
        }
        for row, (before, before_stopped), (after, after_stopped) in zip(rows, base, tuned, strict=True)
    ]


def pass_table(rows: list[dict[str, Any]], base: list[bool], tuned: list[bool]) -> list[dict[str, Any]]:
    """One record per task family: rows with tests, and the share of them that each model's completion passes."""
    families: dict[str, list[tuple[bool, bool]]] = {}
    for row, before, after in zip(rows, base, tuned, strict=True):
        families.setdefault(row["family"], []).append((before, after))
    return [
        {
            "family": family,
            "rows": len(passes),
            "base": sum(before for before, _ in passes) / len(passes),
            "tuned": sum(after for _, after in passes) / len(passes),
        }
        for family, passes in sorted(families.items())
    ]

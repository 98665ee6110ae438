"""Completions of prompts by a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from model.evaluation.config import SamplingConfig
from model.generation.generating import generate
from model.net.device import autocast
from model.net.gpt import GPTModel
from model.net.prompt import encode_prompts, heading_lengths
from model.net.sampling import crop
from model.net.tokenizer import unknown_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOG = logging.getLogger(__name__)


class Completion(NamedTuple):
    """An answer.

    Attributes:
        text: without the end-of-text token.
        stopped: whether the model ended it by end-of-text; False where it was cut at max_new_tokens.
    """

    text: str
    stopped: bool


_OPENING, _CLOSING = re.compile(r"[ \t]*```[^`]*"), re.compile(r"[ \t]*```[ \t]*")  # lines of a fence


def extract_code(text: str) -> str:
    """The code of a completion: what stands in its Markdown fence, if it has exactly one; else all of it.

    Lines are read once: one expression for the whole fence takes minutes for a text of many open fences.
    """
    blocks: list[list[str]] = []
    block: list[str] | None = None
    for line in text.split("\n"):
        if block is None:
            block = [] if _OPENING.fullmatch(line) else None
        elif _CLOSING.fullmatch(line):
            blocks.append(block)
            block = None
        else:
            block.append(line)
    return "".join(f"{line}\n" for line in blocks[0]) if len(blocks) == 1 else text


def _fit(prompt: list[int], head: int, context: int, new_tokens: int) -> tuple[list[int], int]:
    """A prompt that is longer than the context, cut so that half of the context or all new tokens follow it.

    Args:
        head: tokens of the heading, which stay.

    Returns:
        The prompt, and the tokens of the heading that fit.
    """
    room = context - min(new_tokens, context // 2)
    head = min(head, room // 2)
    return (prompt if len(prompt) <= context else crop(prompt, room, head)), head


def complete(
    model: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: SamplingConfig,
    dtype: torch.dtype = torch.float32,
    warn: Callable[[str], None] = _LOG.warning,
    on_token: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer prompts, in their order; each prompt is rendered exactly as in training.

    A prompt that is longer than the model's context keeps its headings and its end; the tokens between are cut. Rows
    of the embedding that the tokenizer has no token for are never drawn.

    Args:
        warn: told how many tokens of which prompt were cut.
        on_token: called with each new id, of one prompt on a CPU.
    """
    ids = encode_prompts(tokenizer, prompts)
    heads = heading_lengths(tokenizer, ids)
    for row, prompt in enumerate(ids):
        ids[row], heads[row] = _fit(prompt, heads[row], model.config.n_positions, config.max_new_tokens)
        if cut := len(prompt) - len(ids[row]):
            warn(
                f"{cut} of the {len(prompt)} tokens of prompt {row + 1} were cut, behind the first {heads[row]}: "
                f"with the completion they do not fit the context of {model.config.n_positions}"
            )
    with autocast(model.wte.weight.device, dtype):
        rows = generate(
            model,
            ids,
            config.max_new_tokens,
            tokenizer.eos_token_id,
            config.temperature,
            config.top_k,
            config.top_p,
            config.seed,
            unknown_ids(tokenizer, model.config.vocab_size),
            heads,
            config.repetition_penalty,
            on_token,
        )
    return [_completion(tokenizer, row) for row in rows]


def _completion(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Completion:
    stopped = ids[-1:] == [tokenizer.eos_token_id]
    return Completion(str(tokenizer.decode(ids[:-1] if stopped else ids)), stopped)

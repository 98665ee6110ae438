"""The prompt format, the same for training and inference: an entry becomes text, text becomes token ids.

The prompt is tokenised separately in both cases, so that generation starts from exactly the ids that training has
before the response (axolotl#834: two renderers drift apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:\n"
RESPONSE = "\n\n### Response:\n"
# The same format as a chat template of transformers, for messages with roles; exported tokenizers carry it. A system
# message stands in front of the question, as in training. Each answer ends with the end-of-text token.
CHAT_TEMPLATE = (
    (
        "{%- set state = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        "{%- if message['content'].strip() -%}{%- set state.system = message['content'] + '\\n' -%}{%- endif -%}"
        "{%- elif message['role'] == 'user' -%}"
        "{{- INSTRUCTION + state.system + message['content'] -}}{%- set state.system = '' -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- RESPONSE + message['content'] + eos_token -}}"
        "{%- else -%}"
        "{{- raise_exception('the role ' + message['role'] + ' is none of system, user and assistant') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- RESPONSE -}}{%- endif -%}"
    )
    .replace("INSTRUCTION", repr(INSTRUCTION))
    .replace("RESPONSE", repr(RESPONSE))
)


def format_prompt(entry: Mapping[str, Any]) -> str:
    """Render an entry: with its completion for training, up to the response when it has none.

    Args:
        entry: ``prompt`` and, optionally, ``completion``.
    """
    return f"{INSTRUCTION}{entry['prompt']}{RESPONSE}{entry.get('completion') or ''}"


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts as ordinary text: a literal ``<|endoftext|>`` inside data never becomes the EOS id."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids from which the responses to ``prompts`` are generated."""
    return encode(tokenizer, [format_prompt({"prompt": prompt}) for prompt in prompts])


def heading_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each encoded prompt, the number of its first tokens that belong to the heading of the instruction.

    A token that heading and instruction share is not counted.
    """
    (heading,) = encode(tokenizer, [INSTRUCTION])
    return [
        next((i for i, (a, b) in enumerate(zip(heading, ids, strict=False)) if a != b), min(len(heading), len(ids)))
        for ids in prompts
    ]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Encode training examples.

    Returns:
        For each, its ids (prompt, response, EOS) and the number of ids that belong to the prompt.
    """
    heads = encode_prompts(tokenizer, prompts)
    tails = encode(tokenizer, completions)
    return [([*head, *tail, tokenizer.eos_token_id], len(head)) for head, tail in zip(heads, tails, strict=True)]

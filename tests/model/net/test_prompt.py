"""The prompt format in training and inference, special tokens inside data, and EOS."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from model import format_prompt
from model.data.schemas import normalize_row
from model.net.prompt import CHAT_TEMPLATE, INSTRUCTION, encode, encode_examples, encode_prompts, heading_lengths

PROMPTS = ["Write a function that adds 1 to a price.", "Explain\nthis", "  leading and trailing  ", "p"]
COMPLETIONS = ["def add_1(price):\n    return price + 1", " a space first", "x", "\n\nblank lines first"]


def test_text_of_an_entry() -> None:
    """The format of the original scripts, character for character."""
    entry = {"prompt": "Do it", "completion": "done"}
    assert format_prompt(entry) == "### Instruction:\nDo it\n\n### Response:\ndone"


def test_without_completion_it_ends_where_the_response_begins() -> None:
    """axolotl#834: generation starts from the text that training has before the response."""
    for entry in ({"prompt": "Do it"}, {"prompt": "Do it", "completion": None}):
        assert format_prompt(entry) == "### Instruction:\nDo it\n\n### Response:\n"
    entry = {"prompt": "Do it", "completion": "done"}
    assert format_prompt(entry).startswith(format_prompt({"prompt": "Do it"}))


def test_inference_ids_are_the_training_ids(tokenizer: Any) -> None:
    """axolotl#834: the ids are equal, also where BPE would merge across the border of prompt and response."""
    examples = encode_examples(tokenizer, PROMPTS, COMPLETIONS)
    prompts, completions = encode_prompts(tokenizer, PROMPTS), encode(tokenizer, COMPLETIONS)
    for (ids, prompt_length), prompt, completion in zip(examples, prompts, completions, strict=True):
        assert ids[:prompt_length] == prompt
        assert ids[prompt_length:-1] == completion
    whole = encode(tokenizer, [format_prompt({"prompt": PROMPTS[3], "completion": COMPLETIONS[3]})])[0]
    assert examples[3][0][:-1] != whole  # this is such a border


def test_example_decodes_to_its_text(tokenizer: Any) -> None:
    """Encoding prompt and completion separately loses no text."""
    for (ids, _), prompt, completion in zip(
        encode_examples(tokenizer, PROMPTS, COMPLETIONS), PROMPTS, COMPLETIONS, strict=True
    ):
        text = format_prompt({"prompt": prompt, "completion": completion})
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text


def test_eos_ends_every_example_once(tokenizer: Any) -> None:
    """An example has EOS as its last id and nowhere else."""
    for ids, _ in encode_examples(tokenizer, PROMPTS, COMPLETIONS):
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_prompt_ends_without_eos(tokenizer: Any) -> None:
    """Generation must not start after an end-of-text token."""
    assert all(tokenizer.eos_token_id not in ids for ids in encode_prompts(tokenizer, PROMPTS))


def test_end_of_text_in_data_is_ordinary_text(tokenizer: Any) -> None:
    """The literal marker, in prompt or completion, never becomes the EOS id, and survives as text."""
    text = "stop <|endoftext|> here<|endoftext|>"
    assert tokenizer.eos_token_id in tokenizer.encode(text)  # the tokenizer's plain call does encode it as EOS
    assert tokenizer.eos_token_id not in encode(tokenizer, [text])[0]
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text
    [(ids, prompt_length)] = encode_examples(tokenizer, [text], [text])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert prompt_length == len(encode(tokenizer, [format_prompt({"prompt": text})])[0])


def test_nothing_to_encode(tokenizer: Any) -> None:
    """An empty list gives an empty list."""
    assert encode(tokenizer, []) == encode_prompts(tokenizer, []) == encode_examples(tokenizer, [], []) == []


def test_length_of_the_heading(tokenizer: Any) -> None:
    """The tokens that are the heading's alone: not one that BPE merged with the instruction's first characters."""
    prompts = [*PROMPTS, "\n\nlines first", ""]
    ids = encode_prompts(tokenizer, prompts)
    heading = len(encode(tokenizer, [INSTRUCTION])[0])
    for length, row in zip(heading_lengths(tokenizer, ids), ids, strict=True):
        assert INSTRUCTION.startswith(tokenizer.decode(row[:length]))
        assert heading - 1 <= length <= heading


@pytest.mark.parametrize("system", [None, "You answer in Python.", "  ", "ends with a line break\n"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_chat_template_renders_messages_as_rows_are(tokenizer: Any, prompt: str, system: str | None) -> None:
    """A conversation is trained on as a row; the template gives the same text, and the same prompt."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    answer = {"role": "assistant", "content": COMPLETIONS[3]}
    row = normalize_row({"messages": [*messages, answer]})
    render = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    whole = tokenizer.apply_chat_template([*messages, answer], **render)
    assert whole == format_prompt(row) + tokenizer.eos_token
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **render)
    assert start == format_prompt({"prompt": row["prompt"]})
    assert whole.startswith(start)


def test_the_chat_template_knows_three_roles(tokenizer: Any) -> None:
    """A tool's answer would be rendered in a form that was not trained; a second question is."""
    render = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    with pytest.raises(TemplateError, match="the role tool is none of system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], **render)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, **render) == (
        "### Instruction:\na\n\n### Response:\nb<|endoftext|>### Instruction:\nc"
    )

"""One record for each row of the test split: its text, both models' completions, and all of their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from model.data.rows import row_key
from model.data.tokens import CodeAlpacaDataset
from model.evaluation.chrf import chrf
from model.evaluation.completions import Completion
from model.evaluation.texts import is_exact, is_python, repetition
from model.net.prompt import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class References:
    """What the data say of R rows of the test split.

    Attributes:
        rows: with ``row``, ``prompt``, ``completion`` (the reference), and perhaps ``family`` and ``tests``.
        tokens: (R,) response tokens that are scored, the end-of-text token included.
        texts: the part of each reference that is scored; all of it unless the row was cut at ``max_length``.
        within_limit: the part of each reference that max_new_tokens has room for.
        stopped: whether the reference, end-of-text token included, has room.
    """

    rows: Sequence[Mapping[str, Any]]
    tokens: Array
    texts: Sequence[str]
    within_limit: Sequence[str]
    stopped: Sequence[bool]


def references_of(
    test: CodeAlpacaDataset, tokenizer: PreTrainedTokenizerBase, tokens: Array, max_new_tokens: int
) -> References:
    """What a test split says of its rows.

    Args:
        tokens: (R,) response tokens of each row, as ``row_losses`` counts them.
        max_new_tokens: a completion's limit, end-of-text token included.
    """
    texts, within, stopped = [], [], []
    for index, row in enumerate(test.rows):
        prompt = int(test.lengths[index, 1])
        ids = test[index]["input_ids"].tolist()[prompt:]
        cut = ids[-1:] != [tokenizer.eos_token_id]
        texts.append(_decoded(tokenizer, ids) if cut else row["completion"])
        response = encode(tokenizer, [row["completion"]])[0] if cut else ids[:-1]
        fits = len(response) <= max_new_tokens
        within.append(row["completion"] if fits else _decoded(tokenizer, response[:max_new_tokens]))
        stopped.append(len(response) < max_new_tokens)
    return References(test.rows, tokens, texts, within, stopped)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, without a character that is cut within its bytes."""
    return str(tokenizer.decode(ids)).rstrip("\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class Answers:
    """What one model gave on these rows.

    Attributes:
        losses: (R,) nats, summed over the scored response of each row.
        completions: of each row; None where it was not completed.
        passed: whether the greedy completion of each row passed its tests; None where none were run.
        failures: why it did not; None where it passed or none were run.
    """

    losses: Array
    completions: Sequence[Completion | None]
    passed: Sequence[bool | None]
    failures: Sequence[str | None]


def content_key(row: Mapping[str, Any]) -> str:
    """A row's content as 16 hexadecimal digits: the same in every run that has the row, wherever it stands."""
    return f"{row_key({name: value for name, value in row.items() if name != 'row'}):016x}"


def build_records(references: References, base: Answers, tuned: Answers) -> list[dict[str, Any]]:
    """One record per row. ``base_<column>`` is the base's value, ``<column>`` the tuned model's; None: not computed.

    A loss that is NaN becomes infinite, because tables cannot tell NaN from None.
    """
    records = []
    for index, row in enumerate(references.rows):
        records.append(
            {
                "key": content_key(row),
                "row": row["row"],
                "family": row.get("family"),
                "prompt": row["prompt"],
                "reference": row["completion"],
                "tokens": int(references.tokens[index]),
                "bytes": len(references.texts[index].encode(errors="surrogatepass")),
                "base_text": _text(base.completions[index]),
                "text": _text(tuned.completions[index]),
            }
        )
    python = [is_python(str(row["completion"])) for row in references.rows]
    columns = [_columns(answers, references, python) for answers in (base, tuned)]
    for index, record in enumerate(records):
        for name in columns[0]:
            record[f"base_{name}"], record[name] = (column[name][index] for column in columns)
        record["reference_stopped"] = references.stopped[index]
        record["reference_syntax"] = is_python(references.within_limit[index]) if python[index] else None
    return records


def _text(completion: Completion | None) -> str | None:
    return completion.text if completion else None


def _columns(answers: Answers, references: References, python: Sequence[bool]) -> dict[str, Sequence[Any]]:
    """The columns of one model, each with a value or None for each row."""
    completions = answers.completions
    targets = [str(row["completion"]) for row in references.rows]

    def of_texts(score: Callable[[str, str], Any]) -> list[Any]:
        return [score(c.text, target) if c else None for c, target in zip(completions, targets, strict=True)]

    done = [index for index, completion in enumerate(completions) if completion]
    similar: list[float | None] = [None] * len(completions)
    found = chrf([c.text for c in completions if c], [targets[index] for index in done])
    for index, value in zip(done, found.tolist(), strict=True):
        similar[index] = value
    return {
        "loss": np.where(np.isnan(answers.losses), np.inf, answers.losses).tolist(),
        "stopped": [c.stopped if c else None for c in completions],
        "syntax": [is_python(c.text) if c and python[i] else None for i, c in enumerate(completions)],
        "chrf": similar,
        "exact": of_texts(is_exact),
        "repetition": of_texts(lambda text, target: repetition(text)),
        "empty": of_texts(lambda text, target: not text.strip()),
        "length": of_texts(lambda text, target: len(text)),
        "passed": answers.passed,
        "failure": answers.failures,
    }

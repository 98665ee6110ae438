"""How a version answers as MLflow's pyfunc: the transformers flavour, behind a check of what is asked.

``ops.tracking.flavour`` copies this file into the version's folder ``code``. It runs where this project may not be
installed, and so imports nothing of it; the limits are those of ``model.net.sampling``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from mlflow import transformers as flavour
from mlflow.exceptions import MlflowException

_LOG = logging.getLogger("mlflow.served_model")  # of MLflow's, so that its server shows the warnings
_LARGEST = 1e6  # temperature and repetition_penalty


class ServedModel:
    """Answers instructions.

    Args:
        inner: MLflow's wrapper of the pipeline, which renders the prompt format.
        template: that format.
    """

    def __init__(self, inner: Any, template: str):
        self.inner, self.tokenizer = inner, inner.pipeline.tokenizer
        self.context = int(inner.pipeline.model.config.n_positions)
        self.template = template

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The answer to each instruction.

        Raises:
            MlflowException: an instruction is no text, or a parameter is out of range; the server answers 400.
        """
        asked = dict(params or {})
        instructions = _instructions(data)
        _check(asked, self.context)
        answers: list[str] = []
        for number, instruction in enumerate(instructions, 1):
            text, new_tokens = self._fitted(instruction, int(asked.get("max_new_tokens", 128)), number)
            answers += self.inner.predict([text], {**asked, "max_new_tokens": new_tokens})
        return answers

    def _fitted(self, instruction: str, new_tokens: int, number: int) -> tuple[str, int]:
        """An instruction that leaves room for the answer, or for half of the context, and the tokens that may follow.

        Of one that is too long the end is kept, and the headings, as the evaluation does.
        """
        around = self._count(self.template.format(prompt=""))
        whole = self._count(self.template.format(prompt=instruction))
        room = self.context - min(new_tokens, self.context // 2)
        text, length = instruction, whole
        kept = room - around
        while length > room and kept > 0:  # the seam may take more tokens than the ids that were cut
            text = self.tokenizer.decode(self._ids(instruction)[-kept:]).lstrip("\N{REPLACEMENT CHARACTER}")
            length = self._count(self.template.format(prompt=text))
            kept -= max(1, length - room)
        if length < whole:
            _LOG.warning(
                "instruction %d has %d tokens with its headings: its first ones were cut and %d are left, so that "
                "the answer fits the context of %d",
                *(number, whole, length, self.context),
            )
        if (left := self.context - length) < new_tokens:
            _LOG.warning("the answer to instruction %d has %d tokens at most: the context ends", number, left)
        return text, min(new_tokens, left)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _count(self, text: str) -> int:
        return len(self._ids(text))


def _instructions(data: Any) -> list[str]:
    """The instructions of a request."""
    if isinstance(data, pd.DataFrame):
        if len(data.columns) != 1:
            raise _refusal(f"the request has {len(data.columns)} columns: it needs one, of instructions")
        values = data.iloc[:, 0].tolist()
    elif isinstance(data, pd.Series | np.ndarray):
        values = np.asarray(data).ravel().tolist()
    else:
        values = list(data) if isinstance(data, list | tuple) else [data]
    if not values:
        raise _refusal("the request has no instruction")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise _refusal(f"instruction {number} is {value!r}: it must be a text")
        if not value.strip():
            raise _refusal(f"instruction {number} is empty")
    return values


def _check(asked: Mapping[str, Any], context: int) -> None:
    """Raise unless all parameters are in their ranges; those that MLflow does not know have been left out by it."""
    smallest = 1 / _LARGEST
    sampled = bool(asked.get("do_sample", False))
    ranges = {  # first and last value
        "max_new_tokens": (1, context - 1),
        "temperature": (smallest if sampled else 0.0, _LARGEST),
        "top_k": (0, math.inf),  # 0 keeps all tokens
        "top_p": (smallest, 1.0),
        "repetition_penalty": (smallest, _LARGEST),
    }
    for name, (first, last) in ranges.items():
        value = asked.get(name)
        if value is not None and not first <= value <= last:
            hint = ", or do_sample false for a greedy answer" if name == "temperature" else ""
            allowed = f"from {first:g} to {last:g}" if math.isfinite(last) else f"{first:g} or more"
            raise _refusal(f"{name} is {value}: it must be {allowed}{hint}")


def _refusal(sentence: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(sentence)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ServedModel:
    """MLflow calls it with the version's directory."""
    inner = flavour._load_pyfunc(path, model_config)
    return ServedModel(inner, inner.prompt_template)

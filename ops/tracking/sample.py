"""``finetune sample [PROMPT]``: ask a tuned model of MLflow's registry.

Without a prompt it answers line by line on a terminal, and else reads the prompt from standard input, as ``-`` does.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter, ValidationError

from model.demo import EMBEDDED_BASE, EMBEDDED_SHA256
from model.net.loading import read_pretrained
from model.net.plain_tokenizer import load_plain_tokenizer
from model.net.tokenizer import tokenizer_hashes
from model.parameters import refusal_reason
from ops.hub import PINNED_WEIGHTS, HubError, fetch_weights
from ops.mistakes import UsageError, refuse
from ops.parsers import sample_parser
from ops.settings import Settings
from ops.text import escape_output, unreadable_argument
from ops.tracking.connection import refusal
from ops.tracking.lookup import look_up
from ops.tracking.registry import KnownVersion, fetch_version, version_uri

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.evaluation.config import SamplingConfig
    from model.net.gpt import GPTModel

_REMEDY = "Restore its artifacts, or name another registered model with --model"
_SHORT_OF = "the base of {uri} was {base}, which cannot be found on this machine: leave --base out"
_LONGEST_PROMPT = 1_000_000  # bytes; a model's context holds some thousand
_PENDING = "\ufffd"  # stands at the end of a text whose last character has bytes to come


@dataclass(frozen=True)
class _Answerer:
    """A loaded model.

    Attributes:
        title: printed above its answer where there are two models.
    """

    title: str
    model: GPTModel
    tokenizer: PreTrainedTokenizerBase

    def answer(self, prompt: str, sampling: SamplingConfig, warn: Callable[[str], None]) -> None:
        """Print the answer to a prompt, each token as soon as it is drawn."""
        from model.evaluation.completions import complete

        shown, ids = "", list[int]()

        def show(token: int) -> None:
            nonlocal shown
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                return
            text = str(self.tokenizer.decode(ids))
            if text.startswith(shown) and not text.endswith(_PENDING):
                print(text[len(shown) :], end="", flush=True)
                shown = text

        ((text, _),) = complete(self.model, self.tokenizer, [prompt], sampling, warn=warn, on_token=show)
        print(text[len(shown) :] if text.startswith(shown) else f"\n{text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print the completion of a prompt, or of each line that is typed. Returns the exit status."""
    given = sample_parser().parse_args(arguments)
    prompt = given.prompt or ""
    chats = not prompt.strip() and sys.stdin.isatty()
    try:
        if prompt.strip() in ("", "-") and not chats:
            prompt = _read_prompt()
        elif reason := unreadable_argument(prompt):
            raise UsageError(f"the prompt {reason}")
        sampling = _sampling(given)
        models = _load(Settings.load(), given.model, given.base)
    except ValidationError as error:
        (first, *_) = error.errors()
        _tell(f"{first['loc'][0]}: {refusal_reason(dict(first))}")
        return 2
    except (UsageError, LookupError, ValueError, RuntimeError, OSError, HubError) as error:
        return refuse(error)
    except Exception as error:
        if "mlflow" not in sys.modules or not _is_of_mlflow(error):
            raise
        _tell(refusal(Settings.load().tracking_uri, error))
        return 1
    try:
        for asked in _typed() if chats else [prompt]:
            for each in models:
                if len(models) > 1:
                    print(f"--- {each.title}")
                each.answer(asked, sampling, _tell)
    except KeyboardInterrupt:
        print()
        return 128 + signal.SIGINT
    return 0


def _read_prompt() -> str:
    """The prompt that stands in standard input.

    Raises:
        UsageError: it is empty, too long to be one, or no text.
    """
    text = sys.stdin.buffer.read(_LONGEST_PROMPT + 1)
    if len(text) > _LONGEST_PROMPT:
        raise UsageError(f"standard input has more than {_LONGEST_PROMPT:,} bytes: give one prompt")
    try:
        prompt = text.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UsageError("the prompt in standard input is not valid UTF-8: save or type it as UTF-8") from None
    if not prompt.strip():
        raise UsageError('the prompt is empty: finetune sample "Write a function that ..."')
    return prompt


def _sampling(given: argparse.Namespace) -> SamplingConfig:
    """The settings of generation.

    Raises:
        ValueError, ValidationError: one is out of range.
    """
    from model.evaluation.config import SamplingConfig
    from model.net.sampling import check_sampling

    check_sampling(given.temperature, given.top_k, given.top_p, given.repetition_penalty)
    own = ("prompt", "model", "base")
    values = {name: value for name, value in vars(given).items() if name not in own}
    return TypeAdapter(SamplingConfig).validate_python(values)


def _load(settings: Settings, wanted: str | None, with_base: bool) -> list[_Answerer]:
    """The models that answer: the base first, if it is asked for.

    Raises:
        LookupError, ValueError, RuntimeError, OSError, HubError: the version or its base cannot be had.
    """
    version = look_up(settings.tracking_uri, wanted)
    directory, files = fetch_version(settings, version, _tell, _REMEDY)
    uri = f"{version.name} version {version.version}"
    tuned = _read(uri, directory, files)
    _tell(uri)
    return [_base(settings, version), tuned] if with_base else [tuned]


def _read(title: str, directory: Path, files: dict[str, str] | None) -> _Answerer:
    network = read_pretrained(directory, torch.device("cpu"), torch.float32, files)
    of_tokenizer = tokenizer_hashes(files) if files else None
    return _Answerer(title, network, load_plain_tokenizer(directory, network.config.vocab_size, of_tokenizer))


def _base(settings: Settings, version: KnownVersion) -> _Answerer:
    """The model that a version was trained from."""
    base = version.params.get("base", "")
    title = f"base ({base})"
    if base == "embedded":
        return _read(title, EMBEDDED_BASE, EMBEDDED_SHA256)
    if base.startswith("models:/"):
        before = look_up(settings.tracking_uri, base)
        return _read(title, *fetch_version(settings, before, _tell, _REMEDY))
    for repository, revision in PINNED_WEIGHTS.values():
        if repository == base:
            return _read(title, fetch_weights(repository, revision, settings.hub_cache).path, None)
    if base and Path(base).is_dir():
        return _read(title, Path(base), None)
    raise LookupError(_SHORT_OF.format(uri=version_uri(version), base=base or "not recorded"))


def _typed() -> Iterator[str]:
    """The lines that are typed, until the end of the input or Ctrl-C."""
    _tell("a line is a prompt; Ctrl-D ends")
    while True:
        try:
            print("> ", end="", flush=True)
            line = input()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if reason := unreadable_argument(line):
            _tell(f"the line {reason}")
        elif line.strip():
            yield line


def _is_of_mlflow(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    escape_output()
    sys.exit(main())

"""``python -m ops.tracking.sample "PROMPT"``: ask the latest tuned model in MLflow's registry."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter, ValidationError

from ops.redaction import without_credentials
from ops.settings import Settings
from ops.text import escape_output, unreadable_argument
from ops.tracking.registry import fetch_version
from ops.tracking.runs import MODEL_PREFIX, client, refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_REMEDY = "Restore its artifacts, or name another registered model with --model"


def latest_version(mlflow: MlflowClient, name: str | None) -> ModelVersion:
    """The version registered last, of one model or of all that this project registers.

    Raises:
        LookupError: there is none.
    """
    names = [name] if name else [m.name for m in mlflow.search_registered_models(f"name LIKE '{MODEL_PREFIX}%'")]
    versions = [v for each in names for v in mlflow.search_model_versions(f"name = '{each}'")]
    if not versions:
        raise LookupError(
            f"no version of {name or MODEL_PREFIX + '*'} is registered at "
            f"{without_credentials(mlflow.tracking_uri)}: run `make run`, or set MLFLOW_TRACKING_URI to the "
            "server of your runs"
        )
    return max(versions, key=lambda version: version.creation_timestamp)


def main(arguments: list[str] | None = None) -> int:
    """Print the completion of a prompt. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="finetune sample", description=__doc__)
    parser.add_argument("prompt", help="the instruction, as in the data set's prompt column")
    parser.add_argument(
        "--model", help=f"registered model, such as {MODEL_PREFIX}355m; default: the latest of any size"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 changes nothing, the default")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if not given.prompt.strip():
        parser.error('the prompt is empty: make sample PROMPT="Write a function that ..."')
    if reason := unreadable_argument(given.prompt):
        print(f"the prompt {reason}", file=sys.stderr)
        return 2

    from mlflow.exceptions import MlflowException

    from model.evaluation.completions import complete
    from model.evaluation.config import SamplingConfig
    from model.net.loading import read_pretrained
    from model.net.sampling import check_sampling
    from model.net.tokenizer import load_tokenizer, tokenizer_hashes

    settings = Settings.load()
    values = {name: value for name, value in vars(given).items() if name not in ("prompt", "model")}
    try:
        check_sampling(given.temperature, given.top_k, given.top_p, given.repetition_penalty)
        sampling = TypeAdapter(SamplingConfig).validate_python(values)
        version = latest_version(client(settings.tracking_uri), given.model)
        directory, files = fetch_version(settings, version, _tell, _REMEDY)
        network = read_pretrained(directory, torch.device("cpu"), torch.float32, files)
        tokenizer = load_tokenizer(directory, network.config.vocab_size, tokenizer_hashes(files))
    except ValidationError as error:
        (first, *_) = error.errors()
        _tell(f"{first['loc'][0]} {first['input']}: {first['msg']}")
        return 1
    except (LookupError, ValueError, RuntimeError, OSError) as error:
        _tell(str(error))
        return 1
    except MlflowException as error:
        _tell(refusal(settings.tracking_uri, error))
        return 1
    _tell(f"{version.name} version {version.version}")
    ((text, _),) = complete(network, tokenizer, [given.prompt], sampling, warn=_tell)
    print(text)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    escape_output()
    sys.exit(main())

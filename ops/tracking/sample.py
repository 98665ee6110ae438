"""``python -m ops.tracking.sample "PROMPT"``: ask the latest tuned model in MLflow's registry."""

from __future__ import annotations

import argparse
import sys
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ops.redaction import without_credentials
from ops.settings import Settings
from ops.tracking.registry import version_uri
from ops.tracking.runs import MODEL_PREFIX, client, refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


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
    parser = argparse.ArgumentParser(prog="python -m ops.tracking.sample", description=__doc__)
    parser.add_argument("prompt", help="the instruction, as in the data set's prompt column")
    parser.add_argument(
        "--model", help=f"registered model, such as {MODEL_PREFIX}355m; default: the latest of any size"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if not given.prompt.strip():
        parser.error('the prompt is empty: make sample PROMPT="Write a function that ..."')

    import mlflow
    from mlflow.exceptions import MlflowException

    from model.evaluation.completions import SamplingConfig, complete
    from model.net.gpt import GPTModel
    from model.net.sampling import check_sampling
    from model.net.tokenizer import load_tokenizer

    uri = Settings.load().tracking_uri
    try:
        check_sampling(given.temperature, given.top_k, given.top_p)
        version = latest_version(client(uri), given.model)
        with TemporaryDirectory() as scratch:
            directory = mlflow.artifacts.download_artifacts(version_uri(version), dst_path=scratch)
            network = GPTModel.from_pretrained(directory)
            tokenizer = load_tokenizer(directory, network.config.vocab_size)
    except (LookupError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except MlflowException as error:
        print(refusal(uri, error), file=sys.stderr)
        return 1
    sampling = SamplingConfig(
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=given.seed,
    )
    print(f"{version.name} version {version.version}", file=sys.stderr)
    ((text, _),) = complete(network, tokenizer, [given.prompt], sampling)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

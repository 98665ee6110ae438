"""Shared fixtures: a tiny GPT-2 made by transformers, its byte-level tokenizer, generated rows and their tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

NOUNS = ("price", "index", "counter", "offset", "score")
CONTEXT = 96  # n_positions of the tiny model
MAX_LENGTH = 80


@pytest.fixture(scope="session", autouse=True)
def _own_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Separate device locks for tests and their subprocesses, so that they do not wait for other trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_LOCKS", str(tmp_path_factory.mktemp("device-locks")))
        yield


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Prefect's own test harness: a temporary database and a server process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On one thread small matrices are fastest and sums are reproducible."""
    torch.set_num_threads(1)


def _rows(count: int) -> list[dict[str, str]]:
    """Distinct rows of different lengths, every other one in the original CodeAlpaca's schema."""
    rows = []
    for i in range(count):
        noun = NOUNS[i % len(NOUNS)]
        task = f"Write a function that adds {i} to a {noun}."
        code = f"def add_{i}({noun}):\n    return {noun} + {i}" + f"\n# {noun} {i}" * (i % 4)
        if i % 2:
            rows.append({"prompt": task, "completion": code})
        else:
            rows.append({"instruction": task, "input": f"{noun} = {i}" if i % 4 else "", "output": code})
    return rows


@pytest.fixture(scope="session")
def make_rows() -> Callable[[int], list[dict[str, str]]]:
    """make_rows(n): n rows; a longer list begins with the rows of a shorter one."""
    return _rows


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[Any]], Path]:
    """write_jsonl(path, records): write records as JSON lines; a str is written as a raw line."""

    def write(path: Path, records: list[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Callable[[Path, list[Any]], Path]) -> Path:
    """A data folder of 60 rows. Read only."""
    directory = tmp_path_factory.mktemp("data")
    write_jsonl(directory / "train.jsonl", _rows(60))
    return directory


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer trained on the rows; ``<|endoftext|>`` is id 0. Read only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for row in _rows(60) for text in row.values()] + ["### Instruction:\n\n\n### Response:\n"] * 60
    tokenizer.train_from_iterator(texts, trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    """The tokenizer of tokenizer_dir, loaded by load_tokenizer."""
    from model.net.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_dir, 320)


@pytest.fixture(scope="session")
def random_hf() -> Callable[..., Any]:
    """random_hf(n_embd=..., ...): a GPT2LMHeadModel with random biases and norm weights, not 0 and 1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(seed: int = 0, noise: float = 0.05, **settings: Any) -> Any:
        torch.manual_seed(seed)
        config = GPT2Config(bos_token_id=0, eos_token_id=0, **settings)
        reference = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter += noise * torch.randn_like(parameter)
        return reference

    return build


@pytest.fixture(scope="session")
def gpt2_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, tokenizer: Any, random_hf: Callable[..., Any]
) -> Path:
    """A tiny GPT-2 with its tokenizer in Hugging Face's layout, written by transformers. Read only."""
    directory = tmp_path_factory.mktemp("gpt2")
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": CONTEXT, "vocab_size": len(tokenizer)}
    random_hf(noise=0.15, **shape).save_pretrained(directory)
    for path in tokenizer_dir.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture
def tiny_model(gpt2_dir: Path) -> Any:
    """The model of gpt2_dir, loaded for each test, with top block and final norm left trainable."""
    from model import GPTModel, freeze_bottom_layers

    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1)
    return model


@pytest.fixture(scope="session")
def token_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, tokenizer: Any) -> Path:
    """The rows of data_dir as token files, about a tenth of them test and a fifth validation. Read only."""
    from model.data.config import PrepareConfig
    from model.data.layout import find_splits
    from model.data.preparing import prepare

    directory = tmp_path_factory.mktemp("tokens") / "tokens"
    config = PrepareConfig(max_length=MAX_LENGTH, test_share=0.1, validation_share=0.2)
    prepare(find_splits(data_dir), tokenizer, config, directory)
    return directory


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database for tests to copy, because its migrations take seconds."""
    from ops.tracking.connection import client

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data root and an MLflow database of one test's own."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base, as a user's own directory of weights."""
    from model.demo import EMBEDDED_BASE

    return Path(shutil.copytree(EMBEDDED_BASE, tmp_path / "base"))

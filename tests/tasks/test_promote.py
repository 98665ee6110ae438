"""Starting from a registered version and comparing with one: what fits, and what is said where it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import swap_entries
from prefect.logging import disable_run_logger

from model.data.config import PrepareConfig
from model.demo import EMBEDDED_BASE, grammar
from model.engine.config import TrainConfig
from model.files import ChangedFileError
from model.net.config import FreezeConfig, GPTConfig
from model.net.freezing import plan_freeze
from model.net.gpt import GPTModel
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.models import log_model
from ops.tracking.runs import tracked_run
from tasks.config import SourceConfig
from tasks.download import download
from tasks.frozen import load_frozen
from tasks.load_weights import check_weights
from tasks.prepare import find_or_write_tokens
from tasks.promote import promote, score_champion
from tasks.references import CheckpointRef, EvaluationRef, RivalRef, Sources
from tasks.train import identify_training

NAME = "gpt2-code-tiny"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A store with a few versions that the tests make champion in turn."""
    root = tmp_path_factory.mktemp("promote")
    return Settings(root, f"sqlite:///{root}/mlflow/mlflow.db")


@pytest.fixture(autouse=True)
def _root(store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(store.data_root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of test and a few to train on."""
    folder = tmp_path_factory.mktemp("data")
    grammar.write_rows(folder)
    for split, rows in (("train", 60), ("test", 40)):
        path = folder / f"{split}.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:rows]) + "\n")
    return folder


@pytest.fixture
def champion(store: Settings, tmp_path: Path) -> Callable[..., str]:
    """champion(change): register the embedded base, changed, as champion; its URI."""

    def register(change: Callable[[Path], Any]) -> str:
        directory = shutil.copytree(EMBEDDED_BASE, tmp_path / "version")
        (directory / "README.md").unlink()
        change(directory)
        with tracked_run(store, "a run", {}, {}) as run:
            version = log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 1)
        client(store.tracking_uri).set_registered_model_alias(NAME, "champion", str(version.version))
        return f"models:/{NAME}/{version.version}"

    return register


def _better(directory: Path) -> None:
    """Other weights above the same trunk."""
    model = GPTModel.from_pretrained(directory)
    with torch.no_grad():
        model.ln_f.weight *= 1.1
    model.save_pretrained(directory, 0)


def _download(data: Path, **changes: Any) -> Sources:
    given: dict[str, Any] = {
        "dataset": str(data),
        "dataset_revision": None,
        "model_size": "tiny",
        "weights_dir": None,
        "tokenizer_dir": None,
        "start_from": "champion",
    }
    with disable_run_logger():
        return download.fn(SourceConfig(**{**given, **changes}))


def _score(data: Path, start_from: str = "base") -> tuple[RivalRef, Any]:
    """What a training that started there is compared with, and the rows that were scored."""
    config = PrepareConfig(max_length=128, validation_share=0.1)
    with disable_run_logger():
        sources = _download(data, start_from=start_from)
        tokens = find_or_write_tokens(sources, config)
        model = check_weights(sources.weights, "tiny")
        checkpoint = CheckpointRef(str(data.with_name("training")), 0, 0.0, 0.0, 0, 0, 2_048)
        plan = plan_freeze(GPTConfig(**model.config), FreezeConfig(num_unfrozen_layers=2))
        training = identify_training(tokens, model, plan, TrainConfig(precision="fp32"), "cpu")
        rival = score_champion.fn(training, checkpoint, None, "cpu")
    return rival, json.loads(Path(rival.rows).read_text()) if rival.rows else None


def test_the_first_run_starts_from_the_base(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty registry is no error: there has to be a first night, and the base is what it is compared with."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/empty.db")
    assert _download(data).weights == _download(data, start_from="base").weights
    rival, rows = _score(data)
    assert (rival.champion, rival.trouble, rows) == (None, None, None)
    assert rival.name == "embedded, as there is no champion"


def test_the_champion_is_started_from(data: Path, champion: Callable[..., str]) -> None:
    """Its weights, its tokenizer and nothing of the hub's; the version is what is recorded as the base."""
    uri = champion(_better)
    for start_from in ("champion", uri, f"models:/{NAME}@champion"):
        weights = _download(data, start_from=start_from).weights
        assert weights.source == uri
        assert weights.directory == weights.tokenizer_directory
        assert weights.revision is None
    base = GPTModel.from_pretrained(EMBEDDED_BASE)
    assert torch.equal(GPTModel.from_pretrained(weights.directory).ln_f.weight, base.ln_f.weight * 1.1)


def test_a_version_that_changes_after_it_was_fetched(data: Path, champion: Callable[..., str]) -> None:
    """Its copy on this machine is verified when it is fetched, and again when it is loaded."""
    champion(_better)
    weights = _download(data).weights
    model = check_weights(weights, "tiny")
    plan = plan_freeze(GPTConfig(**model.config), FreezeConfig(num_unfrozen_layers=2))
    load_frozen(model, plan, torch.device("cpu"), torch.float32)
    for change, name in ((swap_entries, "tokenizer.json"), (_better, "model.safetensors")):
        change(Path(weights.directory))
        with pytest.raises(ChangedFileError, match=rf"{name} has changed since this run began"):
            load_frozen(model, plan, torch.device("cpu"), torch.float32)


def test_a_run_from_the_champion_has_its_losses_already(data: Path, champion: Callable[..., str]) -> None:
    """Nothing is scored twice."""
    uri = champion(_better)
    rival, rows = _score(data, start_from="champion")
    assert (rival.name, rival.trouble, rows) == (f"the champion {uri}", None, None)


def test_a_run_from_elsewhere_has_the_champion_scored(data: Path, champion: Callable[..., str]) -> None:
    """Per row, the very losses of transformers on the champion's files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.net.prompt import encode_examples

    champion(_better)
    rival, rows = _score(data)
    assert rival.trouble is None
    assert len(rows) == 40
    directory = _download(data).weights.directory
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    first = json.loads((data / "test.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ((ids, prompt),) = encode_examples(tokenizer, [first["prompt"]], [first["completion"]])
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, prompt - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
    assert rows[0] == pytest.approx(loss, abs=1e-4 * (len(ids) - prompt))


def test_another_tokenizer_cannot_be_compared(data: Path, champion: Callable[..., str]) -> None:
    """Losses per token of two tokenizers: the run ends well, the champion stays, and the reason is said."""
    uri = champion(swap_entries)
    rival, rows = _score(data)
    assert rows is None
    assert (
        rival.trouble
        == f"{uri} has another tokenizer: losses per token of two tokenizers say nothing about each other"
    )


def test_another_tokenizer_than_given_is_refused(data: Path, champion: Callable[..., str], tmp_path: Path) -> None:
    """A version brings its own; the base's is given for the first night, and may be given ever after."""
    champion(_better)
    assert _download(data, tokenizer_dir=str(EMBEDDED_BASE)).weights.source.startswith("models:/")
    other = shutil.copytree(EMBEDDED_BASE, tmp_path / "other")
    swap_entries(other)
    with pytest.raises(ValueError, match=r"another tokenizer than that of tokenizer_dir.*leave tokenizer_dir out"):
        _download(data, tokenizer_dir=str(other))


def test_a_champion_of_another_size(data: Path, champion: Callable[..., str], gpt2_dir: Path) -> None:
    """To start from it is an error that names both; to be compared with it, a reason."""

    def other(directory: Path) -> None:
        shutil.rmtree(directory)
        shutil.copytree(gpt2_dir, directory)

    uri = champion(other)
    with pytest.raises(
        ValueError, match=rf"{uri} holds a model of shape.*choose a version of that size in start_from"
    ):
        _download(data)
    rival, _ = _score(data)
    assert rival.trouble is not None
    assert "holds a model of shape" in rival.trouble


def test_a_champion_whose_files_are_gone(data: Path, store: Settings, champion: Callable[..., str]) -> None:
    """To start from it fails before anything is trained; a training that is done is not lost for it."""
    uri = champion(_better)
    source = client(store.tracking_uri).get_model_version(NAME, uri.rsplit("/", 1)[1]).source
    shutil.rmtree(store.artifacts / "models" / source.removeprefix("models:/"))
    with pytest.raises(RuntimeError, match=rf"the files of {uri} cannot be had.*start_from=base"):
        _download(data)
    rival, _ = _score(data)
    assert rival.trouble is not None
    with tracked_run(store, "a run", {}, {}) as run:
        version = log_model(run, EMBEDDED_BASE, NAME, {}, {"test/loss": 1.0}, 1)
    with disable_run_logger():
        verdict = promote.fn(
            run, f"models:/{NAME}/{version.version}", EvaluationRef({}, (), "", "", ""), rival, margin=0.0, seed=1
        )
    assert not verdict.promoted
    assert verdict.reason.startswith(f"not compared with the champion {uri}: the files of {uri} cannot be had")
    aliases = client(store.tracking_uri).get_registered_model(NAME).aliases
    assert f"models:/{NAME}/{aliases['champion']}" == uri
    assert str(aliases["challenger"]) == str(version.version)

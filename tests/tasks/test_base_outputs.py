"""The base's outputs are kept: they are found by what they depend on, and by nothing else."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import ROOT

import tasks.scoring
from model.data.config import PrepareConfig
from model.data.layout import find_splits
from model.data.preparing import prepare
from model.demo import EMBEDDED_BASE
from model.engine.checkpoint import Snapshot, write_checkpoint
from model.engine.config import TrainConfig
from model.engine.trunk import TrunkCacheConfig
from model.evaluation.completions import Completion
from model.evaluation.config import SamplingConfig
from model.files import sha256_file
from model.net.config import FreezeConfig, GPTConfig
from model.net.freezing import plan_freeze
from ops.sandbox.guards import RowResult
from tasks import base_outputs
from tasks.base_outputs import BaseOutputs
from tasks.frozen import load_frozen
from tasks.gang_job import GangJob, read_job, write_job
from tasks.references import ModelRef, TokensRef, TrainingRef
from tasks.scoring import ModelOutputs, Scoring, score_models

CPU = torch.device("cpu")
LOG = logging.getLogger("test")
OUTPUTS = ModelOutputs(
    [0.1, math.inf], {0: Completion("näme\n", True), 10: Completion("", False)}, {2: Completion("x", False)}, [], ""
)
RESULTS = {"a": RowResult("passed"), "b": RowResult("error", "NameError: x")}


def _training(tokens: Path, base: Path, depth: int = 1, precision: str = "fp32") -> TrainingRef:
    config = json.loads((base / "config.json").read_text())
    fields = {name: config[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    files = {name: sha256_file(base / name) for name in ("config.json", "model.safetensors")}
    tokenizer = {name: sha256_file(base / name) for name in ("tokenizer.json", "tokenizer_config.json")}
    model = ModelRef(
        "tiny", str(base), str(base), "", str(sorted(files.items())), asdict(GPTConfig(**fields)), files, tokenizer
    )
    plan = plan_freeze(GPTConfig(**model.config), FreezeConfig(num_unfrozen_layers=depth))
    train = TrainConfig(precision=precision)
    return TrainingRef(TokensRef(str(tokens), "", "", {}), model, plan, train, {}, "", "")


@pytest.fixture
def scoring(token_dir: Path, gpt2_dir: Path) -> Scoring:
    """Of the rows of token_dir by gpt2_dir."""
    return Scoring(_training(token_dir, gpt2_dir), "", 512, SamplingConfig(max_new_tokens=4))


def _kept(directory: Path, scoring: Scoring) -> BaseOutputs:
    store = BaseOutputs(directory, scoring, CPU)
    store.keep("run 1", OUTPUTS, RESULTS, LOG)
    return store


def test_what_is_kept_is_found(tmp_path: Path, scoring: Scoring, caplog: pytest.LogCaptureFixture) -> None:
    """Bit for bit, by another training of the same base, and the log names the run that made it."""
    caplog.set_level(logging.INFO)
    assert BaseOutputs(tmp_path, scoring, CPU).find(LOG) is None
    assert not caplog.messages
    _kept(tmp_path, scoring)
    config = replace(scoring.training.config, learning_rate=0.5, epochs=9)
    other = replace(scoring, training=replace(scoring.training, config=config, identity="x"), best="elsewhere")
    found = BaseOutputs(tmp_path, other, CPU).find(LOG)
    assert found is not None
    assert (found.made_by, found.outputs, found.results) == ("run 1", OUTPUTS, RESULTS)
    assert caplog.messages == ["base's outputs found, made by run run 1"]


def _with_another_bit(tmp_path: Path, source: Path, name: str) -> Path:
    """A copy of a directory, with the last bit of a file changed."""
    target = tmp_path / "changed"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = bytearray((target / name).read_bytes())
    content[-1] ^= 1
    (target / name).write_bytes(content)
    return target


def _reordered(tmp_path: Path, tokenizer: Any, data_dir: Path) -> tuple[Path, Path]:
    """The token files of two data sets with the same test rows, in opposite orders."""
    lines = (data_dir / "train.jsonl").read_text().splitlines(keepends=True)
    found = []
    for name, chosen in (("one", lines[:6]), ("two", lines[5::-1])):
        data = tmp_path / name
        data.mkdir()
        (data / "train.jsonl").write_text("".join(lines[6:]))
        (data / "test.jsonl").write_text("".join(chosen))
        prepare(find_splits(data), tokenizer, PrepareConfig(validation_share=0.2), tmp_path / f"{name}-tokens")
        found.append(tmp_path / f"{name}-tokens")
    return found[0], found[1]


def _change(name: str, scoring: Scoring, tmp_path: Path, token_dir: Path, gpt2_dir: Path) -> Scoring:
    """The same scoring, with one thing changed."""
    sampling = scoring.sampling
    changes: dict[str, Callable[[], Scoring]] = {
        "weights": lambda: replace(
            scoring, training=_training(token_dir, _with_another_bit(tmp_path, gpt2_dir, "model.safetensors"))
        ),
        "tokenizer": lambda: replace(
            scoring, training=_training(token_dir, _with_another_bit(tmp_path, gpt2_dir, "tokenizer.json"))
        ),
        "a token": lambda: replace(
            scoring, training=_training(_with_another_bit(tmp_path, token_dir, "test.ids.bin"), gpt2_dir)
        ),
        "a text": lambda: replace(scoring, training=_training(_with_another_text(tmp_path, token_dir), gpt2_dir)),
        "depth": lambda: replace(scoring, training=_training(token_dir, gpt2_dir, depth=2)),
        "precision": lambda: replace(scoring, training=_training(token_dir, gpt2_dir, precision="bf16")),
        "fewer rows": lambda: replace(scoring, sampling=replace(sampling, score_rows=2)),
        "seed": lambda: replace(scoring, sampling=replace(sampling, seed=sampling.seed + 1)),
        "temperature": lambda: replace(scoring, sampling=replace(sampling, temperature=0.0)),
        "HumanEval": lambda: replace(scoring, sampling=replace(sampling, humaneval_samples=1)),
        "tokens of a pass": lambda: replace(scoring, micro_batch_tokens=1024),
    }
    return changes[name]()


def _with_another_text(tmp_path: Path, source: Path) -> Path:
    target = _with_another_bit(tmp_path, source, "meta.json")
    (target / "meta.json").write_bytes((source / "meta.json").read_bytes())
    rows = target / "test.rows.jsonl"
    rows.write_text(rows.read_text().replace("Write a function", "Write two functions", 1))
    return target


def test_greedy_completions_do_not_depend_on_the_draw(tmp_path: Path, scoring: Scoring) -> None:
    """Of trainings with several seeds, the first one scores the base."""
    greedy = replace(scoring, sampling=replace(scoring.sampling, temperature=0.0))
    _kept(tmp_path, greedy)
    for change in ({"seed": 9}, {"top_k": 3}, {"top_p": None}):
        other = replace(greedy, sampling=replace(greedy.sampling, **change))
        assert BaseOutputs(tmp_path, other, CPU).find(LOG), change
    for change in ({"max_new_tokens": 5}, {"repetition_penalty": 1.1}):
        other = replace(greedy, sampling=replace(greedy.sampling, **change))
        assert BaseOutputs(tmp_path, other, CPU).find(LOG) is None, change


@pytest.mark.parametrize(
    "name",
    [
        "weights", "tokenizer", "a token", "a text", "depth", "precision", "fewer rows", "seed", "temperature",
        "HumanEval", "tokens of a pass",
    ],
)  # fmt: skip
def test_whatever_is_changed_finds_nothing(
    name: str, tmp_path: Path, scoring: Scoring, token_dir: Path, gpt2_dir: Path
) -> None:
    directory = tmp_path / "kept"
    _kept(directory, scoring)
    assert BaseOutputs(directory, scoring, CPU).find(LOG) is not None
    changed = _change(name, scoring, tmp_path, token_dir, gpt2_dir)
    assert BaseOutputs(directory, changed, CPU).find(LOG) is None


def test_rows_in_another_order_find_nothing(
    tmp_path: Path, scoring: Scoring, gpt2_dir: Path, data_dir: Path, tokenizer: Any
) -> None:
    """The same rows at other places are others; the same rows in a longer data set are the same."""
    one, two = _reordered(tmp_path, tokenizer, data_dir)
    first, second = (replace(scoring, training=_training(tokens, gpt2_dir)) for tokens in (one, two))
    assert len(first.rows) == len(second.rows) == 6
    _kept(tmp_path, first)
    assert BaseOutputs(tmp_path, first, CPU).find(LOG) is not None
    assert BaseOutputs(tmp_path, second, CPU).find(LOG) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_CODE", "other code"),
        ("_version", lambda library: "9.9"),
        ("_packages", lambda: ["nvidia_cublas-99.dist-info"]),
        ("describe_device", lambda place: {"kind": "cpu", "name": "other"}),
    ],
)
def test_other_code_versions_and_devices_find_nothing(
    name: str, value: Any, tmp_path: Path, scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot all exist here, so that their names are replaced."""
    _kept(tmp_path, scoring)
    monkeypatch.setattr(base_outputs, name, value)
    assert BaseOutputs(tmp_path, scoring, CPU).find(LOG) is None


@pytest.mark.parametrize(
    "name", ["MKL_CBWR", "TORCH_BLAS_PREFER_CUBLASLT", "CUBLASLT_WORKSPACE_SIZE", "TRITON_DEFAULT_FP_FUSION"]
)
def test_another_setting_of_a_math_library_finds_nothing(
    name: str, tmp_path: Path, scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kept(tmp_path, scoring)
    monkeypatch.setenv(name, "1")
    assert BaseOutputs(tmp_path, scoring, CPU).find(LOG) is None


def test_a_changed_line_of_code_is_another_hash(tmp_path: Path) -> None:
    """Of the model, its kernels, the completions, and the tasks that call them."""
    files = base_outputs._code_files()
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert {
        "model/engine/scoring.py", "model/generation/decode_kernels.py", "model/generation/padded.py",
        "model/net/prompt.py", "model/evaluation/completions.py", "tasks/scoring.py", "tasks/humaneval.py",
        "tasks/frozen.py",
    } <= names  # fmt: skip
    copies = [tmp_path / str(number) / path.name for number, path in enumerate(files)]
    for path, copy in zip(files, copies, strict=True):
        copy.parent.mkdir()
        copy.write_bytes(path.read_bytes())
    assert base_outputs._files_sha256(copies) == base_outputs._CODE
    copies[-1].write_bytes(copies[-1].read_bytes() + b"\n")
    assert base_outputs._files_sha256(copies) != base_outputs._CODE


@pytest.mark.parametrize("kind", ["_code_files", "_sandbox_files"])
def test_outputs_of_code_that_is_edited_during_a_run_are_not_kept(
    kind: str, tmp_path: Path, scoring: Scoring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This process has the old code, a rank that starts later the new: neither name would be right."""
    edited = [tmp_path / f"{number}-{path.name}" for number, path in enumerate(getattr(base_outputs, kind)())]
    for path in edited:
        path.write_text("# another line\n")
    before = BaseOutputs(tmp_path / "kept", scoring, CPU)
    monkeypatch.setattr(base_outputs, kind, lambda: edited)
    store = _kept(tmp_path / "kept", scoring)
    assert (store.path, store.sandbox) == (before.path, before.sandbox)  # of the code that runs
    assert not store.path.exists()
    assert caplog.messages == ["the base's outputs are not kept for later runs: the code was changed during this run"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"{}",
        lambda content: content.replace(b'"run 1"', b'"run 2"'),
        lambda content: content.replace(b"0.1", b"0.2"),
        lambda content: b"\xff" + content,
    ],
    ids=["cut", "empty", "no content", "another run", "another loss", "no JSON"],
)
def test_a_damaged_file_is_one_warning(
    damage: Callable[[bytes], bytes], tmp_path: Path, scoring: Scoring, caplog: pytest.LogCaptureFixture
) -> None:
    """The base is scored again, and the file replaced."""
    store = _kept(tmp_path, scoring)
    content = store.path.read_bytes()
    assert damage(content) != content
    store.path.write_bytes(damage(content))
    assert store.find(LOG) is None
    (message,) = caplog.messages
    assert message.startswith("the base is scored again, because its outputs cannot be read: ")
    assert str(store.path) in message
    assert "\n" not in message
    store.keep("run 1", OUTPUTS, RESULTS, LOG)
    assert store.path.read_bytes() == content


def test_a_file_of_others_is_not_taken(tmp_path: Path, scoring: Scoring, caplog: pytest.LogCaptureFixture) -> None:
    """A whole file under a wrong name: a copy by hand."""
    store = _kept(tmp_path, scoring)
    other = BaseOutputs(tmp_path, replace(scoring, micro_batch_tokens=1024), CPU)
    store.path.rename(other.path)
    assert other.find(LOG) is None
    assert "of other rows or of another base" in caplog.text


def test_the_newest_files_stay(tmp_path: Path, scoring: Scoring) -> None:
    """What was used last is newest, and not what was written last."""
    stores = [BaseOutputs(tmp_path, replace(scoring, micro_batch_tokens=number), CPU) for number in range(1, 11)]
    for number, store in enumerate(stores[:8]):
        store.keep("run", OUTPUTS, {}, LOG)
        os.utime(store.path, (number, number))
    assert stores[0].find(LOG) is not None
    for store in stores[8:]:
        store.keep("run", OUTPUTS, {}, LOG)
    assert [store.path.exists() for store in stores] == [True, False, False, *[True] * 7]


def test_a_full_disk_costs_a_warning(tmp_path: Path, scoring: Scoring, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that cannot be made stands for it."""
    (tmp_path / "file").touch()
    BaseOutputs(tmp_path / "file" / "base-outputs", scoring, CPU).keep("run", OUTPUTS, {}, LOG)
    (message,) = caplog.messages
    assert message.startswith("the base's outputs are not kept for later runs: ")


def test_results_of_another_sandbox_are_computed_again(
    tmp_path: Path, scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs are found without them: what a package that is installed later changes, is the results alone."""
    _kept(tmp_path, scoring)
    monkeypatch.setattr(base_outputs, "sandbox_sha256", lambda: "other")
    found = BaseOutputs(tmp_path, scoring, CPU).find(LOG)
    assert found is not None
    assert (found.outputs, found.results) == (OUTPUTS, {})


def test_a_known_base_is_not_scored_again(token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are returned as they are, and the tuned model's have the bits that they have with a scored base."""
    training = _training(token_dir, EMBEDDED_BASE)
    network = load_frozen(training.model, training.plan, CPU, torch.float32)
    trained = {name: p.detach() * 1.5 for name, p in network.named_parameters() if p.requires_grad}
    best = write_checkpoint(tmp_path, Snapshot(trained, {}), 3, {"identity": "x", "metrics_bytes": 0})
    calls: list[str] = []
    for name in ("row_losses", "complete"):
        work = getattr(tasks.scoring, name)
        monkeypatch.setattr(tasks.scoring, name, lambda *a, name=name, work=work: (calls.append(name), work(*a))[1])
    scoring = Scoring(training, str(best), 512, SamplingConfig(max_new_tokens=4))
    both = score_models(scoring, CPU, TrunkCacheConfig())
    assert both.base != both.tuned
    assert calls.count("row_losses") == 2
    assert calls.count("complete") == 4
    calls.clear()
    known = score_models(replace(scoring, base=OUTPUTS), CPU, TrunkCacheConfig())
    assert (known.base, known.tuned, known.tokens) == (OUTPUTS, both.tuned, both.tokens)
    assert calls.count("row_losses") == 1
    assert calls.count("complete") == 2


def test_ranks_are_told_what_is_known(scoring: Scoring, tmp_path: Path) -> None:
    """With the texts, infinities and numbers of rows that it has."""
    job = GangJob(scoring.training, 1.0, scoring=replace(scoring, base=OUTPUTS))
    write_job(tmp_path / "job.json", job)
    read = read_job(tmp_path / "job.json").scoring
    assert read is not None
    assert read.base == OUTPUTS

"""Training on two GPUs: sums through NCCL, CUDA graphs, trunk outputs on the devices. Skipped below two GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import (
    Gang,
    Outcome,
    Training,
    addends,
    agreements,
    assert_equal,
    build,
    fill,
    metrics_of,
    outputs_of,
    run_training,
    scores,
    sums,
)

from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.ranks import ALONE
from model.engine.trunk import TrunkCacheConfig
from model.net.config import GPTConfig
from model.net.gpt import GPTModel

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CUDA = torch.device("cuda", 0)
ALL_BUT_ONE = -1  # rows of a step: the last step of an epoch has one row
CONFIG = {
    "epochs": 4,
    "batch_size": 7,
    "micro_batch_tokens": 512,
    "learning_rate": 1e-3,
    "eval_freq": 5,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with heads of width 64, like the real sizes."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    GPTModel(GPTConfig(vocab_size=320, n_positions=512, n_embd=128, n_layer=4, n_head=2)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    """Two ranks on two GPUs."""
    found = Gang(2, "cuda")
    yield found
    found.end()


@pytest.fixture
def training(base: Path, token_dir: Path) -> Training:
    """In bf16, with dropout and two trained blocks."""
    return Training(base, token_dir, {**CONFIG, "precision": "bf16"}, unfrozen=2, double=False)


def run_on_one_gpu(training: Training, directory: Path) -> Outcome:
    """The same training in a world of one."""
    return run_training(replace(ALONE, device=CUDA), training, directory)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"batch_size": 1, "max_steps": 20}, {}, id="a rank without rows"),
        pytest.param({"batch_size": ALL_BUT_ONE}, {}, id="a rank without rows at times"),
        pytest.param({"prompt_loss_weight": 0.3}, {"train_head": True}, id="prompts and head"),
        pytest.param({}, {"unfrozen": None}, id="everything"),
        pytest.param({}, {"cache": {"max_bytes": 0}}, id="nothing kept"),
        pytest.param({"precision": "fp16"}, {}, id="fp16"),
    ],
)
def test_two_gpus_agree_with_one(
    gang: Gang, training: Training, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """Losses and norms within bf16's rounding; the base's validation, and both ranks' weights, bit for bit."""
    if settings.get("batch_size") == ALL_BUT_ONE:
        settings = {**settings, "batch_size": len(CodeAlpacaDataset(training.tokens, "train")) - 1}
    training = replace(training, config={**training.config, **settings}, **options)
    want = run_on_one_gpu(training, tmp_path / "one")
    outcomes = gang.call(run_training, training, tmp_path / "two")
    assert [outcome.error for outcome in (want, *outcomes)] == ["", "", ""]
    assert_equal(tmp_path / "two", tmp_path / "two", outcomes, outcomes)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert one[0] == two[0]
    for (step, some), (its, others) in zip(two, one, strict=True):
        assert step == its
        assert some == pytest.approx(others, rel=3e-2)
    # 20 steps of one row are less than an epoch: no output is needed twice, and none is kept.
    if options.get("unfrozen", 2) is not None and "cache" not in options and training.config["batch_size"] > 1:
        assert all("on the device" in outcome.result.trunk for outcome in outcomes)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    gang: Gang, training: Training, tmp_path: Path, precision: str
) -> None:
    """SIGKILL of one rank between two checkpoints; new processes repeat the original."""
    training = replace(training, config={**training.config, "precision": precision})
    whole = gang.call(run_training, training, tmp_path / "whole")
    cut = Gang(2, "cuda")
    cut.start(run_training, replace(training, kill=(1, 13)), tmp_path / "cut")
    assert cut.wait_for_death() == [False, True]
    cut.end()
    again = gang.call(run_training, training, tmp_path / "cut")
    resumed = {outcome.result.resumed_from for outcome in again}
    assert resumed in ({10}, {5})  # the checkpoint of step 10 may not have been on the disk yet
    assert_equal(tmp_path / "cut", tmp_path / "whole", again, whole)


def test_one_rank_stops_both(gang: Gang, training: Training, tmp_path: Path) -> None:
    """At the same step, with a checkpoint of it; the resumed training repeats the original bit for bit."""
    whole = gang.call(run_training, training, tmp_path / "whole")
    cut = gang.call(run_training, replace(training, stop=(1, 8)), tmp_path / "cut")
    (error,) = {outcome.error for outcome in cut}
    assert error.startswith("TrainingStoppedError: stopped on request after step 9 of")
    again = gang.call(run_training, training, tmp_path / "cut")
    assert [outcome.result.resumed_from for outcome in again] == [9, 9]
    assert_equal(tmp_path / "cut", tmp_path / "whole", again, whole)


def test_both_ranks_end_where_a_loss_is_not_finite(gang: Gang, training: Training, tmp_path: Path) -> None:
    """Steps are queued ahead; both ranks have the weights of the step before the loss that was not a number."""
    outcomes = gang.call(run_training, replace(training, poison=(1, 7)), tmp_path / "poisoned")
    (error,) = {outcome.error for outcome in outcomes}
    assert error.startswith("NonFiniteError: loss nan")
    assert "at step 8" in error
    before = gang.call(run_training, replace(training, stop=(0, 6)), tmp_path / "before")
    assert "after step 7 of" in before[0].error
    for outcome in outcomes:
        assert all(np.array_equal(outcome.weights[name], weight) for name, weight in before[0].weights.items())


def test_changed_parameter_is_not_saved(gang: Gang, training: Training, tmp_path: Path) -> None:
    """On both ranks, by name."""
    outcomes = gang.call(run_training, replace(training, spoil=(1, 10, 1e-2)), tmp_path)
    (error,) = {outcome.error for outcome in outcomes}
    assert "of rank 1 differ from those of rank 0 at step 10 (1 tensors, first ln_f.bias)" in error


def test_sums_are_serial_sums(gang: Gang) -> None:
    """Bit for bit, for any number of elements; on a CPU they are the same sums."""
    sizes = [1, 2, 3, 64, 1536, 100_001, 3_000_000]
    for got in gang.call(sums, sizes, torch.float32):
        for size, values in zip(sizes, got, strict=True):
            want = addends(0, size, torch.float32) + addends(1, size, torch.float32)
            assert np.array_equal(values, want.numpy())
    answers = gang.call(agreements)
    assert answers[0] == answers[1]
    assert answers[0]["host"] == [[0.0, 0.0], [1.0, 1.0]]


def test_each_chunk_is_computed_once(gang: Gang, training: Training) -> None:
    """Both GPUs have all outputs, with the bits that one GPU computes."""
    engine = Engine(build(training, CUDA), torch.bfloat16)
    outputs = outputs_of(engine, training.tokens, TrunkCacheConfig(), ALONE)
    for chunk in outputs.chunks:
        outputs.fill(chunk)
    assert outputs.values is not None
    want = outputs.values.cpu().float().numpy()
    rows = len(CodeAlpacaDataset(training.tokens, "train"))
    answers = gang.call(fill, training, TrunkCacheConfig(), rows, torch.bfloat16)
    assert [answer[0] for answer in answers] == ["device", "device"]
    assert sum(answer[1] for answer in answers) == outputs.computed
    assert max(answer[1] for answer in answers) < 0.7 * outputs.computed
    assert all(np.array_equal(answer[3], want) for answer in answers)


def test_scores_are_those_of_one_gpu(gang: Gang, training: Training) -> None:
    """Bit for bit, in any passes."""
    for max_tokens in (100, 600):
        want = scores(replace(ALONE, device=CUDA), training, max_tokens, torch.bfloat16)
        for got in gang.call(scores, training, max_tokens, torch.bfloat16):
            assert np.array_equal(got[0], want[0])
            assert np.array_equal(got[1], want[1])

"""Training in several processes: it equals a training in one, resumes bit for bit, and all ranks end together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
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
    metrics_of,
    run_alone,
    run_training,
    scores,
    sums,
)
from safetensors.torch import load_file

from model.data.tokens import CodeAlpacaDataset
from model.engine.checkpoint import checkpoint_path
from model.engine.ranks import ALONE, join_ranks

ALL_BUT_ONE = -1  # rows of a step: the last step of an epoch has one row
CONFIG = {
    "epochs": 50,
    "max_steps": 100,
    "batch_size": 8,  # neither a multiple of 3, nor a divisor of the number of rows
    "micro_batch_tokens": 130,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "eval_freq": 40,
    "precision": "fp32",
}


Kind = Callable[[Training], Training]


def in_double(training: Training) -> Training:
    """The training in float64."""
    return replace(training, double=True)


def in_bf16(training: Training) -> Training:
    """The training with parameters in float32 and passes in bfloat16."""
    return replace(training, double=False, config={**training.config, "precision": "bf16"})


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, Gang]]:
    """Two and three ranks, for tests that leave them alive."""
    found = {world: Gang(world) for world in (2, 3)}
    yield found
    for gang in found.values():
        gang.end()


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Gang]:
    """Four ranks that pretend to be on two hosts."""
    gang = Gang(4, hosts=2)
    yield gang
    gang.end()


def assert_close(got: Path, want: Path, outcome: Outcome, wanted: Outcome) -> None:
    """Journals and weights agree to 1e-10."""
    pairs = list(zip(metrics_of(got), metrics_of(want), strict=True))
    for (step, some), (its, others) in pairs:
        assert step == its
        assert some == pytest.approx(others, rel=1e-10, abs=1e-10)
    for name, weight in wanted.weights.items():
        np.testing.assert_allclose(outcome.weights[name], weight, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"batch_size": 1}, {}, id="ranks without rows"),
        pytest.param({"batch_size": ALL_BUT_ONE, "max_steps": 20}, {}, id="ranks without rows at times"),
        pytest.param({"dropout": 0.2, "batch_size": 7}, {}, id="dropout"),
        pytest.param({"prompt_loss_weight": 0.3}, {"train_head": True}, id="prompts and head"),
        pytest.param({"dropout": 0.1}, {"unfrozen": None}, id="everything", marks=pytest.mark.slow),
        pytest.param({"dropout": 0.1}, {"cache": {"max_bytes": 0}}, id="nothing kept", marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_one_process(
    gangs: dict[int, Gang],
    gpt2_dir: Path,
    token_dir: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """One, two and three ranks agree to 1e-10 over 100 steps; the ranks of a gang have equal weights."""
    if settings.get("batch_size") == ALL_BUT_ONE:
        settings = {**settings, "batch_size": len(CodeAlpacaDataset(token_dir, "train")) - 1}
    training = Training(gpt2_dir, token_dir, {**CONFIG, **settings}, **options)
    want = run_alone(training, tmp_path / "1")
    assert want.result is not None
    for world, gang in gangs.items():
        outcomes = gang.call(run_training, training, tmp_path / str(world))
        assert_close(tmp_path / str(world), tmp_path / "1", outcomes[0], want)
        for outcome in outcomes:
            assert outcome.error == ""
            assert all(np.array_equal(outcome.weights[name], weight) for name, weight in outcomes[0].weights.items())


@pytest.mark.parametrize(
    ("world", "killed", "kind"),
    [
        pytest.param(2, 1, in_double, id="second of two"),
        pytest.param(3, 0, in_double, id="first of three"),
        pytest.param(3, 1, in_bf16, id="bf16"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path, world: int, killed: int, kind: Kind
) -> None:
    """SIGKILL of one rank between two checkpoints: the others end with an error; new ranks repeat the original."""
    config = {**CONFIG, "max_steps": 23, "eval_freq": 5, "dropout": 0.1}
    training = kind(Training(gpt2_dir, token_dir, config))
    whole = gangs[world].call(run_training, training, tmp_path / "whole")
    cut = Gang(world)
    cut.start(run_training, replace(training, kill=(killed, 13)), tmp_path / "cut")
    survivors = cut.answers_of_survivors()
    assert len(survivors) == world - 1
    assert all(outcome.error and outcome.result is None for outcome in survivors)
    again = gangs[world].call(run_training, training, tmp_path / "cut")
    assert [outcome.result.resumed_from for outcome in again] == [10] * world
    assert_equal(tmp_path / "cut", tmp_path / "whole", again, whole)


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_one_rank_stops_all(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path, asking: int
) -> None:
    """Whoever is asked to stop, all ranks stop at one step, with a checkpoint of it, and resume bit for bit."""
    training = Training(gpt2_dir, token_dir, {**CONFIG, "max_steps": 13, "eval_freq": 50, "dropout": 0.1})
    whole = gangs[3].call(run_training, training, tmp_path / "whole")
    cut = gangs[3].call(run_training, replace(training, stop=(asking, 6)), tmp_path / "cut")
    assert {outcome.error for outcome in cut} == {"TrainingStoppedError: stopped on request after step 7 of 13"}
    assert {outcome.asked for outcome in cut} == {8}
    assert checkpoint_path(tmp_path / "cut", 7).is_dir()
    again = gangs[3].call(run_training, training, tmp_path / "cut")
    assert [outcome.result.resumed_from for outcome in again] == [7] * 3
    assert [outcome.warnings for outcome in again] == [[]] * 3
    assert_equal(tmp_path / "cut", tmp_path / "whole", again, whole)


@pytest.mark.parametrize("options", [{}, {"from_files": True}], ids=["in memory", "in a file"])
def test_one_rank_stops_all_before_the_first_step(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """While the frozen blocks' outputs and the base's validation are computed; nothing is lost, and no rank waits."""
    cache = {"directory": tmp_path / "cache"} if options else {}
    config = {**CONFIG, "max_steps": 9, "eval_freq": 5, "dropout": 0.1}
    training = Training(gpt2_dir, token_dir, config, cache=cache, **options)
    whole = gangs[3].call(run_training, training, tmp_path / "whole")
    (count,) = {outcome.asked_early for outcome in whole}
    assert count > 5
    for rank, number in ((0, 0), (1, count // 2), (2, count - 1)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        cut = gangs[3].call(run_training, replace(training, stop_early=(rank, number)), tmp_path / str(number))
        said = "TrainingStoppedError: stopped on request before step 1 of 9"
        assert [(outcome.error, outcome.asked_early, outcome.asked) for outcome in cut] == [(said, number + 1, 0)] * 3
        if number in (0, count - 1):  # before and after the base's validation
            assert checkpoint_path(tmp_path / str(number), 0).is_dir() == (number > 0)
        again = gangs[3].call(run_training, training, tmp_path / str(number))
        assert_equal(tmp_path / str(number), tmp_path / "whole", again, whole)
    cut = gangs[3].call(run_training, replace(training, stop=(0, 6)), tmp_path / "late")
    for _ in range(2):
        cut = gangs[3].call(run_training, replace(training, stop_early=(1, 0)), tmp_path / "late")
        assert {outcome.error for outcome in cut} == {"TrainingStoppedError: stopped on request before step 8 of 9"}
    again = gangs[3].call(run_training, training, tmp_path / "late")
    assert [outcome.result.resumed_from for outcome in again] == [7] * 3
    assert_equal(tmp_path / "late", tmp_path / "whole", again, whole)


def test_checkpoint_is_read_at_any_number_of_ranks(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path
) -> None:
    """One written by two ranks, at one and three: the rest of the training agrees to 1e-10, and a warning says so."""
    training = Training(gpt2_dir, token_dir, {**CONFIG, "max_steps": 40, "dropout": 0.1})
    whole = run_alone(training, tmp_path / "whole")
    cut = gangs[2].call(run_training, replace(training, stop=(0, 16)), tmp_path / "cut")
    assert "after step 17" in cut[0].error
    shutil.copytree(tmp_path / "cut", tmp_path / "3")
    resumed = {
        "cut": [run_alone(training, tmp_path / "cut")],
        "3": gangs[3].call(run_training, training, tmp_path / "3"),
    }
    for name, outcomes in resumed.items():
        assert outcomes[0].result is not None
        assert outcomes[0].result.resumed_from == 17
        (warning,) = outcomes[0].warnings
        assert f"is of a training on 2 ranks, and it goes on with {len(outcomes)}" in warning
        assert [outcome.warnings for outcome in outcomes[1:]] == [[]] * (len(outcomes) - 1)
        assert_close(tmp_path / name, tmp_path / "whole", outcomes[0], whole)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_keep_what_they_round_for_passes(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path, world: int
) -> None:
    """In bf16 ranks send each other rounded parameters; a checkpoint, and all ranks then, have those not rounded."""
    training = in_bf16(Training(gpt2_dir, token_dir, {**CONFIG, "max_steps": 12, "eval_freq": 4}))
    outcomes = gangs[world].call(run_training, training, tmp_path / "gang")
    run_alone(training, tmp_path / "alone")
    saved = load_file(checkpoint_path(tmp_path / "gang", 12) / "model.safetensors")
    trained = [name for name in saved if name.startswith(("h.2.", "ln_f."))]
    assert len(trained) == 14
    for name in trained:
        values = saved[name]
        assert (values != values.bfloat16()).double().mean() > 0.9, name
        for outcome in outcomes:
            assert np.array_equal(outcome.weights[name], values.numpy()), name
    for (step, some), (its, others) in zip(
        metrics_of(tmp_path / "gang"), metrics_of(tmp_path / "alone"), strict=True
    ):
        assert step == its
        assert some == pytest.approx(others, rel=3e-2)


@pytest.mark.parametrize(
    ("kind", "change"), [pytest.param(in_double, 1e-12, id="double"), pytest.param(in_bf16, 1e-2, id="bf16")]
)
def test_changed_parameter_is_not_saved(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path, kind: Kind, change: float
) -> None:
    """A parameter that passes use with other bits on one rank ends all ranks, which name it."""
    training = kind(Training(gpt2_dir, token_dir, {**CONFIG, "eval_freq": 10}, spoil=(1, 20, change)))
    outcomes = gangs[3].call(run_training, training, tmp_path / "spoilt")
    (error,) = {outcome.error for outcome in outcomes}
    assert error.startswith("RanksDifferError: the parameters of rank 1 differ from those of rank 0 at step 20 (")
    assert "(1 tensors, first ln_f.bias)" in error
    assert [path.name for path in sorted((tmp_path / "spoilt").glob("step-*"))][-1] == "step-00000010"


def test_ranks_must_start_alike(gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path) -> None:
    """A frozen weight that differs on a rank is found before the first step."""
    outcomes = gangs[3].call(run_training, Training(gpt2_dir, token_dir, CONFIG, odd=2), tmp_path)
    (error,) = {outcome.error for outcome in outcomes}
    assert "rank 2 differ from those of rank 0 at the start (1 tensors, first wte.weight)" in error
    assert {outcome.asked for outcome in outcomes} == {0}


@pytest.mark.parametrize("kind", [pytest.param(in_double, id="double"), pytest.param(in_bf16, id="bf16")])
def test_all_ranks_end_where_a_loss_is_not_finite(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path, kind: Kind
) -> None:
    """A loss that is not a number on one rank ends all of them at that step, with the weights of the step before."""
    training = kind(Training(gpt2_dir, token_dir, CONFIG))
    outcomes = gangs[2].call(run_training, replace(training, poison=(1, 5)), tmp_path / "poisoned")
    (error,) = {outcome.error for outcome in outcomes}
    assert error.startswith("NonFiniteError: loss nan with gradient norm")
    assert "at step 6" in error
    before = gangs[2].call(run_training, replace(training, stop=(0, 4)), tmp_path / "before")
    for outcome in outcomes:
        assert all(np.array_equal(outcome.weights[name], weight) for name, weight in before[0].weights.items())


def test_all_ranks_end_where_a_validation_is_not_finite(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, tmp_path: Path
) -> None:
    """An update that is far too large: all ranks end with the same weights, and nothing of it is saved."""
    training = in_bf16(Training(gpt2_dir, token_dir, {**CONFIG, "learning_rate": 1e30, "eval_freq": 1}))
    outcomes = gangs[2].call(run_training, training, tmp_path)
    (error,) = {outcome.error for outcome in outcomes}
    assert error == "NonFiniteError: validation loss is nan at step 1: lower the learning rate"
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000000"]
    for name, weight in outcomes[0].weights.items():
        assert np.array_equal(outcomes[1].weights[name], weight, equal_nan=True), name


@pytest.mark.slow
def test_full_memory_of_one_rank_ends_within_the_timeout(gpt2_dir: Path, token_dir: Path, tmp_path: Path) -> None:
    """That rank says how long passes should be; the other one gives up when an exchange takes too long."""
    gang = Gang(2, timeout=20)
    try:
        config = {**CONFIG, "micro_batch_tokens": 4096}
        begin = time.monotonic()
        outcomes = gang.call(run_training, Training(gpt2_dir, token_dir, config, starve=(1, 3)), tmp_path)
        assert time.monotonic() - begin < 120
        assert "PassesTooLongError: memory of rank 1 does not hold passes of" in outcomes[1].error
        assert outcomes[0].error
        assert "PassesTooLong" not in outcomes[0].error
    finally:
        gang.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_sums_are_serial_sums(gangs: dict[int, Gang], world: int, dtype: torch.dtype) -> None:
    """Bit for bit the sum in the order of the ranks, on every rank, for any number of elements."""
    sizes = [1, 2, 3, 64, 1536, 100_001]
    for got in gangs[world].call(sums, sizes, dtype):
        for size, values in zip(sizes, got, strict=True):
            want = addends(0, size, dtype)
            for rank in range(1, world):
                want = want + addends(rank, size, dtype)
            assert np.array_equal(values, want.numpy())


def test_ranks_agree_on_small_things(gangs: dict[int, Gang]) -> None:
    """Flags, numbers and values are the same on all ranks."""
    answers = gangs[3].call(agreements)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == {
        "third": True,
        "none": False,
        "later": True,
        "local": True,
        "lowest": 8,
        "lowest of host": 8,
        "highest": -8,
        "gathered": ["rank 0", "rank 1", "rank 2"],
        "first": 0,
        "first of host": 0,
        "host": [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]],
        "merged": [0.1, 1.1, 2.1, 0.0],
    }
    assert agreements(ALONE)["gathered"] == ["rank 0"]


def test_ranks_of_two_hosts(two_hosts: Gang) -> None:
    """What is local stays on a host; the rest is common to all."""
    answers = two_hosts.call(agreements)
    assert [answer["first of host"] for answer in answers] == [0, 0, 2, 2]
    assert [answer["local"] for answer in answers] == [True, True, False, False]
    assert [answer["lowest of host"] for answer in answers] == [9, 9, 7, 7]
    assert [answer["host"] for answer in answers] == [[[0.0] * 2, [1.0] * 2]] * 2 + [[[2.0] * 2, [3.0] * 2]] * 2
    assert {answer["lowest"] for answer in answers} == {7}
    assert {answer["third"] for answer in answers} == {True}


def test_hosts_train_together(
    gangs: dict[int, Gang], two_hosts: Gang, gpt2_dir: Path, token_dir: Path, tmp_path: Path
) -> None:
    """Four ranks on two hosts, which compute the trunk once per host, agree with one process."""
    training = Training(gpt2_dir, token_dir, {**CONFIG, "max_steps": 30})
    want = run_alone(training, tmp_path / "1")
    outcomes = two_hosts.call(run_training, training, tmp_path / "4")
    assert_close(tmp_path / "4", tmp_path / "1", outcomes[0], want)


@pytest.mark.parametrize("max_tokens", [60, 300, 10_000])
def test_scores_are_those_of_one_process(
    gangs: dict[int, Gang], gpt2_dir: Path, token_dir: Path, max_tokens: int
) -> None:
    """Bit for bit, on all ranks, also where a rank has no pack."""
    training = Training(gpt2_dir, token_dir, {})
    want = scores(ALONE, training, max_tokens)
    for gang in gangs.values():
        for got in gang.call(scores, training, max_tokens):
            assert np.array_equal(got[0], want[0])
            assert np.array_equal(got[1], want[1])


def test_environment_must_be_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the message names the variables; a world of one needs no process group."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE, LOCAL_RANK"), join_ranks(torch.device("cpu"), 5):
        pass
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with join_ranks(torch.device("cpu"), 5) as ranks:
        assert (ranks.world, ranks.leads) == (1, True)
        assert not torch.distributed.is_initialized()

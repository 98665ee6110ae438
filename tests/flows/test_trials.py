"""The grid of a sweep, and the trials that it makes."""

from __future__ import annotations

from typing import Any

import pytest

from flows.__main__ import main
from flows.arguments import complaint, parse
from flows.job import Job, all_parameters, defaults
from flows.trials import MOST_TRIALS, SweepConfig, SweepJob, job_kind, sweepable

RATES = {"learning_rate": [0.0001, 0.0003]}


def test_each_combination_is_a_trial() -> None:
    """With the parameters of the run of finetune that it stands for, and a name that says what differs."""
    given = {"model_size": "tiny", "epochs": 2, "device": "cpu"}
    grid = {"learning_rate": ["1e-4", 3e-4], "dropout": [0, 0.1], "max_steps": [None]}
    trials = SweepJob.from_parameters(given | {"grid": grid}).trials()
    assert [trial.name for trial in trials] == [
        "lr 0.0001, dropout 0.0, max_steps null",
        "lr 0.0001, dropout 0.1, max_steps null",
        "lr 0.0003, dropout 0.0, max_steps null",
        "lr 0.0003, dropout 0.1, max_steps null",
    ]
    for trial in trials:
        alone = Job.from_parameters(given | trial.changes)
        assert (trial.train, trial.freeze, trial.params) == (alone.train, alone.freeze, alone.flat())


def test_trials_that_share_a_base_are_neighbours() -> None:
    """The base is loaded again where other blocks train: once for each number of them."""
    grid = {"learning_rate": [0.1, 0.2], "num_unfrozen_layers": [3, 1]}
    trials = SweepJob.from_parameters({"model_size": "tiny", "device": "cpu", "grid": grid}).trials()
    assert [(trial.freeze.num_unfrozen_layers, trial.train.learning_rate) for trial in trials] == [
        (3, 0.1), (3, 0.2), (1, 0.1), (1, 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, "grid is empty: name values to try"),
        ({}, "grid is empty"),
        ({"lr": [1]}, "grid has 'lr', which is none of seed, epochs, max_steps, batch_size, .*, num_unfrozen_layers"),
        ({"a\nb" * 1000: [1]}, "grid has 'a.*, which is none of"),
        ({"dataset": ["demo"]}, "grid has 'dataset', which is none of"),
        ({"split_seed": [1, 2]}, "grid cannot have split_seed: it decides the splits, and losses on other rows"),
        ({"eval_rows": [1, 2]}, "grid cannot have eval_rows: losses on other rows"),
        ({"learning_rate": []}, "grid has no list of values for learning_rate: name at least one"),
        ({"learning_rate": [0.1, 0]}, "grid has learning_rate 0: more than 0 is needed, not 0"),
        ({"learning_rate": [True]}, "grid has learning_rate True: .*not true or false"),
        ({"learning_rate": [[0.1]]}, r"grid has learning_rate \[0.1\]: a number is needed, not \[0.1\]"),
        ({"precision": ["fp8"]}, "grid has precision 'fp8': 'auto', 'bf16', .* is needed, not 'fp8'"),
        ({"learning_rate": [0.1, "1e-1"]}, "grid has learning_rate '1e-1' twice: leave one out"),
        ({"epochs": list(range(1, 101)), "batch_size": list(range(1, 101))}, "grid has 10,000 trials, more than 256"),
        ({"num_unfrozen_layers": [1, 7]}, "num_unfrozen_layers 7 is not between 0 and 6, the blocks of tiny"),
        ({"precision": ["tf32"]}, "precision tf32 needs a GPU that has TF32"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_sentence(grid: Any, message: str) -> None:
    """Before anything is fetched."""
    with pytest.raises(ValueError, match=message) as caught:
        SweepJob.from_parameters({"model_size": "tiny", "device": "cpu", "grid": grid})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_contradictions_are_refused() -> None:
    """A grid over blocks where nothing is frozen, the rows of a night, and several GPUs for each trial."""
    given = {"model_size": "tiny", "device": "cpu", "freeze_layers": False}
    with pytest.raises(ValueError, match="which freeze_layers=false ignores: leave one out"):
        SweepJob.from_parameters(given | {"grid": {"num_unfrozen_layers": [1]}})
    with pytest.raises(ValueError, match="subset=next chooses the rows of a night, which a sweep cannot do"):
        SweepJob.from_parameters({"model_size": "tiny", "device": "cpu", "subset": "next", "grid": RATES})
    for gpus in (2, "all"):
        with pytest.raises(ValueError, match=f"^gpus {gpus} is refused: a sweep trains each trial on one GPU.*$"):
            SweepJob.from_parameters({"model_size": "tiny", "device": "cpu", "gpus": gpus, "grid": RATES})


def test_as_many_trials_as_are_allowed() -> None:
    """The bound itself is allowed."""
    values = [0.001 * n for n in range(1, MOST_TRIALS + 1)]
    job = SweepJob.from_parameters({"model_size": "tiny", "device": "cpu", "grid": {"learning_rate": values}})
    assert len(job.trials()) == MOST_TRIALS


def test_the_parameters_are_those_of_finetune_and_two_more() -> None:
    """Every parameter of the training can be swept, but for those that change what is compared."""
    own = {parameter.name for parameter in SweepConfig.declared()}
    assert own == {"grid", "end_early"}
    names = [parameter.name for parameter in all_parameters(SweepJob)]
    assert {*names} == {parameter.name for parameter in all_parameters()} | own
    assert defaults(SweepJob) == defaults() | {"grid": None, "end_early": False}
    assert job_kind("sweep") is SweepJob
    assert job_kind("finetune") is Job
    assert {"learning_rate", "weight_decay", "dropout", "num_unfrozen_layers"} < sweepable().keys()


def test_a_mistake_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It is answered at once, in one line; a deployment of the other flow has no grid."""
    assert main(["sweep-tiny", "grid={learning_rate: [0]}"]) == 2
    assert capsys.readouterr().err == "grid has learning_rate 0: more than 0 is needed, not 0\n"
    assert main(["tiny", "grid={learning_rate: [1]}"]) == 2
    assert capsys.readouterr().err.startswith("no parameter is called grid")
    assert main(["sweep-tiny", "grid=3"]) == 2
    assert capsys.readouterr().err == "grid: a name with its values is needed, not 3\n"
    assert complaint(parse(["sweep-tiny"]).parameters, "sweep") is None
    assert complaint(parse(["sweep-355m", "grid={weight_decay: [0, 0.1]}"]).parameters, "sweep") is None

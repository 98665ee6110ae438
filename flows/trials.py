"""The parameters of the flow ``sweep``: those of ``finetune`` and a grid, and the trials that the grid makes of them.

Nothing here imports torch, Prefect or MLflow, so that a wrong grid is refused at once.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flows.job import Job
from model.engine.config import TrainConfig
from model.files import shown
from model.net.config import FreezeConfig
from model.parameters import Parameter, Parameters, refusal_reason
from tasks.config import TrialConfig

MOST_TRIALS = 256
_FROZEN = "num_unfrozen_layers"  # the one parameter of a grid that is not of the training
_SHORT = {"learning_rate": "lr"}
_REFUSED = {
    "split_seed": "it decides the splits, and losses on other rows cannot be compared",
    "eval_rows": "losses on other rows cannot be compared",
}
# A trial that differs in one of these cannot use the base or the outputs of the frozen blocks of the trial before it.
_COSTLY = (_FROZEN, "precision", "micro_batch_tokens", "prompt_loss_weight")

Grid = dict[str, list[Any]]


@dataclass(frozen=True)
class SweepConfig(Parameters):
    """Which trials a sweep has, and which of them are trained to their end."""

    grid: Grid | None = None
    """Values to try, by parameter, such as {"learning_rate": [0.0001, 0.0003]}; each combination is a trial."""
    end_early: bool = False
    """End a trial whose validation loss is worse than the median of the others' after the same share of steps."""


@dataclass(frozen=True)
class SweepJob(Job):
    """What a run of the flow ``sweep`` is to do."""

    sweep: SweepConfig

    def check(self) -> None:
        """Refuse what can be refused before anything is fetched, in each trial.

        Raises:
            ValueError: the message names the parameter.
        """
        super().check()
        if self.night.subset:
            raise ValueError(
                f"subset={self.night.subset} chooses the rows of a night, which a sweep cannot do: leave it out, or "
                "set subset_start and subset_count"
            )
        from tasks.nodes import Nodes  # imports torch, which takes seconds

        if Nodes.load().count > 1:
            raise ValueError("FINETUNE_NODES is for runs of finetune: a sweep trains on one machine: unset it")
        if self.hardware.gpus != 1:
            raise ValueError(
                f"gpus {self.hardware.gpus} is refused: a sweep trains each trial on one GPU, and uses all GPUs that "
                "are free: leave gpus out"
            )
        for trial in self.trials():
            Job.check(replace(self, freeze=trial.freeze, train=trial.train))

    def check_machine(self) -> None:
        """Refuse what this machine cannot do, in each trial.

        Raises:
            ValueError: the message names the parameter.
        """
        for trial in self.trials():
            Job.check_machine(replace(self, freeze=trial.freeze, train=trial.train))

    def trials(self) -> list[TrialConfig]:
        """Each combination of the grid's values.

        Raises:
            ValueError: the grid is wrong; the message says where.
        """
        grid = check_grid(self.sweep.grid, self.freeze.freeze_layers)
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        position = {name: {repr(value): n for n, value in enumerate(grid[name])} for name in _COSTLY if name in grid}
        # The order is kept otherwise: Python's sort is stable.
        combinations.sort(key=lambda changes: [order[repr(changes[name])] for name, order in position.items()])
        return [self._trial(changes) for changes in combinations]

    def _trial(self, changes: dict[str, Any]) -> TrialConfig:
        of_train = {name: value for name, value in changes.items() if name != _FROZEN}
        of_freeze = {name: value for name, value in changes.items() if name == _FROZEN}
        own = {*asdict(self.sweep)}
        params = {name: value for name, value in self.flat().items() if name not in own} | changes
        name = ", ".join(f"{_SHORT.get(name, name)} {_text(value)}" for name, value in changes.items())
        return TrialConfig(name, changes, params, replace(self.freeze, **of_freeze), replace(self.train, **of_train))

    def logged(self) -> dict[str, Any]:
        """What the sweep's MLflow run logs when it begins: the values of the grid's parameters are not known yet."""
        values = {name: value for name, value in self.flat().items() if name not in (self.sweep.grid or {})}
        return values | {"grid": json.dumps(check_grid(self.sweep.grid))}


def job_kind(flow: str) -> type[Job]:
    """The parameters of a flow, by its name."""
    return SweepJob if flow == "sweep" else Job


def sweepable() -> dict[str, Parameter]:
    """The parameters that a grid may have, by name."""
    frozen = [each for each in FreezeConfig.declared() if each.name == _FROZEN]
    return {each.name: each for each in (*TrainConfig.declared(), *frozen) if each.name not in _REFUSED}


def check_grid(grid: Mapping[str, Any] | None, freezes: bool = True) -> Grid:
    """A grid with its values as the parameters take them.

    Args:
        freezes: whether anything is frozen.

    Raises:
        ValueError: no or too many trials, an unknown parameter, or a value that it does not take or that is there
            twice; the message names the first one.
    """
    if not grid:
        raise ValueError('grid is empty: name values to try, such as {"learning_rate": [0.0001, 0.0003]}')
    for name, values in grid.items():
        if name in _REFUSED:
            raise ValueError(f"grid cannot have {name}: {_REFUSED[name]}")
        if name not in sweepable():
            raise ValueError(f"grid has {shown(name)}, which is none of {', '.join(sweepable())}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid has no list of values for {name}: name at least one")
    if _FROZEN in grid and not freezes:
        raise ValueError(f"grid has {_FROZEN}, which freeze_layers=false ignores: leave one out")
    trials = math.prod(len(values) for values in grid.values())
    if trials > MOST_TRIALS:
        raise ValueError(f"grid has {trials:,} trials, more than {MOST_TRIALS}: leave values out")
    return {name: _check_values(name, values) for name, values in grid.items()}


def _check_values(name: str, values: list[Any]) -> list[Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(sweepable()[name].annotation)
    taken: list[Any] = []
    for value in values:
        try:
            checked = adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(f"grid has {name} {shown(value)}: {refusal_reason(error.errors()[0])}") from None
        if checked in taken:
            raise ValueError(f"grid has {name} {shown(value)} twice: leave one out")
        taken.append(checked)
    return taken


def refused_grid(parameters: Mapping[str, Any]) -> str | None:
    """What is wrong with a sweep's grid; None if nothing is."""
    try:
        check_grid(parameters.get("grid"), parameters.get("freeze_layers", True))
    except ValueError as error:
        return str(error)
    return None


def _text(value: Any) -> str:
    return "null" if value is None else str(value)

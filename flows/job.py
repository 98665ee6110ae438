"""The flow's parameters: a job in groups, the flow's signature made from it, and the tables of docs/parameters.md.

``python -m flows.job docs/parameters.md`` writes the tables anew.

Nothing here imports torch, Prefect or MLflow, so that a wrong parameter is refused at once.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_type_hints

from pydantic import BeforeValidator, Field, ValidationError, create_model

from model.data.config import PrepareConfig
from model.engine.config import TrainConfig
from model.evaluation.config import SamplingConfig
from model.net.config import FreezeConfig, GPTConfig
from model.parameters import MOST, NonNegative, Parameter, Parameters, Share, refusal_reason
from ops.text import unprintable
from tasks.config import SourceConfig

F = TypeVar("F", bound=Callable[..., Any])
# The group of each field of a job, as its help and docs/parameters.md show it.
GROUP_TITLES = {
    "sources": "Model and data set",
    "prepare": "Rows",
    "night": "Nights and promotion",
    "freeze": "What trains",
    "train": "Training",
    "sampling": "Evaluation",
    "hardware": "Hardware",
    "record": "Name and records",
    "sweep": "Sweep",
}
_BEGIN, _END = "<!-- make parameters writes what follows -->\n", "<!-- end of the parameters -->\n"
_TABLES = re.compile(f"(?<={_BEGIN}).*?(?={_END})", re.DOTALL)


@dataclass(frozen=True)
class NightConfig(Parameters):
    """Which rows a night takes, and whether its model replaces the champion."""

    subset: Literal["next"] | None = None
    """next: at most subset_count rows that no successful night has trained on, by content, instead of a window."""
    replay_share: Share = 0.2
    """Share of a night's rows that earlier nights trained on, so that they are not forgotten."""
    promote: bool = False
    """Make the result champion if it is better than the champion of this size beyond doubt, else challenger."""
    promote_margin: NonNegative = 0.001
    """Nats per token by which it must at least be better."""


def _number_or_all(value: Any) -> Any:
    """Refuse in one sentence what is neither: pydantic's union would say why it fits neither type."""
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST):
        return value
    if isinstance(value, str) and value.isdecimal() and 1 <= int(value) <= MOST:
        return int(value)
    raise ValueError("a number of GPUs, at least 1, or all is needed")


GpuCount = Annotated[Annotated[int, Field(ge=1, le=MOST)] | Literal["all"], BeforeValidator(_number_or_all)]


@dataclass(frozen=True)
class HardwareConfig(Parameters):
    """What a run may use of its machine."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    gpus: GpuCount = 1
    """GPUs that one training runs on, all of them held at once: a number, or all of the machine. It changes no step.
    With device=cpu, the number of processes."""
    trunk_cache_gb: NonNegative = 32.0
    """GB of the frozen blocks' outputs to keep at most; a matter of speed only, 0 keeps none."""


@dataclass(frozen=True)
class RecordConfig(Parameters):
    """How a run is recorded."""

    run_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of the run in MLflow and in Prefect; null makes one of the parameters."""
    system_metrics: bool | None = None
    """Log the use of processor, memory, disk, network and GPU to MLflow every 10 s; null does so on a GPU."""


@dataclass(frozen=True)
class Job:
    """What a flow run is to do. Each field is a group of the flow's parameters."""

    sources: SourceConfig
    prepare: PrepareConfig
    night: NightConfig
    freeze: FreezeConfig
    train: TrainConfig
    sampling: SamplingConfig
    hardware: HardwareConfig
    record: RecordConfig

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any], machine: bool = True) -> Self:
        """Sort the flow's parameters into their groups, by name; those that are missing have their defaults.

        Args:
            machine: also check them against this machine, for which torch is imported.

        Raises:
            TypeError: there is no parameter of that name.
            ValueError: a value does not fit its type and bounds, or they contradict each other, or this machine.
        """
        if unknown := unknown_parameters(values, cls):
            raise TypeError(f"there is no parameter {', '.join(unknown)}")
        if refused := refused_values(values, cls):
            raise ValueError("; ".join(refused))
        values = taken_values(values, cls)
        groups: dict[str, Any] = {name: group.take(values) for name, group in cls.groups().items()}
        job = cls(**groups)
        job.check()
        if machine:
            job.check_machine()
        return job

    @classmethod
    def groups(cls) -> dict[str, type[Parameters]]:
        """The groups of parameters, by the name of their field."""
        return get_type_hints(cls)

    def logged(self) -> dict[str, Any]:
        """What the MLflow run logs when it begins."""
        from model.net.device import count_processes  # imports torch, which takes seconds
        from tasks.nodes import Nodes

        of_each = count_processes(self.hardware.device, self.hardware.gpus)
        return self.flat() | {"gpus": of_each * Nodes.load().count}

    def check(self) -> None:
        """Refuse parameters that contradict each other.

        Raises:
            ValueError: the message names the parameter.
        """
        if self.night.subset and self.prepare.subset_start:
            raise ValueError(
                f"subset_start {self.prepare.subset_start} selects rows by position, and subset={self.night.subset} "
                "by content: leave one out"
            )
        self.freeze.check(GPTConfig.preset(self.sources.model_size).n_layer, self.sources.model_size)

    def check_machine(self) -> None:
        """Refuse what this machine cannot do, before anything is fetched.

        Raises:
            ValueError: the message names the parameter.
        """
        from model.evaluation.humaneval import check  # imports torch, which takes seconds
        from model.net.device import count_processes, resolve_device, resolve_precision
        from tasks.nodes import Nodes

        check(self.sampling)
        count_processes(self.hardware.device, self.hardware.gpus)
        Nodes.load()
        resolve_precision(self.train.precision, resolve_device(self.hardware.device))

    def flat(self) -> dict[str, Any]:
        """The value of each parameter, by name."""
        groups = [getattr(self, each.name) for each in fields(self)]
        return {parameter.name: getattr(group, parameter.name) for group in groups for parameter in group.declared()}


def all_parameters(kind: type[Job] = Job) -> tuple[Parameter, ...]:
    """All parameters of a flow, group by group; one that several groups have stands once."""
    found: dict[str, Parameter] = {}
    for group in kind.groups().values():
        for parameter in group.declared():
            if found.setdefault(parameter.name, parameter) != parameter:
                raise TypeError(f"{group.__name__} declares {parameter.name} unlike another group")
    # A parameter that several groups share (the seed) comes last.
    names = Counter(parameter.name for group in kind.groups().values() for parameter in group.declared())
    return tuple(sorted(found.values(), key=lambda parameter: names[parameter.name] > 1))


def unknown_parameters(values: Mapping[str, Any], kind: type[Job] = Job) -> list[str]:
    """The names that no parameter has, sorted."""
    return sorted(values.keys() - {parameter.name for parameter in all_parameters(kind)})


def refused_values(values: Mapping[str, Any], kind: type[Job] = Job) -> list[str]:
    """For each parameter whose value does not fit its type and bounds: ``name: reason``.

    Prefect checks the same when the flow begins; here nothing has to be imported or started for it.
    """
    try:
        taken_values(values, kind)
    except ValidationError as error:
        meanings = {each.name: each.meaning for each in all_parameters(kind)}
        found = {str(each["loc"][0]): each for each in reversed(error.errors())}  # of a union, each type has an entry
        return [f"{name}: {refusal_reason(found[name], meanings[name])}" for name in values if name in found]
    return [
        f"{name}: {reason}"
        for name, value in values.items()
        if isinstance(value, str) and (reason := unprintable(value))
    ]


def taken_values(values: Mapping[str, Any], kind: type[Job] = Job) -> dict[str, Any]:
    """The values as the flow will get them: of the declared types.

    Raises:
        ValidationError: a value does not fit its type and bounds.
    """
    declared = {each.name: (each.annotation, each.default) for each in all_parameters(kind)}
    checked = create_model("parameters", **declared).model_validate(dict(values))  # type: ignore[call-overload]
    return {name: getattr(checked, name) for name in values}


def defaults(kind: type[Job] = Job) -> dict[str, Any]:
    """The default of each parameter, by name."""
    return {parameter.name: parameter.default for parameter in all_parameters(kind)}


def with_parameters(function: F, kind: type[Job] = Job) -> F:
    """Give a function of ``**parameters`` a job's parameters as its signature and its docstring.

    Prefect reads both: the signature for checks, the docstring for the descriptions on its server.
    """
    declared = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.annotation)
        for each in all_parameters(kind)
    ]
    function.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    meanings = "".join(f"    {each.name}: {each.meaning}\n" for each in all_parameters(kind))
    function.__doc__ = f"{function.__doc__}\n\nArgs:\n{meanings}"
    return function


def parameter_tables() -> str:
    """The parameters in Markdown: for each group a heading and a table of name, default, meaning.

    A parameter that several groups share stands in a table of its own, which comes last.
    """
    names = Counter(each.name for group in Job.groups().values() for each in group.declared())
    parts = {
        GROUP_TITLES[field]: [each for each in group.declared() if names[each.name] == 1]
        for field, group in Job.groups().items()
    }
    parts["Shared by several groups"] = [each for each in all_parameters() if names[each.name] > 1]
    lines: list[str] = []
    for title, parameters in parts.items():
        lines += ["", f"## {title}", "", "| parameter | default | meaning |", "|---|---|---|"]
        for each in parameters:
            default = "null" if each.default is None else each.default
            lines.append(f"| `{each.name}` | `{default}` | {each.meaning} |")
    return "\n".join(lines) + "\n\n"


def write_tables(page: Path) -> None:
    """Replace the tables of parameters in a Markdown page.

    Raises:
        ValueError: the page has no place for them.
    """
    text, count = _TABLES.subn(lambda match: parameter_tables(), page.read_text())
    if count != 1:
        raise ValueError(f"{page} has {count} places that begin with '{_BEGIN.strip()}', one is needed")
    page.write_text(text)


if __name__ == "__main__":
    write_tables(Path(sys.argv[1]))

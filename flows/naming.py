"""What a run is called in Prefect and in MLflow: its size, and the parameters that tell it from other runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.commands import read_parameters
from flows.job import Job, defaults
from ops.mistakes import UsageError
from ops.text import storable

_SHORT = {"learning_rate": "lr", "num_unfrozen_layers": "top", "batch_size": "batch", "start_from": "from"}
_FIRST = ("learning_rate", "num_unfrozen_layers")  # in every name
# Of these groups, the parameters that say what was trained on what. Sampling and hardware change no model.
_TELLING = ("sources", "prepare", "night", "freeze", "train")
_SILENT = {
    "model_size", "subset", "freeze_layers", "eval_freq", "eval_rows", "micro_batch_tokens", "max_dropped_share",
    "promote", "promote_margin", "tokenizer_dir", *_FIRST,
}  # fmt: skip
_PATHS = ("dataset", "weights_dir")
_CHARACTERS = 90
_GENERATED = re.compile(r"[a-z]+(-[a-z]+)+")  # the names that Prefect gives, such as violet-cow


def name_run(
    current: str, parameters: Mapping[str, Any], kind: type[Job] = Job, today: datetime | None = None
) -> str:
    """The name of a run.

    ``run_name`` comes first, then a name that the user has given in Prefect, then one made from the parameters.

    Args:
        current: the name that the flow run has.
        parameters: of the flow, as far as they were given.
        today: for the name of a night; now by default.
    """
    if given := parameters.get("run_name"):
        return str(given)
    if current and not _GENERATED.fullmatch(current):
        return current
    return describe({**defaults(kind), **parameters}, usual_parameters(parameters, kind), kind, today)


def flow_run_name(kind: type[Job] = Job) -> Callable[[], str]:
    """For Prefect, which calls it when a flow run begins, and gives the flow run this name."""

    def name() -> str:
        from prefect.runtime import flow_run

        current = str(flow_run.name)
        try:
            return storable(name_run(current, flow_run.parameters, kind))
        except Exception:  # the flow refuses wrong parameters, by name
            return current

    return name


def usual_parameters(parameters: Mapping[str, Any], kind: type[Job] = Job) -> dict[str, Any]:
    """What a run of this kind and size has otherwise: the parameters of its deployment in prefect.yaml."""
    known = defaults(kind)
    size = parameters.get("model_size", known["model_size"])
    deployment = f"sweep-{size}" if "grid" in known else "nightly" if parameters.get("subset") else str(size)
    try:
        return known | read_parameters(deployment)
    except UsageError:  # no deployment has this size
        return known


def describe(
    values: Mapping[str, Any], usual: Mapping[str, Any], kind: type[Job] = Job, today: datetime | None = None
) -> str:
    """A name such as ``355m lr 1e-4 top 4, epochs 5``: what differs from the usual is behind the comma.

    Args:
        values: all parameters, by name.
        usual: what they are otherwise.
    """
    grid = values.get("grid") or {}
    head = [str(values["model_size"])]
    if "grid" in values:
        head += ["sweep", *(f"{_SHORT.get(name, name)} x{len(tried)}" for name, tried in grid.items())]
    if values.get("subset"):
        head.append(f"night {today or datetime.now(UTC):%Y-%m-%d}")
    if "learning_rate" not in grid:
        head.append(f"lr {_text(values['learning_rate'])}")
    if "num_unfrozen_layers" not in grid:
        head.append(f"top {values['num_unfrozen_layers']}" if values["freeze_layers"] else "all blocks")
    groups = [group for name, group in kind.groups().items() if name in _TELLING]
    names = dict.fromkeys(each.name for group in groups for each in group.declared())
    told = [
        f"{_SHORT.get(name, name)} {_text(Path(str(values[name])).name if name in _PATHS else values[name])}"
        for name in names
        if name not in _SILENT and name not in grid and values[name] != usual.get(name)
    ]
    return _joined(" ".join(head), told)


def _joined(name: str, told: list[str]) -> str:
    """The parts with commas, as many as fit."""
    for number, part in enumerate(told):
        longer = f"{name}, {part}"
        if len(longer) > _CHARACTERS:
            return f"{name[:_CHARACTERS]}, {len(told) - number} more"
        name = longer
    return name[: 2 * _CHARACTERS]


def _text(value: Any) -> str:
    """A value, as short as it can be said."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if not isinstance(value, float):
        return str(value)
    plain = f"{value:.6g}"
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    scientific = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return min(plain, scientific, key=len) if value else "0"

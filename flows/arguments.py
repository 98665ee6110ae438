"""What a command line asks for: a deployment's parameters, changed by a file, ``name=value`` and ``--name value``.

Nothing here imports torch, Prefect or MLflow, so that a mistake is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.commands import read_deployments, read_flow, read_parameters
from flows.job import Job, defaults, refused_values, taken_values, unknown_parameters
from flows.trials import SweepJob, job_kind, refused_grid
from model.files import read_bytes, shown
from model.net.config import normalize_size
from model.yaml_text import parse_yaml
from ops.mistakes import UsageError, exit_status, sentence
from ops.text import storable, suggestion, unprintable, unreadable_argument
from tasks.config import SourceConfig
from tasks.paths import check_paths

DEFAULT_DEPLOYMENTS = {"finetune": "tiny", "sweep": "sweep-tiny"}  # by flow, where none is named
_HELP = {"finetune": "finetune run --help", "sweep": "finetune sweep --help"}


@dataclass(frozen=True)
class Request:
    """A flow run that a command line asks for.

    Attributes:
        deployment: whose parameters are the basis.
        flow: its flow, finetune or sweep.
        parameters: those of the deployment, changed.
    """

    deployment: str
    flow: str
    parameters: dict[str, Any]


def parse(
    words: Sequence[str], options: Mapping[str, str] | None = None, config: Path | None = None, flow: str = "finetune"
) -> Request:
    """Read a command line; the values are not checked yet.

    Args:
        words: a deployment and ``name=value``, in any order.
        options: the values of ``--name value``, by name.
        config: a YAML file with parameters by name; the command line wins.
        flow: what runs if no deployment is named.

    Raises:
        UsageError: two deployments, an unknown one, a parameter given twice, or a value that is not text or not YAML.
    """
    for word in words:
        if reason := unreadable_argument(word):
            raise UsageError(f"{storable(word)} {reason}")
    deployment = _deployment([word for word in words if "=" not in word], flow)
    parameters = read_parameters(deployment)
    flow = read_flow(deployment)
    if config:
        parameters |= _read_config(config, flow)
    changes = _changes([word for word in words if "=" in word], options or {})
    parameters |= changes
    if isinstance(size := parameters.get("model_size"), str | int):
        try:
            parameters["model_size"] = normalize_size(size)
        except ValueError as error:
            raise UsageError(sentence(error)) from None
    return Request(deployment, flow, parameters)


def _deployment(named: Sequence[str], flow: str) -> str:
    """The deployment that a command line names."""
    if len(named) > 1:
        raise UsageError(f"one deployment at a time, not {brief(', '.join(named))}; parameters are name=value")
    if not named:
        return DEFAULT_DEPLOYMENTS[flow]
    known = read_deployments()
    if flow == "sweep" and f"sweep-{named[0]}" in known:
        return f"sweep-{named[0]}"
    if f"{named[0]}m" in known:  # 355, as model_size=355
        return f"{named[0]}m"
    if named[0] not in known:
        near = suggestion(named[0], known)
        raise UsageError(f"prefect.yaml has no deployment {shown(named[0])}{near or ', only ' + ', '.join(known)}")
    return named[0]


def _changes(words: Sequence[str], options: Mapping[str, str]) -> dict[str, Any]:
    """The values that the command line gives, by name."""
    changes: dict[str, Any] = {}
    for argument in [*words, *(f"{name}={value}" for name, value in options.items())]:
        name, _, value = argument.partition("=")
        if not name:
            raise UsageError(f"{brief(argument)} names no parameter: write name=value")
        if name in changes:
            raise UsageError(f"{brief(name)} is given twice")
        # YAML has white space of its own, and refuses the others in words of its own.
        if reason := unprintable(value.replace("\n", "").replace("\t", "")):
            raise UsageError(f"{brief(name)}: {reason}")
        try:
            changes[name] = parse_yaml(value)
        except ValueError:
            raise UsageError(f"{brief(argument)}: the value is not YAML; quote it") from None
        if isinstance(changes[name], str) and "\n" in value:  # YAML has made a space of it, or nothing
            raise UsageError(f"{brief(name)}: {unprintable(value)}")
    return changes


def _read_config(path: Path, flow: str) -> dict[str, Any]:
    """The parameters of a YAML file.

    Raises:
        UsageError: it cannot be read, or a parameter in it is wrong; the message has file and line.
    """
    try:
        text = read_bytes(path).decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read: {sentence(error)}") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        mark = getattr(error.__cause__, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error.__cause__, "problem", None) or sentence(error)
        raise UsageError(f"{path}{where} is not YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}, line 1: parameters are needed, one a line, such as 'epochs: 3'")
    node = yaml.compose(text, yaml.SafeLoader)
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value} if node else {}
    for name, value in values.items():
        if wrong := complaint({str(name): value}, flow, alone=True):
            raise UsageError(f"{path}, line {lines.get(str(name), 1)}: {wrong}")
    return values


def brief(typed: str) -> str:
    """What was typed, for a message: on one line, and cut where it is long."""
    line = " ".join(typed.split())
    return line if len(line) < 100 else f"{line[:100]}..."


def complaint(parameters: Mapping[str, Any], flow: str = "finetune", alone: bool = False) -> str | None:
    """What is wrong with a flow's parameters, by name; None if nothing is.

    Args:
        alone: they are some of the parameters only, so that they cannot contradict each other.
    """
    kind = job_kind(flow)
    if unknown := unknown_parameters(parameters, kind):
        near = suggestion(unknown[0], defaults(kind))
        return f"no parameter is called {brief(', '.join(unknown))}{near or f': `{_HELP[flow]}` lists them'}"
    for name, value in parameters.items():
        if isinstance(value, str) and storable(value) != value:
            return f"{name} has a character that is no text: {brief(storable(value))}"
    if refused := "; ".join(refused_values(parameters, kind)):
        return refused
    if alone:
        return None
    return (refused_grid(parameters) if kind is SweepJob else None) or _contradiction(parameters, kind)


def _contradiction(parameters: Mapping[str, Any], kind: type[Job]) -> str | None:
    """What the parameters refuse together, as far as that is known without torch."""
    try:
        kind.from_parameters(parameters, machine=False)
    except ValueError as error:
        return sentence(error)
    return None


def wrong_paths(parameters: Mapping[str, Any], flow: str = "finetune") -> str | None:
    """What is wrong with the local paths among parameters that are right otherwise; None if nothing is.

    Raises:
        Exception: no mistake, but a bug.
    """
    try:
        check_paths(SourceConfig.take(taken_values(parameters, job_kind(flow))))
    except Exception as error:
        if exit_status(error) is None:
            raise
        return sentence(error)
    return None

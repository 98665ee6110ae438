"""The deployments of prefect.yaml, and the command line that repeats a run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.files import read_bytes, shown
from model.records import check_record
from model.yaml_text import parse_yaml
from ops.mistakes import UsageError
from ops.text import one_line

DEPLOYMENTS = Path(__file__).with_name("prefect.yaml")  # a link to the checkout's, so that a wheel has it too


class _Deployment(BaseModel):
    """What is read of an entry of prefect.yaml."""

    name: str
    parameters: dict[str, Any]
    entrypoint: str = "flows.finetune.finetune"


class _Deployments(BaseModel):
    """What is read of prefect.yaml."""

    deployments: list[_Deployment]


def read_parameters(deployment: str) -> dict[str, Any]:
    """The parameters of a deployment in prefect.yaml.

    Raises:
        UsageError: as read_flow.
    """
    return dict(_read(deployment).parameters)


def read_flow(deployment: str) -> str:
    """The name of the flow that a deployment in prefect.yaml runs.

    Raises:
        UsageError: there is no deployment of that name, or the file is damaged.
    """
    return _read(deployment).entrypoint.rpartition(".")[2]


def read_deployments() -> list[str]:
    """The names of all deployments in prefect.yaml.

    Raises:
        UsageError: the file is damaged.
    """
    return list(_read_all())


def _read(deployment: str) -> _Deployment:
    by_name = _read_all()
    if deployment not in by_name:
        raise UsageError(f"prefect.yaml has no deployment {shown(deployment)}, only {', '.join(by_name)}")
    return by_name[deployment]


def _read_all() -> dict[str, _Deployment]:
    try:
        read = parse_yaml(read_bytes(DEPLOYMENTS).decode())
        found = check_record(read, _Deployments, "its content").deployments
        by_name = {each.name: each for each in found}
        if len(by_name) < len(found):
            raise ValueError("two deployments have the same name")
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UsageError(f"{os.path.realpath(DEPLOYMENTS)} is damaged, restore it: {reason}") from error
    return by_name


def repeat_command(
    deployment: str | None, values: Mapping[str, Any], defaults: Mapping[str, Any], flow: str = "finetune"
) -> str:
    """The command that starts a run with the same parameters again.

    Args:
        deployment: that the run is of; None for a run without servers.
        values: all parameters of the run.
        defaults: the flow's own.
        flow: its name.
    """
    unnamed = {"sweep": ["sweep-tiny"]}.get(flow, [])  # what stands for a run of this flow without servers
    try:
        known = {**defaults, **read_parameters(deployment or (unnamed or ["tiny"])[0])}
    except UsageError:  # a deployment that somebody made by hand
        known = dict(defaults)
    changes = [f"{name}={json.dumps(value)}" for name, value in values.items() if value != known[name]]
    if deployment:
        options = [word for change in changes for word in ("-p", change)]
        return shlex.join(["prefect", "deployment", "run", f"{flow}/{deployment}", *options])
    return shlex.join(["python", "-m", "flows", "run", *unnamed, *changes])

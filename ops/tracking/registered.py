"""Says what MLflow's registry has, where a version that was named is not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ops.redaction import without_credentials
from ops.tracking.runs import MODEL_PREFIX

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST = 8  # names or versions in a sentence


@dataclass(frozen=True)
class Registered:
    """What is registered.

    Attributes:
        names: of all models.
        versions: numbers of the versions of the model that was asked for; empty if it is none of ``names``.
        aliases: of that model, with their versions.
    """

    names: Sequence[str]
    versions: Sequence[int] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


def not_registered(wanted: str | None, tracking_uri: str, there: Registered) -> LookupError:
    """The error that a version is not there, with what is there instead.

    Args:
        wanted: what was named; None for any model of this project.
        there: the registry; its versions are those of the model that ``wanted`` names.
    """
    what = f"{wanted or repr(wanted)} is not" if wanted is not None else f"no tuned model ({MODEL_PREFIX}*) is"
    server = without_credentials(tracking_uri)
    if there.versions:
        aliases = ", ".join(f"{alias} (version {version})" for alias, version in sorted(there.aliases.items()))
        plural = "s" if len(there.versions) > 1 else ""
        numbers = f"version{plural} {_listed(sorted(there.versions))}"
        found = f"{numbers} of it and {f'alias {aliases}' if aliases else 'no alias'}"
    elif there.names:
        found = f"the models {_listed(sorted(there.names))}"
    else:
        found = "no model"
    remedy = "name one of them" if there.names else "run `make run`"
    here = f"{what} registered at {server}, which has {found}"
    return LookupError(f"{here}: {remedy}, or set MLFLOW_TRACKING_URI to the server of your runs")


def _listed(each: Sequence[object]) -> str:
    """The last ones of a list, and how many there are besides."""
    rest = len(each) - _MOST
    return ", ".join(map(str, each[-_MOST:])) + (f" and {rest} more" if rest > 0 else "")


def ask_registered(mlflow: MlflowClient, name: str | None) -> Registered:
    """What is registered, by MLflow's client, with the versions of one model."""
    names: list[str] = []
    page = None
    while page != "":  # MLflow gives a hundred models at a time
        models = mlflow.search_registered_models(page_token=page)
        for model in models:
            if model.name == name:
                versions = mlflow.search_model_versions(f"name = {quoted(model.name)}")
                return Registered([model.name], [int(each.version) for each in versions], model.aliases)
            names.append(model.name)
        page = models.token or ""
    return Registered(names)


def quoted(name: str) -> str:
    """A name in a filter of MLflow, which has two kinds of quotes and no escapes.

    Raises:
        LookupError: the name has both kinds.
    """
    if "'" in name and '"' in name:
        raise LookupError(f"{name} is no name of a registered model: it has both kinds of quotes")
    quote = '"' if "'" in name else "'"
    return f"{quote}{name}{quote}"

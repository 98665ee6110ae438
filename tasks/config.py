"""Where rows and weights come from, and what a trial of a sweep is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from model.engine.config import TrainConfig
from model.net.config import PRESETS, FreezeConfig, normalize_size
from model.parameters import Parameters
from ops.hub import DEFAULT_DATASET

DEMO = "demo"


def _as_text(size: Any) -> Any:
    """A size without its letter as a text: YAML and JSON have it as a number."""
    return str(size) if type(size) is int else size


# The pattern lets Prefect's server refuse a wrong size when a run is submitted.
Size = Annotated[
    str,
    BeforeValidator(_as_text),
    AfterValidator(normalize_size),
    Field(json_schema_extra={"pattern": f"^({'|'.join([*PRESETS, *(name.upper() for name in PRESETS)])})$"}),
]


@dataclass(frozen=True)
class TrialConfig:
    """A trial of a sweep as its parameters say.

    Attributes:
        name: what differs from the other trials, such as "lr 0.0003".
        changes: the values that the grid gives it, by parameter.
        params: all parameters of a run of this training alone.
        freeze, train: what trains, and how.
    """

    name: str
    changes: dict[str, Any]
    params: dict[str, Any]
    freeze: FreezeConfig
    train: TrainConfig


_Given = Annotated[str, Field(min_length=1)]  # an empty text is a mistake, not "none"


@dataclass(frozen=True)
class SourceConfig(Parameters):
    """Where rows and weights come from."""

    model_size: Size = "124m"
    """tiny, 124m, 355m, 774m or 1558m."""
    dataset: _Given = DEFAULT_DATASET
    """A hub id, a local file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, or these with .gz), a folder of such
    files, or "demo"."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit that it resolves to is recorded."""
    weights_dir: _Given | None = None
    """A local directory in Hugging Face's GPT-2 layout; null takes the hub's weights at a pinned commit."""
    tokenizer_dir: _Given | None = None
    """A local directory with the tokenizer, if it is not beside the weights."""
    dataset_config: str | None = None
    """Configuration to use of a data set whose card (README.md) names several."""
    start_from: Annotated[str, Field(pattern=r"^(base|champion|models:/.+)$")] = "base"
    """base; champion (the base if there is none yet); or a registered version, models:/NAME/VERSION or
    models:/NAME@ALIAS, which brings its own weights and tokenizer."""

"""Where rows and weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from model.net.config import PRESETS, normalize_size
from model.parameters import Parameters
from ops.hub import DEFAULT_DATASET

DEMO = "demo"


# The pattern lets Prefect's server refuse a wrong size when a run is submitted.
Size = Annotated[
    str,
    AfterValidator(normalize_size),
    Field(json_schema_extra={"pattern": f"^({'|'.join([*PRESETS, *(name.upper() for name in PRESETS)])})$"}),
]


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

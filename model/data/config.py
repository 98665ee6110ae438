"""How rows become tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from model.parameters import Count, Parameters, Seed, Share, WholeNumber, WholeShare, internal


@dataclass(frozen=True)
class PrepareConfig(Parameters):
    """How rows become tokens."""

    max_length: Annotated[Count, Field(ge=8)] = 512
    """Tokens a row is cut at, prompt included."""
    subset_start: WholeNumber = 0
    """First row of train to use, counted from 0."""
    subset_count: Count | None = None
    """Rows of train to use from there; null uses all. With subset=next: fresh rows to use at most."""
    subset_keys: str | None = internal(None)
    """A .npy file with the content keys (uint64) of the rows of train to use instead."""
    test_share: Share = 0.1
    """Share of train that becomes test where the data set has no test split."""
    validation_share: Share = 0.02
    """Share of train that becomes validation where the data set has no validation split."""
    max_dropped_share: WholeShare = 0.05
    """A larger share of unusable rows is an error."""
    split_seed: Seed = 42
    """Decides which rows become test and validation, and which rows of earlier nights a night repeats."""

    def determinants(self) -> dict[str, Any]:
        """All that determines token files, by name.

        The seed of the splits is called ``seed``, as in earlier versions: their token files are found.
        """
        found = asdict(self)
        found["seed"] = found.pop("split_seed")
        return found

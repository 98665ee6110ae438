"""How rows become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from model.parameters import Count, Seeded, Share, WholeNumber, WholeShare, internal


@dataclass(frozen=True)
class PrepareConfig(Seeded):
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

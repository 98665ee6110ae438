"""Packing: documents concatenated into one sequence without padding, with loss on response tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.data.tokens import CodeAlpacaDataset
from model.net.attention import Documents
from model.net.device import pin, send
from model.net.noise import ROW_BITS


@dataclass(frozen=True)
class Pack:
    """Rows of a data set as one sequence of N tokens, M of which predict a token that bears loss.

    A row's last token is not an input: it predicts nothing, and no other token attends to it.

    Attributes:
        rows: numbers of the rows that bear loss.
        documents: position of each row in the sequence.
        ids: (N,), token ids, on the device.
        positions: (N,), position of each token in its document, from 0.
        slots: (N,), index of each token among the inputs of the whole data set; on the host, pinned for a GPU.
        predictors: (M,), index in the sequence of each predicting token.
        targets: (M,), the ids that they predict.
        weights: (M,), weights of their losses, or None where all are 1.
        owner: (M,), index into ``rows`` of each prediction's row, on the host.
    """

    rows: np.ndarray[Any, Any]
    documents: Documents
    ids: Tensor
    positions: Tensor
    slots: Tensor
    predictors: Tensor
    targets: Tensor
    weights: Tensor | None
    owner: np.ndarray[Any, Any]

    def token_names(self) -> Tensor:
        """Row and position of each token, (N,), as ``model.net.noise.Noise`` takes them."""
        rows = np.repeat(self.rows.astype(np.int64) << ROW_BITS, self.documents.lengths)
        return send(rows, self.positions.device) + self.positions


def pack(dataset: CodeAlpacaDataset, rows: np.ndarray[Any, Any], device: torch.device) -> Pack:
    """Pack rows in their order; those without a target are left out."""
    everywhere = dataset.prompt_loss_weight != 0
    rows = dataset.with_targets(rows)
    lengths = dataset.lengths[rows, 0].astype(np.int64) - 1
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(rows)), lengths)  # (N,)
    positions = np.arange(len(owner)) - (ends - lengths)[owner]
    index = dataset.offsets[rows][owner] + positions  # (N,) among all tokens
    prompts = dataset.lengths[rows, 1][owner]
    in_response = positions + 1 >= prompts
    predictors = np.arange(len(owner)) if everywhere else np.flatnonzero(in_response)
    weights = np.where(in_response, 1.0, dataset.prompt_loss_weight) if everywhere else None

    return Pack(
        rows=rows,
        documents=Documents(
            lengths.tolist(),
            send((ends - lengths)[owner].astype(np.int32), device),
            send(ends[owner].astype(np.int32), device),
        ),
        ids=send(dataset.ids[index].astype(np.int64), device),
        positions=send(positions, device),
        slots=pin(index - rows[owner], device),
        predictors=send(predictors, device),
        targets=send(dataset.ids[index[predictors] + 1].astype(np.int64), device),
        weights=None if weights is None else send(weights[predictors], device),
        owner=owner[predictors],
    )


def _write_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    target[index] = rows


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, index: Tensor, write_rows: Callable[[Tensor, Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.write_rows = x.shape, write_rows
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        ctx.write_rows(whole, index, gradient)
        return whole, None, None


def choose(x: Tensor, index: Tensor, write_rows: Callable[[Tensor, Tensor, Tensor], None] = _write_rows) -> Tensor:
    """Rows ``index`` (M,) of x (N, D), each at most once: the backward pass writes rows where torch's would add them.

    Args:
        write_rows: write_rows(target, index, rows) does target[index] = rows.
    """
    return _Choose.apply(x, index, write_rows)


def split_evenly(
    rows: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], max_tokens: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Cut rows, in their order, into groups of about equal size: the fewest that average at most ``max_tokens``.

    Args:
        lengths: tokens of each row.
        max_tokens: limit of a group's size on average; a single longer row forms its own group.
    """
    ends = np.cumsum(lengths)
    if not len(rows):
        return
    groups = -(-int(ends[-1]) // max_tokens)
    cuts = np.searchsorted(ends - lengths / 2, ends[-1] * np.arange(1, groups) / groups)
    yield from (part for part in np.split(rows, cuts) if len(part))


def deal(costs: np.ndarray[Any, Any], parts: int) -> list[np.ndarray[Any, Any]]:
    """Divide items into parts of about equal cost: the costliest first, each to the part that costs least so far.

    This is the greedy rule of Graham 1969 ("Bounds on multiprocessing timing anomalies"). Ties go to the first item
    and the first part: the division is a function of the arguments alone.

    Args:
        costs: of each item, integers.

    Returns:
        Numbers of the items of each part, ascending; a part may be empty.
    """
    loads = [(0, part) for part in range(parts)]
    owner = np.empty(len(costs), dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    for item, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        load, part = loads[0]
        owner[item] = part
        heapq.heapreplace(loads, (load + cost, part))
    return [np.flatnonzero(owner == part) for part in range(parts)]

"""The choice of the next token of each row: filters over as few tokens as they keep, and one uniform number a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.net.sampling import build_filters, check_sampling

_CHUNK = 64  # logits of which the largest decides whether one of them can be among the top k
_NUCLEUS = 1024  # tokens that are sorted at first where only top_p is set


class Sampler:
    """Draws tokens: logits (B, W), W >= V, and a uniform number of each row -> ids (B,).

    The distribution is that of ``filter_logits``. A token is drawn by inversion: the first one at which the cumulated
    probability of the kept tokens exceeds the uniform number. Nothing waits for the device, so a CUDA graph can hold
    the draw.

    Args:
        temperature, top_k, top_p, repetition_penalty: as ``generate``.
        vocab_size: V; columns from there on are no tokens.
        never: ids that are not drawn.

    Raises:
        ValueError: a setting is out of range, or all ids are in ``never``.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float,
        vocab_size: int,
        never: Sequence[int],
        device: torch.device,
    ):
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        excluded = set(never)
        end = vocab_size
        while end > 0 and end - 1 in excluded:
            end -= 1
        if end == 0:
            raise ValueError(f"never holds all {vocab_size} ids: no token is left to draw")
        self.end = end  # the ids before it may be drawn, except those in ``excluded``
        rest = sorted(id for id in excluded if 0 <= id < end)
        self.excluded = torch.tensor(rest, device=device) if rest else None
        self.greedy = temperature == 0
        self.top_k = None if top_k is None or top_k >= end else top_k
        self.top_p = None if top_p == 1 else top_p
        self.scale = build_filters(temperature, None, None)
        self.filters = build_filters(temperature, None, top_p)
        self.penalty = repetition_penalty

    def __call__(self, logits: Tensor, uniforms: Tensor, seen: Tensor | None) -> Tensor:
        """Draw.

        Args:
            logits: (B, W), any floating dtype; overwritten.
            uniforms: (B,), in [0, 1).
            seen: which tokens each row's text has, (B, V); None where there is no repetition penalty.
        """
        if seen is not None:
            logits = self._penalise(logits[:, : seen.size(1)], seen)
        if self.end < logits.size(1):
            logits[:, self.end :] = float("-inf")
        if self.excluded is not None:
            logits.index_fill_(1, self.excluded, float("-inf"))
        if self.greedy:
            return logits.argmax(-1)
        if self.top_k is not None:
            values, ids = top(logits, self.top_k)
            values = values.float()
            for each in self.filters:
                values = each(values)
        elif self.top_p is not None:
            values, ids = self._nucleus(logits.float())
        else:
            values = logits.float()
            for each in self.filters:
                values = each(values)
            return invert(values, uniforms)
        return ids.gather(1, invert(values, uniforms)[:, None])[:, 0]

    def _penalise(self, logits: Tensor, seen: Tensor) -> Tensor:
        """CTRL's penalty (Keskar et al. 2019, section 4.1), with transformers' rule for negative logits."""
        logits = logits.float()
        lower = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(seen, lower, logits)

    def _nucleus(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The nucleus of logits (B, W): values (B, n) with removed tokens at -inf, and their ids.

        On a CPU, the top 1,024 tokens are enough where their mass reaches p in every row. Else all are sorted. On a
        GPU all are sorted: to ask whether they are enough would wait for it.
        """
        assert self.top_p is not None
        for each in self.scale:
            logits = each(logits)
        total = logits.logsumexp(-1, keepdim=True)
        few = logits.size(1) if logits.is_cuda else min(_NUCLEUS, logits.size(1))
        values, ids = torch.topk(logits, few, -1) if few < logits.size(1) else logits.sort(-1, descending=True)
        if few < logits.size(1) and bool(((values - total).exp().sum(-1) < self.top_p).any()):
            values, ids = logits.sort(-1, descending=True)
        probabilities = (values - total).exp()
        removed = probabilities.cumsum(-1) - probabilities >= self.top_p
        removed[:, 0] = False
        return values.masked_fill(removed, float("-inf")), ids


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of (B, W), descending, and their ids; k < W.

    On a GPU, ``torch.topk`` reads a row many times. The k largest are in the k chunks with the largest maxima; so one
    pass over the row for the maxima and a search in these chunks is enough.
    """
    rows, width = logits.shape
    if not logits.is_cuda or width % _CHUNK or k * _CHUNK >= width:
        return torch.topk(logits, k, -1)
    chunks = logits.view(rows, -1, _CHUNK)
    chosen = torch.topk(chunks.amax(-1), k, -1, sorted=False).indices  # (B, k)
    found = chunks.gather(1, chosen[:, :, None].expand(-1, -1, _CHUNK)).view(rows, -1)
    values, places = torch.topk(found, k, -1)
    return values, chosen.gather(1, places // _CHUNK) * _CHUNK + places % _CHUNK


def invert(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The index (B,) at which the cumulated softmax of logits (B, n) first exceeds each row's uniform number (B,)."""
    probabilities = F.softmax(logits, -1)
    cumulated = probabilities.cumsum(-1)
    index = (cumulated <= uniforms[:, None] * cumulated[:, -1:]).sum(-1, keepdim=True).clamp(max=logits.size(1) - 1)
    # A sum may be rounded up at a token of probability 0, which must not be drawn.
    possible = probabilities.gather(1, index) > 0
    return torch.where(possible, index, probabilities.argmax(-1, keepdim=True))[:, 0]

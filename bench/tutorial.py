"""The plain training loop of teaching code: fp32, separate matrices for query, key and value, two rows per step.

The architecture is that of Raschka's "Build a Large Language Model (From Scratch)", on which many such scripts are
based: attention weights are materialised and masked, layer norm and GELU are written out, and every row is padded to
the same length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Job, Measurement, Meter
from model.data.tokens import IGNORE, CodeAlpacaDataset, epoch_order
from model.net.config import GPTConfig
from model.net.device import resolve_device

BATCH_SIZE = 2
LENGTH = 128  # tokens to which every row is padded or cut
_DROPOUT = 0.1
_MORE_STEPS = 4  # factor: steps are so small that a window needs more of them


class NaiveAttention(nn.Module):
    """Causal attention with its weights materialised, (B, H, T, T)."""

    mask: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_embd
        self.heads = config.n_head
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(_DROPOUT)
        mask = torch.triu(torch.ones(config.n_positions, config.n_positions), diagonal=1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            layer(x).view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:T, :T], -torch.inf)
        weights = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out((weights @ v).transpose(1, 2).contiguous().view(B, T, D))


class NaiveNorm(nn.Module):
    """Layer norm in elementary operations."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class NaiveGELU(nn.Module):
    """The tanh approximation of GELU in elementary operations."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class NaiveBlock(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_embd
        self.norm_1, self.norm_2 = NaiveNorm(width), NaiveNorm(width)
        self.attention = NaiveAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), NaiveGELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x)))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class NaiveGPT(nn.Module):
    """GPT-2 as in teaching scripts; ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(_DROPOUT)
        self.blocks: Sequence[NaiveBlock] = nn.ModuleList(NaiveBlock(config) for _ in range(config.n_layer))  # type: ignore[assignment]
        self.norm = NaiveNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def freeze(self, num_unfrozen_layers: int) -> None:
        """Leave the top blocks and the final norm trainable."""
        self.requires_grad_(False)
        self.norm.requires_grad_(True)
        for block in self.blocks[len(self.blocks) - num_unfrozen_layers :]:
            block.requires_grad_(True)


def pad(rows: CodeAlpacaDataset, indices: list[int]) -> tuple[Tensor, Tensor, int, int]:
    """Ids and labels (B, LENGTH), and the numbers of real tokens and of targets among them."""
    ids = torch.zeros(len(indices), LENGTH, dtype=torch.long)
    labels = torch.full((len(indices), LENGTH), IGNORE)
    tokens = 0
    for place, index in enumerate(indices):
        row = rows[index]
        length = min(LENGTH, len(row["input_ids"]))
        ids[place, :length] = row["input_ids"][:length]
        labels[place, :length] = row["labels"][:length]
        tokens += length
    return ids, labels, tokens, int((labels[:, 1:] != IGNORE).sum())


def run_tutorial(job: Job) -> list[Measurement]:
    """Train two rows per step in fp32 and with dropout, regardless of the job's batch size, precision and dropout."""
    device = resolve_device(job.device)
    torch.manual_seed(0)
    with torch.device(device):
        model = NaiveGPT(job.config)
    model.freeze(job.num_unfrozen_layers)
    meter = Meter(device, _MORE_STEPS * job.warm_up, _MORE_STEPS * job.steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = CodeAlpacaDataset(job.tokens, "train")
    order = epoch_order(len(rows), 0, 0)
    for step in range(meter.last):
        indices = [int(order[(BATCH_SIZE * step + i) % len(rows)]) for i in range(BATCH_SIZE)]
        ids, labels, tokens, targets = pad(rows, indices)
        logits = model(ids.to(device))
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(device), ignore_index=IGNORE, reduction="sum"
        )
        optimizer.zero_grad()
        (loss / max(1, targets)).backward()
        optimizer.step()
        meter.count(tokens, targets)
        meter.step_done()
    return [meter.measurement("fp32", f"{_DROPOUT:g} in all blocks and embeddings")]

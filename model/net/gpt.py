"""GPT-2's architecture.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; OpenAI's
github.com/openai/gpt-2 (src/model.py); checked against transformers' GPT2LMHeadModel. Modules carry
Hugging Face's names, so a checkpoint's keys are the model's own (weights of the four projections are
transposed: Hugging Face keeps them as Conv1D, input dimension first).

Shapes: B rows, T tokens, C context, D width, H heads, K = D / H, V vocabulary. Blocks take tokens in any
layout, (..., D): only the layout's attention knows which of them belong together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.net.attention import Layer, Layout, Rows
from model.net.config import GPTConfig
from model.net.noise import ATTENTION_BRANCH, MLP_BRANCH


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layer: Layer, dropout: float = 0.0) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).unbind(-3)  # (..., H, K)
        return self.c_proj(layer.attend(q, k, v, dropout).flatten(-2))  # (..., D)


class MLP(nn.Module):
    """Position-wise feed-forward network with the tanh approximation of GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (..., D)


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x = x + layer.drop(self.attn(self.ln_1(x), layer, dropout), ATTENTION_BRANCH, dropout)
        return x + layer.drop(self.mlp(self.ln_2(x)), MLP_BRANCH, dropout)  # (..., D)


class GPTModel(nn.Module):
    """GPT-2 with a language-modelling head; the head is the token embedding unless the config unties it.

    ``num_frozen`` blocks at the bottom, with the embeddings, form the *trunk*: set by
    ``freeze_bottom_layers``, kept in eval mode and run without autograd, so that none of their activations
    is stored.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.num_frozen = 0
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # type: ignore[assignment]
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by 1 / sqrt(2 n_layer), zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def set_dropout(self, dropout: float) -> None:
        """Set the dropout rate of every block; only blocks above the trunk, in training mode, use it."""
        self.config = replace(self.config, dropout=dropout)
        for block in self.h:
            block.dropout = dropout

    def train(self, mode: bool = True) -> GPTModel:
        """Training mode for the blocks above the trunk only: no dropout in frozen blocks."""
        super().train(mode)
        for block in self.h[: self.num_frozen]:
            block.train(False)
        return self

    def trunk(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Embeddings and frozen blocks: ids and their positions (...) -> residual stream (..., D)."""
        # The trunk trains if and only if its embeddings do; then nothing is frozen.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.wte.weight.requires_grad):
            # Positions of padding behind a nearly full row may exceed the context; these outputs are never read.
            x = self.wte(ids) + self.wpe(positions.clamp(max=self.config.n_positions - 1))
            for index, block in enumerate(self.h[: self.num_frozen]):
                x = block(x, layout.layer(index))
        return x

    def top(self, x: Tensor, layout: Layout) -> Tensor:
        """Trainable blocks and final norm: residual stream (..., D) -> hidden states (..., D)."""
        for index, block in enumerate(self.h[self.num_frozen :], self.num_frozen):
            x = block(x, layout.layer(index))
        return self.ln_f(x)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T), right-padded -> final hidden states (B, T, D).

        Raises:
            ValueError: T is more than the context.
        """
        if ids.size(1) > self.config.n_positions:
            raise ValueError(f"{ids.size(1)} tokens do not fit the context of {self.config.n_positions}")
        layout = Rows()
        return self.top(self.trunk(ids, torch.arange(ids.size(1), device=ids.device), layout), layout)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T), right-padded -> logits (B, T, V); logits[:, t] predict ids[:, t + 1]."""
        return self.lm_head(self.hidden(ids))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> GPTModel:
        """Load a directory in Hugging Face's GPT-2 layout; see ``model.net.loading.read_pretrained``."""
        from model.net.loading import read_pretrained

        return read_pretrained(Path(directory), torch.device(device), dtype)

    def save_pretrained(self, directory: str | Path, eos_token_id: int | None = None) -> None:
        """Write config.json and model.safetensors; see ``model.net.loading.write_pretrained``."""
        from model.net.loading import write_pretrained

        write_pretrained(self, Path(directory), eos_token_id)

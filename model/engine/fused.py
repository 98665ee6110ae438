"""GPT-2's blocks over packed documents on a GPU: ``Block.forward`` with fused kernels between its matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.net.attention import Documents
from model.net.config import GPTConfig
from model.net.device import runs_triton
from model.net.gpt import MLP, Attention, Block, GPTModel


def can_fuse(
    model: GPTModel, blocks: Iterable[Block], norm: nn.LayerNorm | None, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether ``run_blocks`` can replace the forward pass of some of the model's blocks.

    Args:
        norm: as for ``run_blocks``.
    """
    return has_kernels(model.config, device, dtype) and has_plain_layers(blocks, norm)


def has_kernels(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels work on this device, in this dtype and for heads of this width."""
    width = config.n_embd // config.n_head
    return device.type == "cuda" and dtype != torch.float64 and width in (16, 32, 64, 128) and runs_triton(device)


def has_plain_layers(blocks: Iterable[Block], norm: nn.LayerNorm | None) -> bool:
    """Whether every layer is exactly of the type that GPT-2 has.

    ``run_blocks`` reads weights and biases and never calls the layers, so it would skip whatever a subclass adds in
    its own forward pass, for example a low-rank adapter (LoRA).
    """
    return (norm is None or type(norm) is nn.LayerNorm) and all(map(_is_plain, blocks))


def _is_plain(block: Block) -> bool:
    attn, mlp = block.attn, block.mlp
    return (
        (type(block), type(attn), type(mlp)) == (Block, Attention, MLP)
        and type(block.ln_1) is type(block.ln_2) is nn.LayerNorm
        and type(attn.c_attn) is type(attn.c_proj) is type(mlp.c_fc) is type(mlp.c_proj) is nn.Linear
    )


def run_blocks(
    blocks: Sequence[Block],
    norm: nn.LayerNorm | None,
    x: Tensor,
    documents: Documents,
    chosen: Tensor | None = None,
    first_layer: int = 0,
) -> Tensor:
    """Residual stream (N, D) below the blocks -> above them (N, D).

    A block's last residual sum is computed together with the norm that follows it: the next block's, or ``norm``.

    Args:
        norm: the model's final norm, if final hidden states are wanted; None for the residual stream.
        chosen: indices (M,), int64, of the tokens whose output is wanted; None for all. The others are dropped in the
            last block after its attention, and the result is (M, D). An index may stand there more than once only if
            the gradients of all its copies are zero.
        first_layer: number of the first of the blocks in the model. Dropout acts if ``documents`` have noise.
    """
    from model.engine.attention_kernels import attention
    from model.engine.noise_kernels import masks
    from model.engine.pointwise_kernels import add_norm, bias_gelu, choose

    y: Tensor | None = None
    bias = x.new_empty(0)
    of_weights = of_attention = of_mlp = None  # masks of dropout
    for layer, block in enumerate(blocks, first_layer):
        attn, mlp = block.attn, block.mlp
        if y is None:
            qkv = _norm_linear(x, block.ln_1, attn.c_attn)
        else:
            x, n = add_norm(x, y, bias, block.ln_1, of_mlp)
            qkv = F.linear(n, attn.c_attn.weight, attn.c_attn.bias)
        kept = chosen if block is blocks[-1] else None
        if documents.noise is not None:
            of_weights, of_attention, of_mlp = masks(documents.noise, layer, attn.n_head, kept)
        y = attention(qkv, documents.begins, documents.ends, attn.n_head, of_weights)
        if kept is not None:
            x, y = choose(x, kept), choose(y, kept)
        x, n = add_norm(x, F.linear(y, attn.c_proj.weight), attn.c_proj.bias, block.ln_2, of_attention)
        if torch.is_grad_enabled():
            h = bias_gelu(F.linear(n, mlp.c_fc.weight), mlp.c_fc.bias)
        else:  # GELU inside the matrix product's kernel, which keeps nothing for a backward pass
            h = torch._addmm_activation(mlp.c_fc.bias, n, mlp.c_fc.weight.t(), use_gelu=True)
        y, bias = F.linear(h, mlp.c_proj.weight), mlp.c_proj.bias
    if y is None:
        x = x if chosen is None else choose(x, chosen)
        return x if norm is None else norm(x)
    if norm is None:
        assert of_mlp is None  # the residual stream is wanted of the trunk only, which has no dropout
        return x + (y + bias)
    return add_norm(x, y, bias, norm, of_mlp)[1]


def _norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)), with the norm's gain and shift folded into the linear layer's weight and bias.

    Where nothing below the block trains, this spares the backward pass a matrix product: the gradient of the norm's
    output would serve only the gain and the shift.
    """
    if not torch.is_grad_enabled():
        return F.linear(norm(x), linear.weight, linear.bias)
    bias = linear.bias + linear.weight @ norm.bias
    return F.linear(F.layer_norm(x, (x.size(-1),), eps=norm.eps), linear.weight * norm.weight, bias)

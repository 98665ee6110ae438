"""GPT-2's blocks over packed documents on a GPU: ``Block.forward``, what lies between its products fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.net.attention import Documents
from model.net.gpt import Block, GPTModel


def can_fuse(model: GPTModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``run_blocks`` can stand for the model's own blocks where they drop nothing out."""
    width = model.config.n_embd // model.config.n_head
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and width in (16, 32, 64, 128)


def run_blocks(
    blocks: Sequence[Block],
    norm: nn.LayerNorm | None,
    x: Tensor,
    documents: Documents,
    chosen: Tensor | None = None,
) -> Tensor:
    """Residual stream (N, D) below the blocks -> above them (N, D).

    A block's last sum is left to the norm behind it, whichever that is.

    Args:
        norm: of the final hidden states, where they are wanted.
        chosen: the tokens they are wanted of, (M,), int64, none twice unless its gradient is zero; the others leave
            the last block after its attention. The result is (M, D) then.
    """
    from model.engine import kernels

    y: Tensor | None = None
    bias = x.new_empty(0)
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        if y is None:
            qkv = _norm_linear(x, block.ln_1, attention.c_attn)
        else:
            x, n = kernels.add_norm(x, y, bias, block.ln_1)
            qkv = F.linear(n, attention.c_attn.weight, attention.c_attn.bias)
        y = kernels.attention(qkv, documents.begins, documents.ends, attention.n_head)
        if chosen is not None and block is blocks[-1]:
            x, y = kernels.choose(x, chosen), kernels.choose(y, chosen)
        x, n = kernels.add_norm(x, F.linear(y, attention.c_proj.weight), attention.c_proj.bias, block.ln_2)
        if torch.is_grad_enabled():
            h = kernels.bias_gelu(F.linear(n, mlp.c_fc.weight), mlp.c_fc.bias)
        else:  # in the product's own kernel, which does not keep what a backward pass would need
            h = torch._addmm_activation(mlp.c_fc.bias, n, mlp.c_fc.weight.t(), use_gelu=True)
        y, bias = F.linear(h, mlp.c_proj.weight), mlp.c_proj.bias
    if y is None:
        x = x if chosen is None else kernels.choose(x, chosen)
        return x if norm is None else norm(x)
    return x + (y + bias) if norm is None else kernels.add_norm(x, y, bias, norm)[1]


def _norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)), the norm's gain and shift moved into the weight and bias.

    Nothing below is trained, so this spares the backward pass the product that would only lead to the two.
    """
    if not torch.is_grad_enabled():
        return F.linear(norm(x), linear.weight, linear.bias)
    bias = linear.bias + linear.weight @ norm.bias
    return F.linear(F.layer_norm(x, (x.size(-1),), eps=norm.eps), linear.weight * norm.weight, bias)

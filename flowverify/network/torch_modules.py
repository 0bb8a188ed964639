"""Modules of torch whose own code mixes the batch with other dimensions, in code that leaves it first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class BatchFirstAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention``, which joins the batch with the heads, with the heads as a dimension of their own.

    What it does not cover (masks of padding, a batch that comes second, added biases) is left to torch.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        plain = self.batch_first and query.dim() == 3 and self._qkv_same_embed_dim and self.bias_k is None
        masked = attn_mask is not None and attn_mask.dim() != 2
        if not plain or masked or self.add_zero_attn or key_padding_mask is not None:
            given: dict[str, Any] = {
                "key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask,
                "average_attn_weights": average_attn_weights, "is_causal": is_causal,
            }  # fmt: skip
            return super().forward(query, key, value, **given)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True masks out here, and lets through below
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        shape = (self.num_heads, self.head_dim)
        heads = [
            functional.linear(one, weight, bias).reshape(*one.shape[:2], *shape).permute(0, 2, 1, 3)
            for one, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=attn_mask)
        result = self.out_proj(mixed.permute(0, 2, 1, 3).flatten(2))
        if not need_weights:
            return result, None
        scores = heads[0] @ heads[1].transpose(2, 3) * self.head_dim**-0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
        if attn_mask is not None:
            scores = scores + attn_mask
        shares = scores.softmax(3)
        return result, shares.mean(1) if average_attn_weights else shares


def leave_batch_first(module: nn.Module) -> None:
    """Gives modules of a tree such code, in place; their weights and their options stay as they are."""
    for part in module.modules():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = BatchFirstAttention

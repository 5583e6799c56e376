"""Causal core attention by torch's scaled_dot_product_attention: FlashAttention on GPUs, a blocked kernel on CPUs, no mask tensor."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class SdpaAttention(nn.Module):
    """Drop-in for megatron-core's DotProductAttention: causal, no dropout, no bias, grouped queries."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or (attention_dropout or config.attention_dropout):
            raise ValueError(f"SdpaAttention is causal and without dropout; got mask {attn_mask_type}, dropout {config.attention_dropout}")
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv heads, d] -> [s, b, heads * d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = k.shape[1] != q.shape[1]
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
        return output.permute(2, 0, 1, 3).flatten(2)

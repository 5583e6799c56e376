"""GPTModel whose loss and logits leave out the rows that pad the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class LlamaModel(GPTModel):
    """megatron-core's GPTModel; padding tokens get no probability, so the loss is that of the exported model, which has no such tokens."""

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        """GPTModel's arguments (vocab_size padded), and the tokenizer's vocabulary size."""
        super().__init__(*args, **kwargs)
        if self.post_process:
            rows = self.output_layer.output_size_per_partition
            first = self.output_layer.tp_group.rank() * rows
            self._real_rows = min(max(real_vocab_size - first, 0), rows)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of labels [b, s] under logits [s, b, padded vocabulary / tp], per token [b, s]."""
        if self._real_rows < logits.shape[-1]:
            logits[..., self._real_rows :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)

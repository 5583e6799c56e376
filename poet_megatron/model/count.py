"""Parameters of a model that is spread over tensor- and pipeline-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import nn
from torch.distributed import ProcessGroup


def count_parameters(chunks: Sequence[nn.Module], group: ProcessGroup) -> tuple[int, int]:
    """(elements of the model without skews, trainable elements) over the model-parallel ranks of `group`, replicas once. Collective."""
    total = trainable = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if param_is_not_tensor_parallel_duplicate(parameter):
                total += 0 if name.endswith(".skew") else parameter.numel()
                trainable += parameter.numel() if parameter.requires_grad else 0
    device = next(chunks[0].parameters()).device
    counts = torch.tensor([total, trainable], dtype=torch.int64, device=device)
    dist.all_reduce(counts, group=group)
    return int(counts[0]), int(counts[1])

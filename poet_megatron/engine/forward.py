"""One micro-batch through a model chunk, in the form that Megatron's pipeline schedules call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from poet_megatron.engine.base import Batch


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """Run a chunk on the next micro-batch.

    Args:
        batches: yields tokens, labels, position_ids and loss_mask, [micro, s] each.
        model: a chunk, wrapped or not; the pipeline schedule has set its input.

    Returns:
        Token losses [micro, s] on the last pipeline stage (hidden states elsewhere), and the function that turns them into a loss.
    """
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda losses: _loss(losses, batch["loss_mask"])


def one_or_all(items: list[Any]) -> Any:
    """What Megatron's schedules take for the chunks of a pipeline stage: the only item, or the list of several."""
    return items[0] if len(items) == 1 else items


def _loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses [micro, s], number of tokens, and both for reporting (Megatron divides by the global number)."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"loss": torch.stack([total.detach(), tokens.to(total.dtype)])}

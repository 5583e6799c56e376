"""Perplexity: token-weighted, and by the protocol of the paper's code base for comparison with published tables only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from poet_megatron.engine.build import Engine
from poet_megatron.layers.factor_cache import cached_factors

MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class EvalResult:
    """Loss over a data set.

    Attributes:
        loss: mean over all tokens that count.
        tokens: how many they are.
        batch_mean_loss: mean over batches of each batch's mean loss.
        batches: batches over all ranks that had a token.
    """

    loss: float
    tokens: int
    batch_mean_loss: float
    batches: int

    @property
    def ppl(self) -> float:
        """Token-weighted perplexity."""
        return perplexity(self.loss)

    @property
    def ppl_reference_protocol(self) -> float:
        """Perplexity as GaLore's and the POET authors' code reports it: a mean of batch means whose count starts at 1 (x n / (n + 1))."""
        return perplexity(self.batch_mean_loss * self.batches / (self.batches + 1))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < MAX_EXPONENT else math.inf


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[dict[str, Tensor]]) -> EvalResult:
    """Evaluate on this rank's share of the batches and reduce over data-parallel ranks.

    Args:
        engine: the model; its weights, optimizer and RNG are untouched.
        batches: tokens, labels, position_ids [micro, s] and loss_mask; every rank yields the same number of batches.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=engine.context.device)
    engine.model.eval()
    with cached_factors([engine.model], 0):
        for batch in batches:
            losses = engine.model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).float()
            mask = batch["loss_mask"]
            total, tokens = (losses * mask).sum().double(), mask.sum().double()
            sums += torch.stack([total, tokens, total / tokens.clamp_min(1), (tokens > 0).double()])
    engine.model.train()
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    total_loss, token_count, mean_sum, batch_count = sums.tolist()
    return EvalResult(total_loss / max(token_count, 1), int(token_count), mean_sum / max(batch_count, 1), int(batch_count))

"""Perplexity: token-weighted, and by the protocol of the paper's code base for comparison with published tables only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from poet_megatron.engine.base import Batch, Engine
from poet_megatron.engine.forward import forward_step, one_or_all
from poet_megatron.layers.factor_cache import cached_factors

MAX_EXPONENT = 700.0
BATCHES_PER_STAGE = 4  # of one pipeline schedule; interleaving needs a multiple of the number of stages


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
    """exp(loss), infinite where it overflows; NaN of NaN."""
    return math.inf if loss >= MAX_EXPONENT else math.exp(loss)


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[Batch]) -> EvalResult:
    """Evaluate on this rank's share of the batches and reduce over all ranks. Collective.

    Args:
        engine: the model; its weights, optimizer and RNG are untouched.
        batches: tokens, labels, position_ids [micro, s] and loss_mask; every rank yields the same number of batches.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=engine.context.device)
    stages = engine.run.parallel.pipeline_parallel
    for chunk in engine.chunks:
        chunk.eval()
    with cached_factors(engine.chunks, 0):
        for window in _windows(batches, BATCHES_PER_STAGE * stages if stages > 1 else 1):
            for total, tokens in _forward(engine, window):
                sums += torch.stack([total, tokens, total / tokens.clamp_min(1), (tokens > 0).double()])
    for chunk in engine.chunks:
        chunk.train()
    if parallel_state.get_tensor_model_parallel_rank() > 0:  # the same losses as rank 0
        sums.zero_()
    dist.all_reduce(sums)
    total_loss, token_count, mean_sum, batch_count = sums.tolist()
    return EvalResult(total_loss / max(token_count, 1), int(token_count), mean_sum / max(batch_count, 1), int(batch_count))


def _forward(engine: Engine, window: list[Batch]) -> list[Tensor]:
    """[sum of token losses, tokens] in float64 of every batch, on the last pipeline stage; elsewhere nothing."""
    micro_batch_size, seq_length = window[0]["tokens"].shape
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=one_or_all([iter(window) for _ in engine.chunks]),
        model=one_or_all(engine.chunks),
        num_microbatches=len(window),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
    )
    return [entry["loss"].double() for entry in losses]


def _windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches in lists of `size`, so that pipeline stages overlap; the last list is filled up with batches that do not count."""
    iterator = iter(batches)
    while window := list(itertools.islice(iterator, size)):
        blank = {**window[-1], "loss_mask": torch.zeros_like(window[-1]["loss_mask"])}
        yield window + [blank] * (size - len(window))

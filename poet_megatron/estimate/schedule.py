"""What pipeline schedules keep in memory and send, by Megatron's 1F1B and its interleaved form (arXiv:2104.04473, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence


def peak_in_flight(stage: int, stages: int, micro_batches: int, chunk_bytes: Sequence[int]) -> int:
    """Largest number of bytes that the micro-batches in flight on one pipeline stage hold together.

    With one chunk per stage that is min(stages - stage, micro_batches) micro-batches. Interleaved, the stage warms up with
    2 (stages - stage - 1) + (chunks - 1) stages forward passes of single chunks, then alternates.

    Args:
        stage: number of the stage, from 0.
        stages: pipeline stages.
        micro_batches: micro-batches per step.
        chunk_bytes: bytes that one micro-batch holds in each chunk of this stage.
    """
    chunks = len(chunk_bytes)
    order = _chunk_order(stages, micro_batches, chunks)
    warmup = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    held = peak = sum(chunk_bytes[chunk] for chunk in order[:warmup])
    for forward, backward in zip(order[warmup:], order, strict=False):
        held += chunk_bytes[forward]
        peak = max(peak, held)
        held -= chunk_bytes[chunks - 1 - backward]
    return peak


def messages(stage: int, stages: int, micro_batches: int, chunks: int) -> int:
    """Tensors that one stage sends in a step (it receives as many): activations to the next chunk and their gradients to the one before."""
    numbers = [chunk * stages + stage for chunk in range(chunks)]
    forward = sum(number < chunks * stages - 1 for number in numbers)
    backward = sum(number > 0 for number in numbers)
    return micro_batches * (forward + backward)


def _chunk_order(stages: int, micro_batches: int, chunks: int) -> list[int]:
    """Chunk of every forward pass of a stage in a step; backward passes take the chunks in opposite order."""
    if chunks == 1:
        return [0] * micro_batches
    turns = [min(stages, micro_batches - first) for first in range(0, micro_batches, stages)]
    return [chunk for turn in turns for chunk in range(chunks) for _ in range(turn)]

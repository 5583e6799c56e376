"""POET layers split over tensor-parallel ranks, beside the same layer on one rank: for cases_layers.py.

Every rank makes the same full weights, skews, inputs and output gradients from a seed and takes its share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.layers.parallel import Part, PoetColumnParallelLinear, PoetQkvLinear, PoetRowParallelLinear, PoetSpec

GROUPS = 4  # shard groups of every case, whatever the number of ranks
HIDDEN, FFN, HEADS, KV_HEADS, HEAD = 40, 44, 8, 4, 5  # shard groups of 10, 11 and 5 features: ragged for every block of the cases
SEQUENCE, BATCH, MICRO_BATCHES = 8, 2, 2
TOLERANCE = 1e-12
LAYERS = {
    "qkv": (PoetQkvLinear, HIDDEN, {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}),
    "gate_up": (PoetColumnParallelLinear, HIDDEN, {"gate": FFN, "up": FFN}),
    "row": (PoetRowParallelLinear, FFN, {"down": HIDDEN}),
}


@dataclass(frozen=True)
class Case:
    """One layer in one layout; `placement` "shared" sets share_input_rotation, the others tp_placement."""

    layer: str
    placement: str = "outside"
    sequence_parallel: bool = False
    compute: str = "input"
    variant: str = "bs"
    block_in: float | None = None
    block_out: float | None = None
    bias: bool = True
    test: str = "gradients"

    @property
    def name(self) -> str:
        words = [self.test, self.layer, self.placement, "sp" if self.sequence_parallel else "", self.compute, self.variant]
        words += [
            f"in{self.block_in:g}" if self.block_in is not None else "",
            f"out{self.block_out:g}" if self.block_out is not None else "",
        ]
        return "-".join(word for word in [*words, "" if self.bias else "nobias"] if word)

    @property
    def column(self) -> bool:
        return self.layer != "row"

    def config(self, tp_size: int) -> PoetConfig:
        mixed = 5 if self.sequence_parallel and self.placement == "outside" else 8 // tp_size  # q rotates, k and v form their weight
        block = {"bs": mixed if self.compute == "auto" else 4, "fs": 0.5}[self.variant]
        return PoetConfig(
            variant=self.variant,
            block_size=block,
            block_size_in=self.block_in,
            block_size_out=self.block_out,
            compute=self.compute,
            shard_groups=GROUPS,
            share_input_rotation=self.placement == "shared",
            tp_placement="auto" if self.placement == "shared" else self.placement,
        )


def transformer_config(case: Case, tp_size: int, dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=case.sequence_parallel and tp_size > 1,
    )


def build(case: Case, group: dist.ProcessGroup, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The layer of a case on `group`, with this rank's share of the same random state whatever the group."""
    kind, inputs, outputs = LAYERS[case.layer]
    parts = tuple(Part(name, number, size) for number, (name, size) in enumerate(outputs.items()))
    poet = PoetSpec(case.config(dist.get_world_size()), 7, 3, parts, 10**6)
    if group.size() == 1:  # the reference: the plainest computation
        poet = replace(poet, config=replace(poet.config, compute="input", tp_placement="outside"))
    config = transformer_config(case, group.size(), dtype)
    layer = kind(inputs, sum(outputs.values()), config=config, init_method=None, poet=poet, bias=case.bias, tp_group=group)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for matrix in layer.parts:
        matrix.set_merge_index(2)
    for size, matrix in zip(outputs.values(), layer.parts, strict=True):
        matrix.load_canonical(share(randn(size, inputs) / inputs**0.5, 0 if case.column else 1, group))
        for side, rotation in (("in", matrix.rotation_in), ("out", matrix.rotation_out)):
            if rotation.skew is not None:
                full = randn(GROUPS, rotation.layout.packed_per_group) * 0.3
                split = (side == "out") == case.column
                rotation.skew.data.copy_(share(full, 0, group) if split else full)
    if case.bias:
        layer.bias.data.copy_(local_features(case, randn(sum(outputs.values())), group))
    return layer


def share(full: torch.Tensor, axis: int, group: dist.ProcessGroup) -> torch.Tensor:
    return full.chunk(group.size(), axis)[group.rank()]


def local_features(case: Case, full: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A rank's columns of the output of all ranks: gate and up are split each; q, k, v are interleaved by key/value head already."""
    pieces = full.split(FFN, -1) if case.layer == "gate_up" else [full]
    return torch.cat([share(piece, -1, group) for piece in pieces], -1) if case.column else full


def local_output(case: Case, full: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return share(full, 0, group) if not case.column and case.sequence_parallel else local_features(case, full, group)


def local_input(case: Case, full: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if not case.column:
        return share(full, -1, group)
    return share(full, 0, group) if case.sequence_parallel else full


def batches(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and output gradients of the micro-batches, whole."""
    _, inputs, outputs = LAYERS[case.layer]
    generator = torch.Generator().manual_seed(2)
    return tuple(
        [torch.randn(SEQUENCE, BATCH, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(MICRO_BATCHES)]
        for width in (inputs, sum(outputs.values()))
    )


def step(layer: torch.nn.Module, xs: list[torch.Tensor], grads: list[torch.Tensor], recompute: bool = False) -> list[torch.Tensor]:
    """Forward and backward of the micro-batches, forwards first, as a pipeline may do."""
    with cached_factors([layer], len(xs)):
        outputs = [checkpoint(lambda x: layer(x)[0], x, use_reentrant=True) if recompute else layer(x)[0] for x in xs]
        for output, grad in zip(outputs, grads, strict=True):
            output.backward(grad)
    return outputs


def finalize(layer: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """What Megatron's finalize_model_grads does for sequence parallelism."""
    for parameter in layer.parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=group)


def alone() -> dist.ProcessGroup:
    """The group of this rank alone."""
    if not hasattr(alone, "group"):
        alone.group = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    return alone.group


def skews(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in layer.named_parameters() if name.endswith(".skew")}


def is_split(case: Case, name: str) -> bool:
    return name.endswith("rotation_out.skew" if case.column else "rotation_in.skew") or (name == "bias" and case.column)


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    error = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error < tolerance, f"{what}: off by {error:.1e}"


def local_share(case: Case, name: str, full: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A rank's share of a trainable parameter's full tensor."""
    if name == "bias":
        return local_features(case, full, group)
    return share(full, 0, group) if is_split(case, name) else full


def same_on_all_ranks(tensor: torch.Tensor, group: dist.ProcessGroup, what: str) -> None:
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    assert all(torch.equal(other, tensor) for other in gathered), f"{what} differs between ranks"

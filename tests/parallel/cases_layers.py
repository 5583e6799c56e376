"""Cases of test_tensor_parallel_layers.py; run by torchrun on 2 or 4 ranks, all of them tensor-parallel.

Every case compares a POET layer split over the ranks with one that each rank builds on a group of itself alone, from the same full
weights, skews and inputs: same shard groups, so the same function and the same gradients. Float64 throughout: sums of at most a few hundred
products of order 1 are good to 1e-13.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from split_layers import (
    BATCH,
    HIDDEN,
    LAYERS,
    MICRO_BATCHES,
    SEQUENCE,
    Case,
    alone,
    batches,
    build,
    close,
    finalize,
    is_split,
    local_input,
    local_output,
    local_share,
    same_on_all_ranks,
    share,
    skews,
    step,
    transformer_config,
)

from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.cpu_shim import cuda_names_on_cpu


def _cases() -> list[Case]:
    booleans = (False, True)
    cases = [
        Case(layer, placement, sp, compute, variant)
        for layer in ("qkv", "gate_up")
        for placement, compute in (
            ("outside", "input"),
            ("inside", "input"),
            ("shared", "input"),
            ("inside", "weight"),
            ("shared", "weight"),
        )
        for sp in booleans
        for variant in ("bs", "fs")
    ]
    cases += [
        Case("row", "outside", sp, compute, variant) for sp in booleans for compute in ("input", "weight") for variant in ("bs", "fs")
    ]
    cases += [Case("qkv", placement, sp, "auto") for placement in ("outside", "inside") for sp in booleans]  # mixed
    cases += [Case(layer, "outside", sp, block_in=0) for layer in ("qkv", "row") for sp in booleans]
    cases += [Case(layer, "inside", sp, block_out=0) for layer in ("gate_up", "row") for sp in booleans]
    cases += [Case("qkv", "shared", sp, block_in=0, bias=False) for sp in booleans]
    cases += [Case("qkv", "inside", True, block_in=16, block_out=8), Case("row", "outside", True, block_in=16, block_out=16)]  # capped
    for test in ("training", "hooks"):
        cases += [
            Case(layer, placement, sp, "input", test=test) for layer in ("qkv",) for placement in ("outside", "inside") for sp in booleans
        ]
        cases += [Case("gate_up", "shared", sp, compute, "fs", test=test) for sp in booleans for compute in ("input", "weight")]
        cases += [Case("row", "outside", True, compute, test=test) for compute in ("input", "weight")]
    cases += [Case("qkv", placement, True, "input", test="recompute") for placement in ("outside", "inside", "shared")]
    cases += [Case("gate_up", "shared", True, "weight", test="recompute"), Case("row", "outside", True, "weight", test="recompute")]
    cases += [Case(layer, "shared", True, test="checkpoint") for layer in LAYERS]
    cases += [Case("gate_up", test="masters"), Case("row", test="masters"), Case("qkv", "inside", True, test="bf16")]
    cases += [Case("gate_up", sequence_parallel=sp, test="megatron") for sp in booleans]
    return cases + [Case("row", sequence_parallel=sp, test="megatron") for sp in booleans]


CASES = {case.name: case for case in _cases()}


def check_gradients(case: Case, group: dist.ProcessGroup) -> dict:
    reference, layer = build(case, alone()), build(case, group)
    xs, grads = batches(case)
    inputs = [local_input(case, x, group).clone().requires_grad_() for x in xs]
    full_inputs = [x.clone().requires_grad_() for x in xs]
    fired: dict[str, list[torch.Tensor]] = {name: [] for name in skews(layer)}
    for name, skew in skews(layer).items():
        skew.register_post_accumulate_grad_hook(lambda p, name=name: fired[name].append(p.grad.clone()))
    with CollectiveCounter() as counter:
        local_grads = [local_output(case, grad, group).contiguous() for grad in grads]
        outputs = step(layer, inputs, local_grads, recompute=case.test == "recompute")
    expected = step(reference, full_inputs, grads)
    finalize(layer, group)
    for number in range(MICRO_BATCHES):
        close(outputs[number], local_output(case, expected[number], group), "output")
        close(inputs[number].grad, local_input(case, full_inputs[number].grad, group), "input gradient")
    check_parameters(case, layer, reference, fired, group)
    check_norm(layer, reference, group)
    return check_collectives(case, layer, counter, group) if case.test == "gradients" else {}


check_recompute = check_gradients  # activation checkpointing, as Megatron does it: every layer runs forward again in its backward pass


def check_parameters(case, layer, reference, fired, group) -> None:
    full = dict(reference.named_parameters())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {name for name, p in full.items() if p.requires_grad}
    rotations = dict(layer.named_modules())
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            assert parameter.tensor_model_parallel and parameter.partition_dim == (0 if case.column else 1), name
            continue
        assert full[name].grad.abs().max() > 1e-2, f"{name}: the reference has no gradient to speak of"
        close(parameter.grad, local_share(case, name, full[name].grad, group), f"gradient of {name}")
        assert getattr(parameter, "tensor_model_parallel", False) == is_split(case, name), name
        if not is_split(case, name):
            same_on_all_ranks(parameter.grad, group, f"gradient of {name}")
        if name in fired:
            assert len(fired[name]) == 1, f"{name}: data parallelism saw {len(fired[name])} gradients"
            if rotations[name.removesuffix(".skew")].partial_over is not None:
                assert torch.equal(fired[name][0], parameter.grad), f"{name}: data parallelism saw a partial gradient"


def check_norm(layer, reference, group) -> None:
    """The gradient norm as Megatron counts it does not depend on the layout."""
    owned = [p.grad for p in layer.parameters() if p.requires_grad and param_is_not_tensor_parallel_duplicate(p, group)]
    norm = sum((grad.square().sum() for grad in owned), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(norm, group=group)
    close(norm, sum(p.grad.square().sum() for p in reference.parameters() if p.requires_grad), "squared gradient norm")


def check_collectives(case: Case, layer, counter: CollectiveCounter, group: dist.ProcessGroup) -> dict:
    """Exactly Megatron's collectives on activations, without the gather that its weight gradient needs, times the number of inputs
    that are distributed; and one all-reduce per step for each replicated factor with a partial gradient."""
    times = 1
    if case.column and case.placement == "outside":
        rotating = [m for m in layer.parts if m.compute == "input" and m.rotation_in.skew is not None]
        times = len(rotating) + (len(rotating) < len(layer.parts))
        assert case.compute != "auto" or times == 2
    calls, sizes = (Counter({kind: times * MICRO_BATCHES * value for kind, value in part.items()}) for part in megatron(case, group))
    if case.column and case.sequence_parallel:
        calls["all_gather"] //= 2
        sizes["all_gather"] //= 2
    partial = {
        name
        for name, skew in skews(layer).items()
        if not is_split(case, name) and (case.placement == "inside" or owner_of(layer, name).compute == "weight")
    }
    for name in partial:
        calls["all_reduce"] += 1
        sizes["all_reduce"] += skews(layer)[name].numel() * 8
    ranks = dist.get_process_group_ranks(group)
    assert counter.calls(*ranks) == counter.calls() == dict(calls), f"{counter.calls()}, expected {dict(calls)}"
    assert counter.bytes(*ranks) == dict(sizes), f"{counter.bytes()}, expected {dict(sizes)} bytes"
    return {"calls": counter.calls(), "bytes": counter.bytes(), "factors": len(partial)}


def owner_of(layer, name: str):
    return layer.matrices[name.split(".")[1]]


def megatron(case: Case, group: dist.ProcessGroup) -> tuple[dict[str, int], dict[str, int]]:
    """Calls and bytes of Megatron's own layer for one micro-batch in the same layout."""
    _, inputs, outputs = LAYERS[case.layer]
    kind = ColumnParallelLinear if case.column else RowParallelLinear
    extra = {"gather_output": False} if case.column else {"input_is_parallel": True}
    config = transformer_config(case, group.size(), torch.float64)
    layer = kind(inputs, sum(outputs.values()), config=config, init_method=None, bias=False, skip_bias_add=False, tp_group=group, **extra)
    layer.weight.data.zero_()
    x = local_input(case, batches(case)[0][0], group).clone().requires_grad_()
    with CollectiveCounter() as counter:
        layer(x)[0].sum().backward()
    return counter.calls(), counter.bytes()


def check_megatron(case: Case, group: dist.ProcessGroup) -> dict:
    """Megatron's numbers, spelled out."""
    calls, sizes = megatron(case, group)
    activations = SEQUENCE * BATCH * HIDDEN * 8
    expected = {"all_reduce": 1}
    if case.sequence_parallel:
        expected = {"all_gather": 2 if case.column else 1, "reduce_scatter": 1}
    assert calls == expected
    assert sizes == {kind: count * activations for kind, count in expected.items()}
    return {"calls": calls, "bytes": sizes}


def check_training(case: Case, group: dist.ProcessGroup) -> None:
    """Three steps of gradient descent with merges in between: the same weights, skews and outputs on one rank and on several."""
    reference, layer = build(case, alone()), build(case, group)
    xs, grads = batches(case)
    for _ in range(3):
        for module, on in ((reference, alone()), (layer, group)):
            local = [local_input(case, x, on) if module is layer else x for x in xs]
            module.zero_grad()
            step(module, local, [local_output(case, g, on).contiguous() if module is layer else g for g in grads])
            finalize(module, on)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data -= 1e-2 * parameter.grad
            outputs = [module(x)[0] for x in local]
            merged = [matrix.merged() for matrix in module.parts]
            for matrix in module.parts:
                matrix.restart()
            for matrix, weight in zip(module.parts, merged, strict=True):
                matrix.load_canonical(weight)
            for output, x in zip(outputs, local, strict=True):
                close(module(x)[0], output, "output after a merge")
        for ours, theirs in zip(layer.parts, reference.parts, strict=True):
            assert ours.merge_index == theirs.merge_index > 2
            close(ours.merged(), share(theirs.merged(), 0 if case.column else 1, group), "merged weight")


class _Model(MegatronModule):
    def __init__(self, config: TransformerConfig, layer: torch.nn.Module) -> None:
        super().__init__(config)
        self.layer = layer

    def forward(self, x: torch.Tensor):
        return self.layer(x)


def check_hooks(case: Case, group: dist.ProcessGroup) -> None:
    """Megatron's own DistributedDataParallel (overlapped) and gradient finalization end up with the reference's gradients."""
    reference, layer = build(case, alone()), build(case, group)
    model = _Model(transformer_config(case, group.size(), torch.float64), layer)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=True)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    xs, grads = batches(case)
    with cached_factors([wrapped], MICRO_BATCHES):
        for number, (x, grad) in enumerate(zip(xs, grads, strict=True)):
            local, local_grad = local_input(case, x, group).clone().requires_grad_(), local_output(case, grad, group).contiguous()
            if number < MICRO_BATCHES - 1:
                with wrapped.no_sync():
                    wrapped(local)[0].backward(local_grad)
            else:
                wrapped(local)[0].backward(local_grad)
    wrapped.finish_grad_sync()
    _allreduce_non_tensor_model_parallel_grads([wrapped], model.config, group)
    step(reference, [x.clone().requires_grad_() for x in xs], grads)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            full = dict(reference.named_parameters())[name]
            close(parameter.main_grad, local_share(case, name, full.grad, group), f"main_grad of {name}")


def check_checkpoint(case: Case, group: dist.ProcessGroup) -> None:
    """The shards of all ranks cover every tensor of one rank's state exactly once, with the same numbers."""
    reference, layer = build(case, alone()), build(case, group)
    state = layer.sharded_state_dict("model.", metadata={"dp_cp_group": alone()})
    _, everywhere = determine_global_metadata(state)
    validate_sharding_integrity(everywhere)
    tensors = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    full = {f"model.{key}": value for key, value in reference.state_dict().items() if not key.endswith("_extra_state")}
    assert set(tensors) == set(full)
    assert sum("rotation_in" in key for key in full) == 1
    for key, entry in tensors.items():
        if key == "model.bias" and case.layer == "gate_up":
            continue  # Megatron's MLP splits it into gate and up
        window = tuple(slice(offset, offset + size) for offset, size in zip(entry.global_offset, entry.local_shape, strict=True))
        assert entry.global_shape == tuple(full[key].shape), key
        assert torch.equal(entry.data, full[key][window]), key
        replicated = "rotation_in" in key if case.column else "rotation_out" in key or "bias" in key
        assert entry.replica_id == ((0, group.rank(), 0) if replicated else (0, 0, 0)), key


def check_masters(case: Case, group: dist.ProcessGroup) -> None:
    """Masters dealt over two data-parallel ranks: every weight is written once, in fp32, by the rank that has its master."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tp_size = world // 2
    tp_groups = [dist.new_group(list(range(first, first + tp_size))) for first in (0, tp_size)]
    dp_groups = [dist.new_group([position, position + tp_size]) for position in range(tp_size)]
    data_rank, dp_group = rank // tp_size, dp_groups[rank % tp_size]
    layer = build(case, tp_groups[data_rank], torch.bfloat16)
    plain = layer.sharded_state_dict("", metadata={"dp_cp_group": dp_group})
    assert all(entry.replica_id[2] == data_rank for entry in plain.values())
    for number, matrix in enumerate(layer.parts):
        if number % 2 == data_rank:
            matrix.keep_master()
        else:
            matrix.master_elsewhere = True
    state = layer.sharded_state_dict("", metadata={"dp_cp_group": dp_group})
    _, everywhere = determine_global_metadata(state)
    validate_sharding_integrity(everywhere)
    weights = {key: entry for key, entry in state.items() if key.endswith(".weight")}
    assert set(weights) == {f"matrices.{name}.weight" for name, matrix in layer.matrices.items() if matrix.master is not None}
    assert all(entry.data.dtype == torch.float32 and entry.replica_id == (0, 0, 0) for entry in weights.values())
    assert set(plain) - set(state) == {f"matrices.{name}.weight" for name, matrix in layer.matrices.items() if matrix.master is None}


def check_bf16(case: Case, group: dist.ProcessGroup) -> None:
    """Partial gradients of bf16 skews are added up in fp32, once per step."""
    layer = build(case, group, torch.bfloat16)
    xs, grads = batches(case, torch.bfloat16)
    with CollectiveCounter() as counter:
        step(
            layer,
            [local_input(case, x, group).clone().requires_grad_() for x in xs],
            [local_output(case, grad, group).contiguous() for grad in grads],
        )
    replicated = [skew for name, skew in skews(layer).items() if not is_split(case, name)]
    assert len(replicated) == 3
    assert all(skew.dtype == skew.grad.dtype == torch.bfloat16 for skew in replicated)
    assert counter.calls()["all_reduce"] == 3
    assert counter.bytes()["all_reduce"] == 4 * sum(skew.numel() for skew in replicated)


def run(case: Case, group: dist.ProcessGroup) -> dict:
    """{"error": text, empty if all ranks pass, ...figures}."""
    error, figures = "", None
    try:
        figures = globals()[f"check_{case.test}"](case, group)
    except Exception:
        error = f"rank {dist.get_rank()}: {traceback.format_exc()}"
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return {"error": "\n".join(filter(None, errors)), **(figures or {})}


def main(output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with cuda_names_on_cpu():
        parallel_state.initialize_model_parallel(dist.get_world_size())
        group = parallel_state.get_tensor_model_parallel_group()
        alone()
        results = {name: run(case, group) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

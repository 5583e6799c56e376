"""What a merge does to the optimizer, the function and the spectrum of a whole model in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from poet_megatron.data.prepared import PreparedData
from poet_megatron.data.train_data import TrainBatches, build_train_dataset
from poet_megatron.engine.build import build_engine
from poet_megatron.guard.losses import NonFiniteError
from poet_megatron.layers.rotation import Rotation
from poet_megatron.model.canonical import canonical_slots
from poet_megatron.optim.merge import clip_threshold, merge_model, rotated_matrices, rotation_health
from poet_megatron.optim.state import MOMENTS
from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.context import parallel_context
from poet_megatron.train.step import train_step


@contextmanager
def trained(run, steps: int):
    """An engine after `steps` optimizer steps, and the batches that follow."""
    prepared = PreparedData.open(run.data.path, run.model.vocab_size, run.model.seq_length)
    with parallel_context(run.parallel, run.train.seed) as context:
        engine = build_engine(run, context)
        dataset = build_train_dataset(prepared, seq_length=run.model.seq_length, samples=400, seed=run.train.seed)
        sizes = {"micro_batch_size": run.train.micro_batch_size, "global_batch_size": run.train.global_batch_size}
        data = TrainBatches(dataset, **sizes, dp_rank=0, dp_size=1)
        for step in range(steps):
            train_step(engine, data.micro_batches(step), run.optim.clip_grad)
        yield engine, data


def merge_now(engine) -> None:
    merge_model(engine.chunks, engine.states(), engine.run.poet, parallel_state.get_data_parallel_group())


def eval_loss(engine, data: TrainBatches) -> torch.Tensor:
    engine.chunks[0].eval()
    with torch.no_grad():
        return torch.cat([engine.chunks[0](b["tokens"], b["position_ids"], None, labels=b["labels"]) for b in data.micro_batches(50)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [{}, {"poet.variant": "fs", "poet.block_size": "0.5"}])
def test_merge_resets_skews_and_touches_nothing_else(tiny_run, precision, variant):
    """Skews, their fp32 masters, moments and Adam's step are zero; every bit of embeddings' and norms' state stays (DESIGN 5)."""
    run = tiny_run("run", {"train.precision": precision, "poet.orthogonal_map": "cayley", **variant})
    with trained(run, 4) as (engine, _):
        named, states = engine.trainable(), engine.states()
        assert {state.step for state in states.values()} == {4}
        assert any(states[name].param is not parameter for name, parameter in named.items()) == (precision == "bf16")
        before = {name: _snapshot(named[name], state) for name, state in states.items()}
        assert all(any(bool(tensor.any()) for tensor in before[name]) for name in named)
        merge_now(engine)
        for name, state in states.items():
            after = _snapshot(named[name], state)
            if name.endswith(".skew"):
                assert not any(bool(tensor.any()) for tensor in after), name
                assert state.step == 0
            else:
                assert all(torch.equal(old, new) for old, new in zip(before[name], after, strict=True)), name
                assert state.step == 4


def _snapshot(parameter, state) -> list[torch.Tensor]:
    return [parameter.detach().clone(), state.param.detach().clone(), *(state.slots[moment].clone() for moment in MOMENTS)]


@pytest.mark.parametrize("merge", ["cayley-off", "cayley-exact", "cayley-neumann-off", "exp-off", "exp-exact"])
def test_the_model_is_the_same_function_after_a_merge(tiny_run, merge):
    """fp32: token losses move by rounding only (|logits| is O(5), so 1e-5 is a few ulp through 2 layers)."""
    orthogonal_map, polish = merge.rsplit("-", 1)
    run = tiny_run("run", {"poet.orthogonal_map": orthogonal_map, "poet.merge_polish": polish, "optim.poet_lr": "2e-2"})
    with trained(run, 4) as (engine, data):
        before = eval_loss(engine, data)
        norm = max(r.diagnostics()[2].item() for r in engine.chunks[0].modules() if isinstance(r, Rotation))
        assert norm > 0.1
        merge_now(engine)
        assert torch.allclose(eval_loss(engine, data), before, atol=1e-5, rtol=0)


class HostReads(TorchDispatchMode):
    """Counts numbers that the host asks of a device, which waits for all that is queued there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["poet", "adamw"])
def test_the_health_of_all_factors_is_read_at_once(tiny_run, method):
    """It is logged with every line: a read per factor would be hundreds of waits for the device."""
    with trained(tiny_run("run", {"method": method}), 4) as (engine, _):
        rotations = [module for module in engine.chunks[0].modules() if isinstance(module, Rotation)]
        defects, sizes, norms = torch.stack([torch.zeros(3), *(rotation.diagnostics() for rotation in rotations)]).T.tolist()
        with HostReads() as reads:
            error, norm = rotation_health(engine.chunks, parallel_state.get_model_parallel_group())
    assert reads.count == 0  # but for one copy of everything
    assert norm == max(norms) and (norm > 1e-3) == (method == "poet")
    assert error == pytest.approx((sum(defects) / max(sum(sizes), 1.0)) ** 0.5)


def test_exact_polish_keeps_the_spectrum_where_the_series_does_not(tiny_run):
    """T_2 at |Q| of 0.3 to 1: merging its exact Cayley map leaves singular values to 1e-5 sigma_max, merging T_2 itself does not."""
    drift = {}
    for polish in ("off", "exact"):
        run = tiny_run(polish, {"poet.neumann_terms": "2", "poet.merge_polish": polish, "optim.poet_lr": "5e-2"})
        with trained(run, 6) as (engine, _):
            matrix = rotated_matrices(engine.chunks)[0]
            before = torch.linalg.svdvals(matrix.canonical(matrix.weight).double())
            merge_now(engine)
            after = torch.linalg.svdvals(matrix.canonical(matrix.weight).double())
            drift[polish] = ((after - before).abs().max() / before.max()).item()
    assert drift["exact"] < 1e-5
    assert drift["off"] > 1e-3


def test_bf16_keeps_an_fp32_master_of_the_weights(tiny_run):
    """The merge happens in fp32 and the working weight is its rounding."""
    with trained(tiny_run("run", {"train.precision": "bf16"}), 3) as (engine, _):
        matrix = rotated_matrices(engine.chunks)[0]
        expected = matrix.merged()
        merge_now(engine)
        assert matrix.master.dtype == torch.float32
        assert torch.equal(matrix.master, expected)
        assert torch.equal(matrix.canonical(matrix.weight), expected.bfloat16())


def test_initial_model_does_not_depend_on_the_method(tiny_run):
    """The same W0 and the same loss, bit for bit, for dense training and for POET with zero skews."""
    first = {}
    for name, changes in {"poet": {}, "adamw": {"method": "adamw"}}.items():
        with trained(tiny_run(name, changes), 0) as (engine, data):
            slots = canonical_slots(engine.chunks[0], engine.run.model)
            first[name] = ({slot.name: slot.read() for slot in slots}, eval_loss(engine, data))
    weights, losses = zip(*first.values(), strict=True)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.allclose(losses[0], losses[1], atol=1e-6, rtol=0)


def test_a_merge_needs_the_memory_of_one_matrix(tiny_run):
    """At the peak 5 fp32 copies of the largest matrix, its factors included, whatever the number of layers; nothing stays."""
    peaks = {}
    for layers in (1, 3):
        changes = {"model.num_layers": str(layers), "model.ffn_hidden_size": "512", "train.precision": "bf16"}
        with trained(tiny_run(str(layers), changes), 1) as (engine, _):
            largest = max(matrix.weight.numel() for matrix in rotated_matrices(engine.chunks))
            peaks[layers], left = allocated(lambda engine=engine: merge_now(engine))
            assert left == 0
            assert peaks[layers] < 5 * 4 * largest
    assert peaks[3] == peaks[1]


def allocated(action: Callable[[], None]) -> tuple[int, int]:
    """(largest number of bytes that `action` has allocated at a time, bytes it leaves allocated)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held), held[-1]


def test_one_rank_merges_without_communication(tiny_run):
    with trained(tiny_run("run", {"train.precision": "bf16"}), 1) as (engine, _):
        with CollectiveCounter() as counter:
            merge_now(engine)
        assert counter.records == []


def test_replicas_are_compared_around_every_merge(tiny_run, monkeypatch):
    from poet_megatron.train import loop
    from poet_megatron.train.run import pretrain

    def recorded(event: str):
        return lambda chunks, *arguments: events.append(arguments[0] if event == "check" else event)

    monkeypatch.setattr(loop, "check_replicas", recorded("check"))
    monkeypatch.setattr(loop, "merge_model", recorded("merge"))
    for check in ("true", "false"):
        events: list[str] = []
        pretrain(tiny_run(check, {"poet.merge_interval": "2", "train.steps": "4", "parallel.check_replicas": check}))
        around = [[f"before the merge at step {step}", "merge", f"after the merge at step {step}"] for step in (2, 4)]
        assert events == (sum(around, []) if check == "true" else ["merge", "merge"])


def test_nan_stops_before_the_update(tiny_run):
    with trained(tiny_run("run"), 2) as (engine, data):
        matrix = rotated_matrices(engine.chunks)[0]
        before = {name: p.detach().clone() for name, p in engine.chunks[0].named_parameters() if p is not matrix.weight}
        matrix.weight.data[0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="Nothing was updated"):
            train_step(engine, data.micro_batches(2), 1.0)
        assert all(torch.equal(p, before[name]) for name, p in engine.chunks[0].named_parameters() if name in before)
        assert {state.step for state in engine.states().values()} == {2}


def test_clip_ramp_by_hand(tiny_run):
    """0.1x at the first step after a merge, a tenth of the way more at each of ten steps, full from the eleventh on."""
    poet = tiny_run("run").poet
    assert [round(clip_threshold(step, 40, 0.5, poet), 6) for step in range(41, 53)] == [
        0.05, 0.095, 0.14, 0.185, 0.23, 0.275, 0.32, 0.365, 0.41, 0.455, 0.5, 0.5,
    ]  # fmt: skip
    assert clip_threshold(1, 0, 0.5, poet) == 0.5


def test_early_merge_when_the_skew_norm_passes(tiny_run, losses):
    from poet_megatron.monitor.metrics import read_metrics
    from poet_megatron.monitor.run_dir import RunDirectory
    from poet_megatron.train.run import pretrain

    settings = {"poet.merge_interval": "0", "poet.merge_at_skew_norm": "0.05", "optim.poet_lr": "2e-2", "train.steps": "22"}
    run = tiny_run("run", settings)
    pretrain(run)
    entries = read_metrics(RunDirectory(run.train.run_dir).metrics_path)
    index = {int(e["step"]): e["poet/merge_index"] for e in entries if "poet/merge_index" in e}
    assert index[10] == 0
    assert index[11] == 1
    assert index[21] == 2

"""The layer benchmark: its arithmetic, its floors and the shape of its output. What it measures is never asserted."""

from __future__ import annotations

import io
import json

import pytest
import torch

from benchmarks import layer as benchmark
from benchmarks.floor import Floor, series_products
from benchmarks.parts import PARTS, PartTimer
from benchmarks.timing import Progress, Samples, Spread, interleave
from poet_megatron.layers.side import SideLayout

KEYS = {
    "in_features",
    "out_features",
    "dtype",
    "method",
    "block_size",
    "ratio",
    "floor",
    "ratio_min",
    "ratio_max",
    "milliseconds",
    "parts",
    "merge_ratio",
}


@pytest.fixture
def tiny(monkeypatch):
    """A benchmark that takes a moment: --quick on one 24x40 layer with small blocks."""
    monkeypatch.setattr(benchmark, "QUICK_SIZES", ((24, 40),))
    monkeypatch.setattr(benchmark, "CASES", (benchmark.Case("poet_bs", 16), benchmark.Case("poet_fs", 0.5)))
    threads = torch.get_num_threads()
    yield ["--quick", "--threads", "1"]
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("width_out", "block", "expected"), [(5376, 256, 0.8393), (5376, 64, 0.7098), (2048, 256, 0.9167), (2048, 64, 0.7292)]
)
def test_floor_is_that_of_the_design(width_out, block, expected):
    floor = benchmark.Case("poet_bs", block).floor(2048, width_out, 8192)
    assert floor.products == pytest.approx(2 / 3 + block * (2048 + width_out) / (2048 * width_out))
    assert floor.products == pytest.approx(expected, abs=1e-4)
    assert floor.compute == "input"


def test_floor_counts_ragged_blocks():
    sides = [SideLayout.build(width, 1, 16, "bs") for width in (200, 120)]
    floor = Floor.of(100, sides[0], sides[1], neumann_terms=4)
    squares, cubes = 19 * 16**2 + 2 * 8**2, 19 * 16**3 + 2 * 8**3
    assert floor.products == pytest.approx(2 / 3 + squares / (200 * 120))
    assert floor.with_cayley - floor.products == pytest.approx(6.5 * 2 * cubes / (6 * 100 * 200 * 120))


def test_floor_of_the_chosen_computation():
    large = benchmark.Case("poet_fs", 0.5).floor(64, 64, 8192)
    assert large.compute == "weight"
    assert large.products == pytest.approx(1 + 2 * 32**2 * 64 / (8192 * 64 * 64))
    assert benchmark.Case("poet_fs", 0.125).floor(64, 64, 8192).compute == "input"


@pytest.mark.parametrize("case", [benchmark.Case("poet_fs", 0.5), benchmark.Case("poet_fs", 0.125), benchmark.Case("poet_bs", 16)])
def test_layer_uses_the_computation_of_its_floor(case):
    layer = benchmark.make_layer(torch.nn.Linear(64, 64, bias=False), case, 8192)
    assert layer.matrix.compute == case.floor(64, 64, 8192).compute


# k = 1: S = Q^2 twice and Q dS. k = 2: and Q o(S); Q A, A o(S). k = 3, 4: and S^2 twice; S K_2. k = 5: and S^3 twice; S K_3, S^2 K_3.
@pytest.mark.parametrize(("terms", "expected"), [(1, 2.0), (2, 4.5), (3, 6.5), (4, 6.5), (5, 9.5)])
def test_series_products_are_those_of_the_kernel(terms, expected):
    assert series_products(terms) == expected


def test_every_case_is_compared_with_its_neighbours():
    order = []

    def runs(name, seconds):
        values = iter(seconds)

        def run():
            order.append(name)
            return next(values)

        return run

    ticks = []
    cases = {"a": runs("a", [9, 3, 12]), "b": runs("b", [9, 6, 5])}
    dense, samples = interleave(runs("dense", [9, 1, 3, 5, 1, 4]), cases, 2, ticks.append)
    assert order == ["dense", "a", "b"] + ["dense", "a", "dense", "b"] * 2 + ["dense"]
    assert samples["a"].seconds == [3, 12]
    assert samples["a"].ratios == [3 / 2, 12 / 3]
    assert samples["b"].ratios == [6 / 4, 5 / 2.5]
    assert dense.seconds == [1, 3, 5, 1, 4]
    assert dense.ratios == [3 / 3, 5 / 2, 1 / 4.5]
    assert ticks == ["a", "b"] * 3


def test_spread():
    assert Spread.of([3.0, 1.0, 9.0, 2.0]) == Spread(2.5, 1.0, 9.0)


def test_progress_counts_down():
    now = iter([0.0, 10.0, 20.0])
    stream = io.StringIO()
    progress = Progress(4, stream, lambda: next(now))
    progress.advance(1, "first")
    progress.advance(0.01, "too little to report")
    progress.advance(0.99, "second")
    assert stream.getvalue().splitlines() == [" 25%  elapsed 0:00:10  left 0:00:30  first", " 50%  elapsed 0:00:20  left 0:00:20  second"]


def test_parts_and_the_rest_add_up_to_the_ratio():
    parts = [dict.fromkeys(PARTS, 0.5), dict.fromkeys(PARTS, 0.7)]
    runs = Samples(seconds=[4.0, 8.0], ratios=[0.8, 0.8])
    fractions = benchmark.part_fractions(parts, runs, ratio=1.1)
    assert fractions["gemm"] == pytest.approx((0.5 * 0.2 + 0.7 * 0.1) / 2)
    assert sum(fractions.values()) == pytest.approx(1.1)


def test_parts_compute_what_the_layer_computes():
    workload = benchmark.Workload(24, 40, "fp32", 32, 2)
    inputs, grads = workload.micro_batch_data()
    layer = benchmark.make_layer(torch.nn.Linear(24, 40, bias=False), benchmark.Case("poet_bs", 16), 32)
    results = {part: [] for part in PARTS}
    timer = PartTimer(layer.matrix, inputs, grads)
    original = timer._time
    timer._time = lambda part, function: results[part].append(original(part, function)) or results[part][-1]
    timer()
    y = layer(inputs[1])
    y.backward(grads[1])
    torch.testing.assert_close(results["product_forward"][-1], y.detach())
    torch.testing.assert_close(results["product_grad_x"][-1], inputs[1].grad)
    assert set(timer.seconds[0]) == set(PARTS)
    assert all(seconds > 0 for seconds in timer.seconds[0].values())


def test_a_step_leaves_the_gradients_of_all_micro_batches():
    workload = benchmark.Workload(24, 40, "fp32", 32, 4)
    inputs, grads = workload.micro_batch_data()
    linear = torch.nn.Linear(24, 40, bias=False)
    layer = benchmark.make_layer(linear, benchmark.Case("poet_bs", 16), 32)
    step = benchmark.Step(layer, inputs, grads)
    step()
    skew = layer.matrix.rotation_in.skew
    first, first_input = skew.grad.clone(), inputs[0].grad.clone()
    step()
    torch.testing.assert_close(skew.grad, first)
    torch.testing.assert_close(inputs[0].grad, first_input)
    layer.zero_grad()
    for x, grad in zip(inputs, grads, strict=True):
        layer(x.detach()).backward(grad)
    torch.testing.assert_close(skew.grad, first)


def test_json_rows(tiny, tmp_path, capsys):
    output = tmp_path / "results" / "layer.json"
    assert benchmark.main([*tiny, "--json", "--output", str(output)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == rows
    assert [(row["dtype"], row["method"], row["block_size"]) for row in rows] == [
        (dtype, method, block) for dtype in ("fp32", "bf16") for method, block in (("dense", 0), ("poet_bs", 16), ("poet_fs", 0.5))
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert (row["in_features"], row["out_features"]) == (24, 40)
        assert row["command"].startswith("python -m benchmarks.layer")
        assert row["machine"]["threads"] == 1
        assert (row["parts"] is not None) == (row["method"] == "poet_bs")
    assert rows[1]["parts"].keys() == {*PARTS, "other"}


def test_tables(tiny, capsys):
    assert benchmark.main([*tiny, "--dtypes", "fp32"]) == 0
    captured = capsys.readouterr()
    assert "poet_fs 1/2" in captured.out
    assert "blk_grad_e" in captured.out
    assert "left 0:00:00" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "2048"], "'2048' is not a size; write INxOUT"),
        (["--sizes", "0x64"], "both numbers must be positive"),
        (["--sizes", "100x300"], "100x300 is too small for poet_bs 128"),
        (["--dtypes", "fp32,fp16"], "'fp16' is not a dtype; choose from fp32, bf16"),
        (["--repeats", "0"], "must be an integer above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err

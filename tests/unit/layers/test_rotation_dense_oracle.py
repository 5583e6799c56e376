"""Rotated matrices against a dense float64 oracle that builds R and P as matrices from Eq. (4)-(6) of the paper.

The oracle shares with the code under test only the raw permutations, the packed skews and W0: y = (R W0 P)^T x for columns x,
W0 [in, out], R = Psi^T Diag(G_1, ..., G_c) Psi (block-stochastic) or I + D(S) (G - I) D(S)^T (fully-stochastic), once per shard group.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.factor_cache import cached_factors, factor_caches
from poet_megatron.layers.linear import PoetLinear
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix, ShardSpec
from poet_megatron.ops.cayley import OrthogonalMap
from poet_megatron.ops.philox import PERMUTATION, StreamKey

IDENTITY = MatrixId(seed=17, layer=3, matrix=2)
# Float64 throughout, matrices of norm about 1 and depth below 100: rounding is 1e-14; the bar of the specification is 1e-10.
ATOL = 1e-10


@dataclass(frozen=True)
class Case:
    """A matrix to rotate; sizes are those of this rank."""

    variant: str
    width_in: int
    width_out: int
    block_in: float
    block_out: float
    shards: ShardSpec = ShardSpec()


CASES = {
    "bs": Case("bs", 12, 8, 4, 4),
    "bs-ragged": Case("bs", 14, 11, 4, 4),
    "bs-ragged-by-one": Case("bs", 13, 9, 4, 4),
    "bs-odd-blocks": Case("bs", 13, 11, 5, 3),
    "bs-one-block": Case("bs", 7, 6, 7, 6),
    "bs-frozen-in": Case("bs", 9, 10, 0, 4),
    "bs-frozen-out": Case("bs", 9, 10, 4, 0),
    "bs-groups": Case("bs", 15, 14, 2, 3, ShardSpec(3, 2)),
    "bs-groups-capped": Case("bs", 6, 12, 5, 5, ShardSpec(3, 2)),
    "bs-second-rank": Case("bs", 10, 7, 3, 3, ShardSpec(2, 1, first_group_in=2)),
    "fs": Case("fs", 12, 8, 5, 3),
    "fs-fraction": Case("fs", 11, 9, 0.5, 0.5),
    "fs-whole": Case("fs", 6, 7, 1.0, 1.0),
    "fs-frozen-in": Case("fs", 9, 10, 0, 0.5),
    "fs-frozen-out": Case("fs", 9, 10, 0.25, 0),
    "fs-groups": Case("fs", 15, 14, 0.5, 3, ShardSpec(3, 2, first_group_out=4)),
    "both-frozen": Case("bs", 5, 6, 0, 0),
}
MAPS = [("cayley-neumann", 4), ("cayley-neumann", 5), ("cayley", 4), ("exp", 4)]


def build(case, orthogonal_map="cayley-neumann", terms=4, compute="input", merge_index=2, seed=0):
    """A float64 matrix with random W0 and random skews of |Q|_2 about 0.8."""
    config = PoetConfig(
        variant=case.variant,
        block_size_in=case.block_in,
        block_size_out=case.block_out,
        orthogonal_map=orthogonal_map,
        neumann_terms=terms,
        compute=compute,
    )
    matrix = RotatedMatrix(case.width_in, case.width_out, config, IDENTITY, case.shards).double()
    matrix.set_merge_index(merge_index)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.width_out, case.width_in, generator=generator, dtype=torch.float64)
    matrix.load_canonical(weight)
    for rotation in (matrix.rotation_in, matrix.rotation_out):
        if rotation.skew is not None:
            rotation.skew.data.normal_(generator=generator).mul_(0.4 / math.sqrt(max(2, rotation.layout.block_size) / 2))
    return matrix, weight


def orthogonal(q, kind, terms):
    """Eq. (6) and its exact counterparts."""
    eye = torch.eye(len(q), dtype=q.dtype)
    if kind == "cayley-neumann":
        return (eye + q) @ (eye + sum(torch.linalg.matrix_power(q, i) for i in range(1, terms + 1)))
    return (eye + q) @ torch.linalg.inv(eye - q) if kind == "cayley" else torch.linalg.matrix_exp(q)


def skew_matrix(packed, size):
    """Q with Q_ij = packed number of (i, j), i < j, row by row."""
    numbers = iter(packed)
    rows = [[torch.zeros((), dtype=packed.dtype) for _ in range(size)] for _ in range(size)]
    for i in range(size):
        for j in range(i + 1, size):
            rows[i][j] = next(numbers)
            rows[j][i] = -rows[i][j]
    assert next(numbers, None) is None
    return torch.stack([torch.stack(row) for row in rows])


def primitive(packed, variant, size, permutation, kind, terms):
    """The orthogonal matrix of one shard group for its packed skews and its permutation."""
    width = len(permutation)
    if variant == "fs":
        chosen = torch.zeros(width, size, dtype=torch.float64)
        chosen[permutation[:size], torch.arange(size)] = 1
        g = orthogonal(skew_matrix(packed, size), kind, terms)
        return torch.eye(width, dtype=torch.float64) + chosen @ (g - torch.eye(size, dtype=torch.float64)) @ chosen.T
    sizes = [min(size, width - start) for start in range(0, width, size)]
    pieces = packed.split([b * (b - 1) // 2 for b in sizes])
    diagonal = torch.block_diag(*[orthogonal(skew_matrix(piece, b), kind, terms) for piece, b in zip(pieces, sizes, strict=True)])
    psi = torch.zeros(width, width, dtype=torch.float64)
    psi[torch.arange(width), permutation] = 1
    return psi.T @ diagonal @ psi


def dense_factor(case, side, skew, merge_index, kind, terms):
    """R (side 0) or P (side 1) of this rank."""
    width = (case.width_in, case.width_out)[side]
    if skew is None:
        return torch.eye(width, dtype=torch.float64)
    groups = (case.shards.groups_in, case.shards.groups_out)[side]
    first = (case.shards.first_group_in, case.shards.first_group_out)[side]
    block = (case.block_in, case.block_out)[side]
    group_width = width // groups
    size = min(int(block * group_width) if block <= 1 else block, group_width)
    factors = []
    for group in range(groups):
        key = StreamKey(IDENTITY.seed, PERMUTATION, IDENTITY.layer, IDENTITY.matrix, side, first + group, merge_index)
        factors.append(primitive(skew[group], case.variant, size, torch.from_numpy(key.permutation(group_width)), kind, terms))
    return torch.block_diag(*factors)


def dense_effective_weight(case, weight, skews, merge_index=2, kind="cayley-neumann", terms=4):
    """R W0 P as [in, out], differentiable in the skews."""
    r, p = (dense_factor(case, side, skew, merge_index, kind, terms) for side, skew in enumerate(skews))
    return r @ weight.T @ p


def skews_of(matrix):
    return [matrix.rotation_in.skew, matrix.rotation_out.skew]


def oracle_inputs(matrix):
    return [None if skew is None else skew.detach().clone().requires_grad_() for skew in skews_of(matrix)]


def check_forward_and_gradients(case, kind="cayley-neumann", terms=4, compute="input", batch=(2, 3)):
    matrix, weight = build(case, kind, terms, compute)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*batch, case.width_in, generator=generator, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(*batch, case.width_out, generator=generator, dtype=torch.float64)
    y = matrix(x)
    y.backward(grad_y)

    skews, x_oracle = oracle_inputs(matrix), x.detach().clone().requires_grad_()
    effective = dense_effective_weight(case, weight, skews, kind=kind, terms=terms)
    columns = x_oracle.reshape(-1, case.width_in).T
    y_oracle = (effective.T @ columns).T.reshape(*batch, case.width_out)  # y = (R W0 P)^T x
    y_oracle.backward(grad_y)

    torch.testing.assert_close(y, y_oracle, atol=ATOL, rtol=0)
    torch.testing.assert_close(x.grad, x_oracle.grad, atol=ATOL, rtol=0)
    for skew, expected in zip(skews_of(matrix), skews, strict=True):
        assert (skew is None) == (expected is None)
        if skew is not None:
            assert skew.grad.abs().max() > 0.01
            torch.testing.assert_close(skew.grad, expected.grad, atol=ATOL, rtol=0)
    assert matrix.weight.grad is None
    torch.testing.assert_close(matrix.merged(), effective.detach().T, atol=ATOL, rtol=0)


@pytest.mark.parametrize("compute", ["input", "weight"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients_equal_the_dense_oracle(case, compute):
    check_forward_and_gradients(case, compute=compute)


@pytest.mark.parametrize("compute", ["input", "weight"])
@pytest.mark.parametrize(("kind", "terms"), MAPS[1:])
@pytest.mark.parametrize("name", ["bs-ragged", "bs-groups", "fs-fraction"])
def test_every_map_equals_the_dense_oracle(name, kind, terms, compute):
    check_forward_and_gradients(CASES[name], kind, terms, compute, batch=(4,))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry_equals_the_dense_oracle(data):
    def side(variant):
        groups, width = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
        sizes = st.integers(2, width)
        block = data.draw(st.one_of(st.just(0), sizes, st.sampled_from([0.5, 1.0])) if variant == "fs" else st.one_of(st.just(0), sizes))
        return groups, groups * width, 0 if 0 < block <= 1 and block * width < 2 else block

    variant = data.draw(st.sampled_from(["bs", "fs"]))
    (groups_in, width_in, block_in), (groups_out, width_out, block_out) = side(variant), side(variant)
    shards = ShardSpec(groups_in, groups_out, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
    compute = data.draw(st.sampled_from(["input", "weight"]))
    check_forward_and_gradients(Case(variant, width_in, width_out, block_in, block_out, shards), compute=compute, batch=(3,))


@pytest.mark.parametrize("compute", ["input", "weight"])
@pytest.mark.parametrize(("kind", "terms"), [MAPS[0], MAPS[2], MAPS[3]])
@pytest.mark.parametrize("name", ["bs-ragged", "fs-groups"])
def test_gradcheck(name, kind, terms, compute):
    matrix, _ = build(CASES[name], kind, terms, compute)
    x = torch.randn(3, CASES[name].width_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    # Central differences at 1e-6 in float64: truncation 1e-12, cancellation 1e-10; gradients are O(1).
    assert torch.autograd.gradcheck(lambda *inputs: matrix(inputs[0]), (x, *skews_of(matrix)), atol=1e-7, rtol=1e-6)


def test_ranks_of_a_split_side_make_up_the_whole_matrix():
    """Four shard groups on one rank, or two ranks with two each: the same function (what makes runs independent of the layout)."""
    whole_case = Case("bs", 20, 12, 3, 4, ShardSpec(4, 1))
    whole, weight = build(whole_case)
    parts = torch.zeros(5, 12, dtype=torch.float64)
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rank in range(2):
        part, _ = build(Case("bs", 10, 12, 3, 0, ShardSpec(2, 1, first_group_in=2 * rank)))
        columns = slice(10 * rank, 10 * rank + 10)
        part.load_canonical(weight[:, columns])
        part.rotation_in.skew.data.copy_(whole.rotation_in.skew[2 * rank : 2 * rank + 2])
        parts += part(x[:, columns])
    p = dense_factor(whole_case, 1, whole.rotation_out.skew.detach(), 2, "cayley-neumann", 4)
    torch.testing.assert_close(parts @ p, whole(x), atol=ATOL, rtol=0)


# -- factors cached over the micro-batches of a step --


def micro_batches(case, count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(2, 3, case.width_in, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    return xs, [torch.randn(2, 3, case.width_out, generator=generator, dtype=torch.float64) for _ in range(count)]


def count_maps(monkeypatch):
    """Count the evaluations of the orthogonal map and of its gradient."""
    calls = {"increment": 0, "increment_grad": 0}
    for name in calls:
        original = getattr(OrthogonalMap, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(OrthogonalMap, name, counted)
    return calls


@pytest.mark.parametrize("schedule", ["alternating", "forwards-first"])
@pytest.mark.parametrize("compute", ["input", "weight"])
@pytest.mark.parametrize("name", ["bs", "bs-ragged", "bs-frozen-in", "fs", "fs-frozen-out"])
def test_cached_factors_give_the_same_gradients_with_one_map_per_step(name, compute, schedule, monkeypatch):
    case = CASES[name]
    matrix, weight = build(case, compute=compute)
    xs, grads = micro_batches(case, 3)
    live = [rotation for rotation in (matrix.rotation_in, matrix.rotation_out) if rotation.skew is not None]
    runs = sum(len(rotation.layout.runs) for rotation in live)
    fired = []
    for rotation in live:
        rotation.skew.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter))
    calls = count_maps(monkeypatch)
    step_gradients = []
    for _ in range(2):  # a second step must not see anything of the first
        matrix.zero_grad()
        for x in xs:
            x.grad = None
        calls.update(increment=0, increment_grad=0)
        fired.clear()
        with cached_factors([matrix], 3):
            outputs = []
            for i in range(3):
                outputs.append(matrix(xs[i]))
                with torch.no_grad():  # evaluation in the middle of a step neither counts nor computes a map
                    torch.testing.assert_close(matrix(xs[i]), outputs[-1], atol=ATOL, rtol=0)
                if schedule == "alternating":
                    outputs[i].backward(grads[i])
                    assert all((rotation.skew.grad is None) == (i < 2) for rotation in live)
            if schedule == "forwards-first":
                for i in range(3):
                    assert not fired
                    outputs[i].backward(grads[i])
        assert calls == {"increment": runs, "increment_grad": runs}
        assert len(fired) == len(live)  # the hooks of data parallelism see each skew once, with the whole sum
        step_gradients.append([rotation.skew.grad.clone() for rotation in live])
    assert all(torch.equal(a, b) for a, b in zip(*step_gradients, strict=True))

    skews, xs_oracle = oracle_inputs(matrix), [x.detach().clone().requires_grad_() for x in xs]
    effective = dense_effective_weight(case, weight, skews)
    sum(((x @ effective) * grad).sum() for x, grad in zip(xs_oracle, grads, strict=True)).backward()
    for x, x_oracle in zip(xs, xs_oracle, strict=True):
        torch.testing.assert_close(x.grad, x_oracle.grad, atol=ATOL, rtol=0)
    expected = [skew.grad for skew in skews if skew is not None]
    for rotation, gradient in zip(live, expected, strict=True):
        torch.testing.assert_close(rotation.skew.grad, gradient, atol=ATOL, rtol=0)


@pytest.mark.parametrize("compute", ["input", "weight"])
def test_outside_a_step_every_pass_is_on_its_own(compute, monkeypatch):
    case = CASES["fs"]
    matrix, weight = build(case, compute=compute)
    xs, grads = micro_batches(case, 2)
    with cached_factors([matrix], 1):
        matrix(xs[0]).backward(grads[0])
    matrix.zero_grad()
    for rotation in (matrix.rotation_in, matrix.rotation_out):
        rotation.skew.data.mul_(-0.5)  # a factor kept from the step would be out of date
    calls = count_maps(monkeypatch)
    for x, grad in zip(xs, grads, strict=True):
        matrix(x).backward(grad)
    assert calls == {"increment": 4, "increment_grad": 4}
    skews = oracle_inputs(matrix)
    effective = dense_effective_weight(case, weight, skews)
    sum(((x.detach() @ effective) * grad).sum() for x, grad in zip(xs, grads, strict=True)).backward()
    for skew, expected in zip(skews_of(matrix), skews, strict=True):
        torch.testing.assert_close(skew.grad, expected.grad, atol=ATOL, rtol=0)


@pytest.mark.parametrize("compute", ["input", "weight"])
def test_more_forward_passes_than_announced_are_an_error(compute):
    case = CASES["fs"]
    matrix, _ = build(case, compute=compute)
    (x,), (grad,) = micro_batches(case, 1)
    for announced in (0, 2):
        with cached_factors([matrix], announced):
            for _ in range(announced):
                matrix(x)
            with torch.no_grad():
                matrix(x)
            with pytest.raises(RuntimeError, match="more forward passes"):
                matrix(x)
    matrix(x).backward(grad)  # the error leaves the layer usable
    assert matrix.rotation_in.skew.grad is not None


def test_evaluation_computes_the_factors_once(monkeypatch):
    matrix, _ = build(CASES["bs"])
    (x, *_), _ = micro_batches(CASES["bs"], 1)
    calls = count_maps(monkeypatch)
    with cached_factors([matrix], 0), torch.no_grad():
        outputs = [matrix(x) for _ in range(4)]
    assert calls == {"increment": 2, "increment_grad": 0}
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("compute", ["input", "weight"])
def test_bfloat16_layers_add_up_skew_gradients_in_float32(compute):
    """600 equal micro-batches: a bf16 sum stalls at 256 times its addend (8 bits), an fp32 sum does not."""
    case = CASES["fs-whole"]
    torch.manual_seed(0)
    config = PoetConfig(variant="fs", block_size=1.0, compute=compute)
    matrix = RotatedMatrix(case.width_in, case.width_out, config, IDENTITY, dtype=torch.bfloat16)
    matrix.load_canonical(torch.randn(case.width_out, case.width_in))
    x = torch.randn(4, case.width_in).bfloat16()
    grad = torch.randn(4, case.width_out).bfloat16()

    def gradients(count):
        matrix.zero_grad()
        with cached_factors([matrix], count):
            for _ in range(count):
                matrix(x).backward(grad)
        return [skew.grad.clone() for skew in skews_of(matrix)]

    for one, many in zip(gradients(1), gradients(600), strict=True):
        assert one.dtype == torch.float32  # the skews' own dtype
        # 600 fp32 additions: 600 eps = 7e-5 of the sum at most; the skews are zero, so the map's gradient is linear and exact.
        assert (many - 600 * one).norm() < 1e-4 * many.norm()


def test_factor_caches_are_found_once_each():
    frozen_in, _ = build(CASES["bs-frozen-in"])
    weight_centric, _ = build(CASES["fs"], compute="weight")
    model = torch.nn.ModuleList([frozen_in, PoetLinear(weight_centric, None)])
    caches = factor_caches(model)
    assert len({id(cache) for cache in caches}) == len(caches)
    needed = [frozen_in.rotation_out.factor_cache, weight_centric.effective.factor_cache]
    assert all(any(cache is found for found in caches) for cache in needed)

"""Initial weights as a pure function of (seed, layer, tensor): the same for every parallel layout, rank and restart.

normalized: each neuron (row of the Megatron weight) of a Gaussian matrix divided by its norm; standard: N(0, init_std); xavier:
N(0, 2 / (in + out)); uniform-spectrum: the polar factor of a Gaussian matrix, all singular values 1 (POET, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from poet_megatron.model.canonical import canonical_slots
from poet_megatron.model.config import ModelConfig
from poet_megatron.model.naming import MATRIX_IDS, MODEL_IDS, MODEL_LAYER
from poet_megatron.ops.philox import INITIALIZATION, StreamKey


def initialize(model: MegatronModule, config: ModelConfig, seed: int) -> None:
    """Fill every tensor of this rank's model in place."""
    for slot in canonical_slots(model, config):
        slot.write(initial_tensor(slot.name, slot.layer, slot.shape, config, seed, slot.part))


def initial_tensor(
    name: str, layer: int | None, shape: tuple[int, ...], config: ModelConfig, seed: int, part: tuple[slice, ...] | None = None
) -> Tensor:
    """Initial value, float32, of the tensor with canonical name `name`, or of a part of it (the same numbers).

    Args:
        name: canonical name.
        layer: global layer number, None outside the layers.
        shape: whole shape: [out, in], [vocab, hidden] or [hidden].
        config: gives the scheme.
        seed: run seed.
        part: a slice per dimension; everything by default.
    """
    part = part or tuple(slice(0, length) for length in shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf.endswith("norm"):
        return torch.ones(shape)[part]
    number = MODEL_IDS[leaf] if layer is None else MATRIX_IDS[leaf]
    key = StreamKey(seed, INITIALIZATION, MODEL_LAYER if layer is None else layer, number)
    if layer is not None and config.init == "uniform-spectrum":  # a row depends on all others
        return initial_weight(torch.from_numpy(key.normal_rows(0, *shape)), config.init, config.init_std)[part]
    rows, columns = part
    gaussian = torch.from_numpy(key.normal_rows(rows.start, rows.stop, shape[1]))
    if layer is None:
        return gaussian[:, columns] * config.init_std
    return initial_weight(gaussian, config.init, config.init_std, shape)[:, columns]


def initial_weight(gaussian: Tensor, scheme: str, std: float, shape: tuple[int, ...] | None = None) -> Tensor:
    """Turn a standard normal matrix [out, in] into the initial weight of a linear layer.

    Args:
        gaussian: standard normal draws; all rows, or (but for "uniform-spectrum") some of them.
        scheme: "normalized", "standard", "xavier" or "uniform-spectrum".
        std: standard deviation of "standard".
        shape: shape of the whole matrix; that of `gaussian` by default.
    """
    out_features, in_features = shape or gaussian.shape
    if scheme == "normalized":
        return gaussian / gaussian.norm(dim=1, keepdim=True)
    if scheme == "standard":
        return gaussian * std
    if scheme == "xavier":
        return gaussian * (2.0 / (in_features + out_features)) ** 0.5
    with _one_thread():
        return _polar(gaussian.double()).float()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, because the bits of an eigendecomposition depend on their number, and torchrun gives each rank one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _polar(matrix: Tensor) -> Tensor:
    """U V^T of matrix = U S V^T, through the smaller Gram matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        return _polar(matrix.T).T
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors * values.rsqrt()) @ vectors.T

"""Checks an installation against versions.env: versions, compiled ops, Apex's kernels, NCCL, InfiniBand, and a training step.

    python launch/containers/check.py [--json]

One line per check: `ok`, `FAIL` with what is missing and what to do, or `skip` with the reason. The exit status is 1 if anything failed.
Meant for the containers of this folder; anywhere else it says what differs from them.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

VERSIONS = Path(__file__).with_name("versions.env")
APEX_KERNELS = ("amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda")
OK, FAIL, SKIP = "ok", "FAIL", "skip"


class Result(NamedTuple):
    """Outcome of one check."""

    status: str
    name: str
    detail: str


def read_versions(path: Path = VERSIONS) -> dict[str, str]:
    """NAME=value lines, as a shell reads them."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))
    return {name: " ".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)}


def same(name: str, found: str | None, wanted: str, fix: str) -> Result:
    """Whether a version is the wanted one; "+..." at the end of the found one does not count."""
    if found is None:
        return Result(FAIL, name, f"missing; versions.env says {wanted}: {fix}")
    if found.partition("+")[0] != wanted:
        return Result(FAIL, name, f"{found}; versions.env says {wanted}: {fix}")
    return Result(OK, name, found)


def packages(versions: dict[str, str]) -> Iterator[Result]:
    """Versions of what is installed by pip."""
    for package, key in (("torch", "TORCH_VERSION"), ("megatron-core", "MEGATRON_CORE_VERSION"), ("deepspeed", "DEEPSPEED_VERSION")):
        yield same(package, _installed(package), versions[key], "install.sh installs it")
    yield same("poet-megatron", _installed("poet-megatron"), _own_version(), "install.sh installs it")


def cuda(versions: dict[str, str]) -> Iterator[Result]:
    """CUDA and NCCL that torch was built for."""
    import torch

    yield same("CUDA of torch", torch.version.cuda or "none, a CPU build", versions["CUDA_VERSION"], "take the base image named there")
    if not torch.distributed.is_nccl_available():
        yield Result(FAIL, "NCCL", "torch was built without it: ranks on GPUs cannot communicate; take a CUDA build of torch")
    else:
        found = ".".join(map(str, torch.cuda.nccl.version()))
        wanted = versions["NCCL_VERSION"]
        yield same("NCCL", found, wanted, "another package brought its own") if wanted else Result(OK, "NCCL", found)


def apex(versions: dict[str, str]) -> Iterator[Result]:
    """Apex by its compiled modules: a package named apex says nothing."""
    for module in APEX_KERNELS:
        there = importlib.util.find_spec(module) is not None
        if there or versions["APEX_REF"]:
            detail = "found" if there else f"missing; see the build of Apex {versions['APEX_REF']} in install.sh's output, or set APEX_REF="
            yield Result(OK if there else FAIL, f"Apex, {module}", detail)
        else:
            yield Result(SKIP, f"Apex, {module}", "APEX_REF is empty")


def ops(versions: dict[str, str]) -> Iterator[Result]:
    """The compiled ops of poet_megatron, loaded."""
    from poet_megatron.ops import native

    for device in native.LIBRARIES:
        status = native.load(device)
        yield Result(OK if status.available else FAIL, f"compiled ops, {device}", status.why + (f": {status.fix}" if status.fix else ""))


def infiniband(versions: dict[str, str]) -> Iterator[Result]:
    """The library by which NCCL reaches InfiniBand."""
    found = ctypes.util.find_library("ibverbs")
    yield (
        Result(OK, "InfiniBand library", found)
        if found
        else Result(FAIL, "InfiniBand library", "no libibverbs: NCCL would use TCP; install rdma-core")
    )


def training_step(versions: dict[str, str]) -> Iterator[Result]:
    """A rotated layer forward and backward: the same function as the dense one, and gradients."""
    import torch

    yield _step(torch.device("cpu"))
    if torch.cuda.is_available():
        yield Result(OK, "GPU", ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))
        yield _step(torch.device("cuda"))
    else:
        yield Result(SKIP, "GPU", "none is visible: start the container with --gpus all (Docker) or --nv (Apptainer) on a GPU host")


CHECKS: tuple[Callable[[dict[str, str]], Iterator[Result]], ...] = (packages, cuda, apex, ops, infiniband, training_step)


def run_checks(versions: dict[str, str]) -> list[Result]:
    """All results; a check that raises is a failure with its error."""
    results = []
    for check in CHECKS:
        try:
            results += list(check(versions))
        except Exception as error:  # noqa: BLE001 - a broken installation may raise anything, and the other checks still tell something
            results.append(Result(FAIL, check.__name__.replace("_", " "), f"{type(error).__name__}: {error}"))
    return results


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    from poet_megatron import __version__

    return __version__


def _step(device: Any) -> Result:
    import torch

    from poet_megatron.layers.config import PoetConfig
    from poet_megatron.layers.linear import PoetLinear

    torch.manual_seed(0)
    dense = torch.nn.Linear(96, 64, bias=True).to(device)
    layer = PoetLinear.from_linear(dense, PoetConfig(block_size=32))
    x = torch.randn(8, 96, device=device)
    error = (layer(x) - dense(x)).abs().max().item()
    layer(x).square().mean().backward()
    gradients = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
    finite = all(gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)
    good = error < 1e-4 and finite and len(gradients) >= 2  # fp32 sums of 96 products in another order
    return Result(
        OK if good else FAIL, f"training step, {device}", f"differs from the dense layer by {error:.1e}, {len(gradients)} gradients"
    )


def main() -> int:
    """Print the results; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    args = parser.parse_args()
    results = run_checks(read_versions())
    failed = sum(result.status == FAIL for result in results)
    if args.json:
        print(json.dumps([result._asdict() for result in results]))
    else:
        width = max(len(result.name) for result in results)
        for result in results:
            print(f"{result.status:<5} {result.name:<{width}}  {result.detail}")
        print(f"{len(results)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

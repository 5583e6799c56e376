"""Gates on what ptxas makes of the kernels: no spills, no local memory, the stated thread blocks per SM, tensor cores where expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cuda_static
from benchmarks.cuda_compile import LIMITS, blocks_per_sm, compile_kernels, find_disassembler, gate, sources
from benchmarks.cuda_toolchain import CUDA, MissingToolError, find_nvcc, find_ptxsim, prototypes


@pytest.fixture
def nvcc() -> str:
    try:
        return find_nvcc()
    except MissingToolError as missing:
        pytest.skip(str(missing))


needs_nvcc = pytest.mark.usefixtures("nvcc")
ARCHITECTURES = [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_gate(source: Path, arch: int) -> None:
    kernels = compile_kernels(source, arch)
    assert kernels
    assert {kernel.name: gate(kernel) for kernel in kernels if gate(kernel)} == {}


@needs_nvcc
def test_gate_finds_spills() -> None:
    """16 thread blocks per SM leave the tiled product 32 registers."""
    spilled = {k.name: k for k in compile_kernels(CUDA / "cayley.cu", 90, ("-DPOET_FAULT_SPILL",)) if k.name.startswith("series_product")}
    assert len(spilled) == 2
    for kernel in spilled.values():
        assert kernel.spills > 0 and kernel.stack > 0
        assert any("spills" in finding for finding in gate(kernel))


@needs_nvcc
def test_gate_finds_missing_tensor_cores_and_shared_memory(tmp_path: Path) -> None:
    """A kernel that bears the name of one with tensor cores, and takes more shared memory than two blocks have."""
    source = tmp_path / "named.cu"
    source.write_text(
        "__global__ void __launch_bounds__(128, 8) series_product(float* x) {"
        " __shared__ float a[12000]; a[threadIdx.x] = x[0]; __syncthreads(); x[threadIdx.x] = a[127 - threadIdx.x]; }"
    )
    (kernel,) = compile_kernels(source, 90)
    findings = gate(kernel)
    assert any("4 thread blocks fit on an SM, meant for 8" in finding for finding in findings)
    assert any("0 tensor-core instructions" in finding for finding in findings) or find_disassembler() is None


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (80, 128, 32, 0, 16),  # 64 warps
        (80, 128, 33, 0, 12),  # 40 registers x 32 lanes: 51 warps, 48 on the four partitions
        (80, 256, 64, 0, 4),
        (80, 256, 65, 0, 3),
        (80, 32, 16, 0, 32),  # block slots
        (80, 128, 32, 163 * 1024, 1),
        (80, 128, 32, 48 * 1024, 3),  # 49 KiB each of 164
        (90, 128, 32, 48 * 1024, 4),  # of 228
        (90, 1024, 64, 0, 1),
    ],
)
def test_occupancy(arch: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    """By hand from the rules of NVIDIA's occupancy calculator."""
    assert blocks_per_sm(LIMITS[arch], threads, registers, shared) == blocks


def test_every_launcher_of_the_header_is_defined() -> None:
    text = "".join(path.read_text() for path in sources())
    for _, name, _ in prototypes():
        assert f" {name}(" in text


def test_table_goes_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(f"# Kernels\n{cuda_static.BEGIN}\nold\n{cuda_static.END}\nmore\n")
    assert cuda_static.write_table("new", page) == page
    assert page.read_text() == f"# Kernels\n{cuda_static.BEGIN}\nnew\n{cuda_static.END}\nmore\n"


@needs_nvcc
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        find_ptxsim()
    except MissingToolError as missing:
        pytest.skip(str(missing))
    assert cuda_static.main(["--json", "--arch", "90", "--only", "skew"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert {kernel["name"] for kernel in numbers["kernels"]} == {"skew_unpack_kernel", "skew_pack_grad_kernel"}
    assert all(entry["load_efficiency"] > 0.95 and entry["moved_over_compulsory"] < 1.3 for entry in numbers["traffic"])

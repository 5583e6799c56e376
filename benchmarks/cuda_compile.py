"""What the compiler says about the kernels of csrc/cuda: registers, shared memory, spills, tensor-core instructions, occupancy.

Threads and the thread blocks per SM that a kernel is meant to have come from its `__launch_bounds__`; dynamic shared memory from `DYNAMIC`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.cuda_toolchain import CUDA, INCLUDE, find_nvcc

ARCHITECTURES = (80, 90, 100)

# Dynamic shared memory in bytes by kernel: a function of the template arguments, or a C++ constant of a header with {0} for the first of
# them. Where it depends on the shape: 2,048 columns (permute_columns), blocks of 256 (merge_rows).
DYNAMIC: dict[str, Callable[[list[str]], int] | tuple[str, str]] = {
    "series_increment_shared": lambda of: 3 * int(of[0]) ** 2 * 4,
    "series_grad_shared": lambda of: 4 * int(of[0]) ** 2 * 4,
    "block_product_bf16": ("block_product_bf16.cuh", "ProductTile<{0}>::SHARED_BYTES"),
    "block_product_f32": ("block_product_f32.cuh", "ProductTileF32<{0}>::SHARED_BYTES"),
    "block_product_general": ("block_product_general.cuh", "2 * kTile * kTile * sizeof({0})"),
    "block_product_grad_bf16": ("block_product_grad.cuh", "GradTile<{0}>::SHARED_BYTES"),
    "block_product_grad_f32": ("block_product_grad.cuh", "GradTileF32<{0}>::SHARED_BYTES"),
    "block_product_grad_general": ("block_product_grad.cuh", "2 * kTile * kTile * sizeof({0})"),
    "merge_rows": lambda of: (16 * 64 + 256 * int(of[0])) * 4,
    "permute_columns": lambda of: 2048 * int(of[1]) * 4,
}

# Kernels that must use tensor cores; the others must not.
TENSOR_CORES = re.compile(
    r"series_(increment_shared|grad_shared|product)\b|block_product(_grad)?_bf16\b|block_product(_grad)?_general<bf16>"
)


# Thread blocks per SM where an architecture allows fewer than `__launch_bounds__` asks for: two of 96 KiB do not fit into sm_80's 164.
FEWER_BLOCKS = {("block_product_f32<128>", 80): 1}


@dataclass(frozen=True)
class Limits:
    """Of one SM. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

    Attributes:
        warps: resident.
        blocks: resident.
        registers: 32-bit, handed out to warps in units of 256.
        shared: bytes, handed out to blocks in units of 128 after 1,024 of the system's own.
    """

    warps: int
    blocks: int
    registers: int
    shared: int


LIMITS = {
    80: Limits(warps=64, blocks=32, registers=65536, shared=164 * 1024),
    90: Limits(warps=64, blocks=32, registers=65536, shared=228 * 1024),
    100: Limits(warps=64, blocks=32, registers=65536, shared=228 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture.

    Attributes:
        name: with template arguments, without namespace and parameters.
        source: file name.
        arch: 80, 90 or 100.
        threads: per block, from `__launch_bounds__`.
        intended_blocks: per SM, from `__launch_bounds__`; None if it does not say.
        registers: per thread.
        static_shared: bytes.
        dynamic_shared: bytes.
        spills: bytes of register spill stores and loads.
        stack: bytes of local memory per thread.
        hmma: tensor-core instructions in the machine code; None without a disassembler.
        local_accesses: local loads and stores in the machine code; None without a disassembler.
    """

    name: str
    source: str
    arch: int
    threads: int
    intended_blocks: int | None
    registers: int
    static_shared: int
    dynamic_shared: int
    spills: int
    stack: int
    hmma: int | None
    local_accesses: int | None

    @property
    def base_name(self) -> str:
        """Without template arguments."""
        return self.name.partition("<")[0]

    @property
    def blocks_per_sm(self) -> int:
        """Thread blocks of this kernel that fit on an SM."""
        return blocks_per_sm(LIMITS[self.arch], self.threads, self.registers, self.static_shared + self.dynamic_shared)

    @property
    def occupancy(self) -> float:
        """Resident warps over the most that an SM holds."""
        return self.blocks_per_sm * -(-self.threads // 32) / LIMITS[self.arch].warps

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "blocks_per_sm": self.blocks_per_sm, "occupancy": self.occupancy}


def gate(kernel: Kernel) -> list[str]:
    """What is wrong with a compiled kernel.

    Spills, local memory, fewer thread blocks per SM than it states (2 if it does not), tensor cores missing or unexpected.
    """
    wrong = []
    if kernel.spills or kernel.stack or kernel.local_accesses:
        wrong.append(f"{kernel.spills} bytes of spills, {kernel.stack} of local memory, {kernel.local_accesses} local accesses")
    stated = FEWER_BLOCKS.get((kernel.name, kernel.arch), kernel.intended_blocks or 2)
    if kernel.blocks_per_sm < stated:
        wrong.append(f"{kernel.blocks_per_sm} thread blocks fit on an SM, meant for {stated}")
    if kernel.hmma is not None and bool(kernel.hmma) != bool(TENSOR_CORES.match(kernel.name)):
        wrong.append(f"{kernel.hmma} tensor-core instructions")
    return wrong


def blocks_per_sm(limits: Limits, threads: int, registers: int, shared: int) -> int:
    """Thread blocks that fit on an SM: the least of what its warps, registers, shared memory and block slots allow."""
    warps = -(-threads // 32)
    by_warps = limits.warps // warps
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // 4 // per_warp * 4 // warps  # warps live on four partitions with a quarter of the registers each
    by_shared = limits.shared // (-(-(shared + 1024) // 128) * 128)
    return min(limits.blocks, by_warps, by_registers, by_shared)


def sources() -> list[Path]:
    """The .cu files."""
    return sorted(CUDA.glob("*.cu"))


def find_disassembler() -> tuple[str, str] | None:
    """(cuobjdump, nvdisasm) on PATH or of the PyPI packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm; None without them."""
    found = []
    for name in ("cuobjdump", "nvdisasm"):
        packages = (str(path) for entry in sys.path for path in sorted(Path(entry or ".").glob(f"nvidia/cu*/bin/{name}")))
        found.append(shutil.which(name) or next(packages, None))
    return (found[0], found[1]) if found[0] and found[1] else None


def compile_kernels(source: Path, arch: int, flags: tuple[str, ...] = (), dynamic: bool = True) -> list[Kernel]:
    """Compile one file and describe its kernels.

    Args:
        source: .cu file.
        arch: compute capability times 10.
        flags: further arguments of nvcc.
        dynamic: look up dynamic shared memory; False takes 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [find_nvcc(), "-std=c++17", "-O3", "-Xptxas", "-v", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "--keep"]
        command += ["--keep-dir", folder, f"-I{INCLUDE}", f"-I{CUDA}", *flags, "-o", f"{folder}/out.cubin", str(source)]
        log = _run(command)
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
        sass = _machine_code(Path(folder) / "out.cubin")
    usage, bounds = _usage(log), _launch_bounds(ptx)
    names = [short_name(pretty) for pretty in _demangle(list(usage))]
    dynamic_shared = _dynamic(names) if dynamic else dict.fromkeys(names, 0)
    kernels = []
    for mangled, name in zip(usage, names, strict=True):
        threads, intended = bounds[mangled]
        code = sass.get(mangled) if sass is not None else None
        kernels.append(
            Kernel(
                name=name,
                source=source.name,
                arch=arch,
                threads=threads,
                intended_blocks=intended,
                dynamic_shared=dynamic_shared[name],
                hmma=None if code is None else len(re.findall(r"\bHMMA\b", code)),
                local_accesses=None if code is None else len(re.findall(r"\b(?:LDL|STL)\b", code)),
                **usage[mangled],
            )
        )
    return sorted(kernels, key=lambda kernel: _natural(kernel.name))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def _usage(log: str) -> dict[str, dict[str, int]]:
    """ptxas -v by mangled name."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {key: _number(pattern, part) for key, pattern in _PTXAS.items()}
        stores, loads = numbers.pop("spill_stores"), numbers.pop("spill_loads")
        found[part.partition("'")[0]] = {**numbers, "spills": stores + loads}
    return found


_PTXAS = {
    "registers": r"Used (\d+) registers",
    "static_shared": r"(\d+) bytes smem",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _launch_bounds(ptx: str) -> dict[str, tuple[int, int | None]]:
    """(threads, thread blocks per SM) by mangled name; 1,024 threads where nothing is stated."""
    found: dict[str, tuple[int, int | None]] = {}
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        head = part.partition("{")[0]
        threads, blocks = re.search(r"\.maxntid\s+(\d+)", head), re.search(r"\.minnctapersm\s+(\d+)", head)
        found[re.split(r"[\s(]", head, maxsplit=1)[0]] = (int(threads[1]) if threads else 1024, int(blocks[1]) if blocks else None)
    return found


def _machine_code(cubin: Path) -> dict[str, str] | None:
    tools = find_disassembler()
    if tools is None:
        return None
    cuobjdump, nvdisasm = tools
    listing = _run(["env", f"PATH={Path(nvdisasm).parent}:/usr/bin:/bin", cuobjdump, "-sass", str(cubin)])
    parts = re.split(r"\n\s*Function : (\S+)", listing)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    return subprocess.run([tool, *names], check=True, capture_output=True, text=True).stdout.splitlines()


def short_name(pretty: str) -> str:
    """Name and template arguments of a demangled signature."""
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::|\bpoet::", "", pretty).removeprefix("void ")
    return text.partition("(")[0].replace("unsigned ", "u").replace("__nv_bfloat16", "bf16")


def _dynamic(names: list[str]) -> dict[str, int]:
    """Dynamic shared memory by kernel name."""
    found, constants = {}, {}
    for name in names:
        base, _, rest = name.partition("<")
        arguments = [part.strip() for part in rest.rstrip(">").split(",")]
        rule = DYNAMIC.get(base, lambda of: 0)
        if callable(rule):
            found[name] = rule(arguments)
        else:
            constants[name] = (rule[0], rule[1].format(*arguments))
    return found | dict(zip(constants, _constants(tuple(constants.values())), strict=True))


@cache
def _constants(wanted: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
    """Values of C++ constant expressions (header, expression) in namespace poet, read from compiled PTX."""
    if not wanted:
        return ()
    lines = [f'#include "{header}"' for header in dict(wanted)] + ["using namespace poet;"]
    lines += [f'extern "C" __device__ long long probe_{i} = {expression};' for i, (_, expression) in enumerate(wanted)]
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "probe.cu", Path(folder) / "probe.ptx"
        source.write_text("\n".join(lines) + "\n")
        _run([find_nvcc(), "-std=c++17", "-arch=compute_80", "-ptx", f"-I{INCLUDE}", f"-I{CUDA}", "-o", str(ptx), str(source)])
        values = dict(re.findall(r"\bprobe_(\d+) = (\d+)", ptx.read_text()))
    return tuple(int(values[str(i)]) for i in range(len(wanted)))

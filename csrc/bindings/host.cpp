/* poet_megatron._host: what is known on the host without torch: the instruction set in use and how this copy was built. */
#include <pybind11/pybind11.h>

#include <string>

#include "poet_cpu.h"

namespace py = pybind11;

extern const char poet_build_info[]; /* JSON, written by the build: build_support/command.py */

namespace {

const char* cpu_isa() {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "amx"};
  const int isa = poet_cpu_isa();
  return isa >= 0 && isa < 4 ? names[isa] : "unknown";
}

/* What the processor offers of what the kernels can use; cpu_isa() also asks the operating system and POET_CPU_ISA. */
py::dict cpu_features() {
  py::dict found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  found["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  found["fma"] = static_cast<bool>(__builtin_cpu_supports("fma"));
  found["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  found["avx512bw"] = static_cast<bool>(__builtin_cpu_supports("avx512bw"));
  found["avx512vl"] = static_cast<bool>(__builtin_cpu_supports("avx512vl"));
  found["avx512dq"] = static_cast<bool>(__builtin_cpu_supports("avx512dq"));
  found["avx512_bf16"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  found["amx_tile"] = static_cast<bool>(d >> 24 & 1);
  found["amx_bf16"] = static_cast<bool>(d >> 22 & 1);
#endif
  return found;
}

py::object build_info() { return py::module_::import("json").attr("loads")(static_cast<const char*>(poet_build_info)); }

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side native pieces of poet_megatron; needs no torch.";
  m.def("cpu_isa", &cpu_isa, "Instruction set of the CPU kernels: portable, avx2, avx512 or amx.");
  m.def("cpu_features", &cpu_features, "Processor features that the kernels look for, as a dict of booleans.");
  m.def("build_info", &build_info, "How this copy was built: compiler, flags, torch, pybind11, and per part \"built\" or why not.");
}

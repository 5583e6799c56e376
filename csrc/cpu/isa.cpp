#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "poet_cpu.h"

namespace poet {
namespace {

#if defined(__x86_64__)
bool amx_permitted() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_tiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_tiledata) == 0; /* Linux hands out tile state on request only */
#else
  return false;
#endif
}

Isa best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::avx2;
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tiles = (d >> 24 & 1) && (d >> 22 & 1); /* AMX-TILE, AMX-BF16 */
  return tiles && __builtin_cpu_supports("avx512bf16") && amx_permitted() ? Isa::amx : Isa::avx512;
}
#else
Isa best_isa() { return Isa::portable; }
#endif

Isa capped(Isa best) {
  const char* cap = std::getenv("POET_CPU_ISA");
  if (cap == nullptr) return best;
  constexpr const char* names[] = {"portable", "avx2", "avx512", "amx"};
  for (int i = 0; i < 4; ++i)
    if (std::strcmp(cap, names[i]) == 0 && i < static_cast<int>(best)) return static_cast<Isa>(i);
  return best;
}

}  // namespace

Isa current_isa() {
  static const Isa isa = capped(best_isa());
  return isa;
}

}  // namespace poet

int poet_cpu_isa(void) { return static_cast<int>(poet::current_isa()); }

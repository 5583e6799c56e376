/* Which instruction set the kernels use, decided at run time. */
#pragma once

namespace poet {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

/* The best set this processor and kernel offer, capped by POET_CPU_ISA; constant after the first call. */
Isa current_isa();

}  // namespace poet

/* The pieces that differ between instruction sets. Drivers (permuted_product.cpp, ...) are written once on top of them. */
#pragma once

#include <cstdint>

#include "isa.h"

namespace poet {

using bf16 = std::uint16_t; /* bit pattern; round to nearest even */

/* C[m x n] = init + A[m x k] B[k x n].
 *   a: element (i, p) at a[i * a_row + p * a_col]
 *   b: packed panels of Kernels::panel columns, see pack_f32
 *   init: [m x n] with stride ld_init, or nullptr for zero; may be c itself
 * Every element is summed over p in order, whatever its place in a tile. */
struct GemmF32 {
  std::int64_t m, n, k;
  const float* a;
  std::int64_t a_row, a_col;
  const float* b;
  const float* init;
  std::int64_t ld_init;
  float* c;
  std::int64_t ldc;
};

struct Kernels {
  /* fp32 products */
  std::int64_t panel; /* columns per packed panel */
  void (*pack_f32)(const float* b, std::int64_t row, std::int64_t col, std::int64_t k, std::int64_t n, float* packed);
  void (*gemm_f32)(const GemmF32& args);

  /* out[i] = in[order[i]], or in[i] if order is nullptr; conversions round to nearest even */
  void (*move_f32)(const float* in, const std::int32_t* order, float* out, std::int64_t n);
  void (*move_bf16)(const bf16* in, const std::int32_t* order, bf16* out, std::int64_t n);
  void (*widen)(const bf16* in, const std::int32_t* order, float* out, std::int64_t n);
  void (*narrow)(const float* in, const std::int32_t* order, bf16* out, std::int64_t n);
};

/* Packed size in elements of a [k x n] operand. */
inline std::int64_t packed_size(const Kernels& kernels, std::int64_t k, std::int64_t n) {
  return (n + kernels.panel - 1) / kernels.panel * kernels.panel * k;
}

/* Asks for memory that is needed soon and that the hardware does not foresee. */
template <class Element>
inline void fetch(const Element* piece, std::int64_t elements) {
  constexpr std::int64_t line = 64 / sizeof(Element);
  for (std::int64_t i = 0; i < elements; i += line) __builtin_prefetch(piece + i);
}

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

inline const Kernels& current_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::amx:
    case Isa::avx512: return avx512_kernels;
    case Isa::avx2: return avx2_kernels;
    case Isa::portable: break;
  }
#endif
  return portable_kernels;
}

}  // namespace poet

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2")

namespace poet {
namespace avx512 {
namespace {

struct Vec {
  static constexpr int width = 16;
  using T = __m512;
  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T value) { _mm512_storeu_ps(p, value); }
  static T set(float value) { return _mm512_set1_ps(value); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T zero() { return _mm512_setzero_ps(); }
  static T gather(const float* p, const std::int32_t* order) { return _mm512_i32gather_ps(_mm512_loadu_si512(order), p, 4); }
};

constexpr int tile_rows = 12; /* 24 sums, 2 of B and 1 broadcast of 32 registers */

#include "kernels_body.inl"

}  // namespace
}  // namespace avx512

const Kernels avx512_kernels = avx512::table;

}  // namespace poet

#pragma GCC pop_options
#endif

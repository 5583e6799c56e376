#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")

namespace poet {
namespace avx2 {
namespace {

struct Vec {
  static constexpr int width = 8;
  using T = __m256;
  static T load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, T value) { _mm256_storeu_ps(p, value); }
  static T set(float value) { return _mm256_set1_ps(value); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static T zero() { return _mm256_setzero_ps(); }
  static T gather(const float* p, const std::int32_t* order) {
    return _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order)), 4);
  }
};

constexpr int tile_rows = 6; /* 12 sums, 2 of B and 1 broadcast of 16 registers */

#include "kernels_body.inl"

}  // namespace
}  // namespace avx2

const Kernels avx2_kernels = avx2::table;

}  // namespace poet

#pragma GCC pop_options
#endif

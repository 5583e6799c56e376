#if defined(__x86_64__)
#include <immintrin.h>

#include "gather.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2")

namespace poet {
namespace {

constexpr std::int64_t group = 32; /* elements of a row in one vector */

/* Unpacking works within 128-bit lanes: of 32 interleaved elements, element 8 lane + 2 k + h lands in unit 8 k + 2 lane + h. */
inline std::int32_t unit_of(std::int32_t element) {
  const std::int32_t e = element % 32;
  return element - e + (e % 8) / 2 * 8 + e / 8 * 2 + e % 2;
}

inline __mmask32 tail_mask(std::int64_t left) { return left >= group ? ~__mmask32{0} : (__mmask32{1} << left) - 1; }

void interleave(const bf16* in, std::int64_t ld, std::int64_t n, bf16* units) {
  for (std::int64_t i = 0; i < n; i += group, units += 4 * group) {
    const __mmask32 mask = tail_mask(n - i);
    const __m512i r0 = _mm512_maskz_loadu_epi16(mask, in + i), r1 = _mm512_maskz_loadu_epi16(mask, in + ld + i);
    const __m512i r2 = _mm512_maskz_loadu_epi16(mask, in + 2 * ld + i), r3 = _mm512_maskz_loadu_epi16(mask, in + 3 * ld + i);
    const __m512i low01 = _mm512_unpacklo_epi16(r0, r1), high01 = _mm512_unpackhi_epi16(r0, r1);
    const __m512i low23 = _mm512_unpacklo_epi16(r2, r3), high23 = _mm512_unpackhi_epi16(r2, r3);
    _mm512_storeu_si512(units, _mm512_unpacklo_epi32(low01, low23));
    _mm512_storeu_si512(units + group, _mm512_unpackhi_epi32(low01, low23));
    _mm512_storeu_si512(units + 2 * group, _mm512_unpacklo_epi32(high01, high23));
    _mm512_storeu_si512(units + 3 * group, _mm512_unpackhi_epi32(high01, high23));
  }
}

inline __m512i dwords(__m512i a, __m512i b, bool odd) {
  const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
  return _mm512_castps_si512(odd ? _mm512_shuffle_ps(x, y, 0xdd) : _mm512_shuffle_ps(x, y, 0x88));
}

inline __m512i even_words(__m512i low, __m512i high) {
  const __m512i mask = _mm512_set1_epi32(0xffff);
  return _mm512_packus_epi32(_mm512_and_si512(low, mask), _mm512_and_si512(high, mask));
}

inline __m512i odd_words(__m512i low, __m512i high) {
  return _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
}

}  // namespace

void plan_gather(const std::int32_t* order, std::int64_t n, std::int32_t* plan) {
  for (std::int64_t i = 0; i < gather_plan_size(n); ++i) plan[unit_of(static_cast<std::int32_t>(i))] = i < n ? unit_of(order[i]) : 0;
}

void gather_four(const bf16* in, std::int64_t ld_in, const std::int32_t* plan, bf16* out, std::int64_t ld_out, std::int64_t n, bf16* buffer) {
  interleave(in, ld_in, n, buffer);
  for (std::int64_t i = 0; i < n; i += group) {
    __m512i unit[4];
    for (int k = 0; k < 4; ++k)
      unit[k] = _mm512_i32gather_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plan + i + 8 * k)), buffer, 8);
    const __m512i low01 = dwords(unit[0], unit[1], false), low23 = dwords(unit[0], unit[1], true);
    const __m512i high01 = dwords(unit[2], unit[3], false), high23 = dwords(unit[2], unit[3], true);
    const __mmask32 mask = tail_mask(n - i);
    _mm512_mask_storeu_epi16(out + i, mask, even_words(low01, high01));
    _mm512_mask_storeu_epi16(out + ld_out + i, mask, odd_words(low01, high01));
    _mm512_mask_storeu_epi16(out + 2 * ld_out + i, mask, even_words(low23, high23));
    _mm512_mask_storeu_epi16(out + 3 * ld_out + i, mask, odd_words(low23, high23));
  }
}

}  // namespace poet
#pragma GCC pop_options
#endif

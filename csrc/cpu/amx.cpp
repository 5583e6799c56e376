#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "amx.h"

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2")

namespace poet::amx {
namespace {

struct alignas(64) Config {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {tile, tile, tile, tile, tile, tile, tile, tile};
};

/* Adds one 16-column half of a row of fp32 sums to bf16 and rounds. */
inline __m256i add_round(const float* sums, __m256i init) {
  const __m512 base = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(init), 16));
  return (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_load_ps(sums), base));
}

inline void store_rows(std::int64_t rows, std::int64_t columns, const float* sums, const bf16* init, std::int64_t ld_init, bf16* c,
                       std::int64_t ldc) {
  for (std::int64_t half = 0; half < columns; half += tile) {
    const std::int64_t left = std::min(columns - half, tile);
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    for (std::int64_t r = 0; r < rows; ++r) {
      const __m256i value = add_round(sums + r * pair + half, _mm256_maskz_loadu_epi16(mask, init + r * ld_init + half));
      _mm256_mask_storeu_epi16(c + r * ldc + half, mask, value);
    }
  }
}

/* A transposed 16 x 16 matrix of 32-bit words; row i of the input is in `row[i]`. */
inline void transpose(__m512i row[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    row[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    row[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

/* Rows 2i and 2i+1 interleaved: word j holds (x[2i][j], x[2i+1][j]). */
inline __m512i interleave(const bf16* x, std::int64_t ldx, int i) {
  const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * i * ldx)));
  const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (2 * i + 1) * ldx)));
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

/* A B tile from its transpose: column c of the tile is at b[c * ldb]. */
inline void pack_columns(const bf16* b, std::int64_t ldb, bf16* out) {
  __m512i words[16];
  for (int c = 0; c < 16; ++c) words[c] = _mm512_loadu_si512(b + c * ldb);
  transpose(words);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * depth, words[i]);
}

void configure() {
  /* A constant: GCC 12 takes the instruction to read 8 of the 64 bytes, and would drop stores to the others. */
  static const Config config;
  _tile_loadconfig(&config);
}

void release() { _tile_release(); }

}  // namespace

Session::Session() { configure(); } /* GCC compiles constructors for the target of the header */
Session::~Session() { release(); }

/* Tiles that are whole and contiguous along a row or a column go through vectors, the others element by element. */
void pack(const bf16* b, std::int64_t row, std::int64_t col, std::int64_t k, std::int64_t n, bf16* packed) {
  const std::int64_t steps = round_up(k, depth) / depth;
  for (std::int64_t j = 0; j < round_up(n, pair); j += tile)
    for (std::int64_t p = 0; p < k; p += depth) {
      bf16* out = packed + (j / tile * steps + p / depth) * elements;
      const bf16* source = b + p * row + j * col;
      const bool whole = p + depth <= k && j + tile <= n;
      if (whole && col == 1) {
        pack_right(source, row, out);
      } else if (whole && row == 1) {
        pack_columns(source, col, out);
      } else {
        for (std::int64_t q = 0; q < depth; ++q)
          for (std::int64_t c = 0; c < tile; ++c)
            out[q / 2 * depth + 2 * c + q % 2] = p + q < k && j + c < n ? source[q * row + c * col] : bf16{0};
      }
    }
}

void gemm(std::int64_t m, std::int64_t n, std::int64_t k, const bf16* a, std::int64_t lda, const bf16* packed, const bf16* init,
          std::int64_t ld_init, bf16* c, std::int64_t ldc) {
  alignas(64) float sums[pair * pair];
  const std::int64_t steps = round_up(k, depth) / depth;
  const std::int64_t stride = lda * static_cast<std::int64_t>(sizeof(bf16));
  for (std::int64_t j = 0; j < n; j += pair) {
    const bf16* b = packed + j / tile * steps * elements;
    for (std::int64_t i = 0; i < m; i += pair) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (std::int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, a + i * lda + step * depth, stride);
        _tile_loadd(6, b + step * elements, 64);
        _tile_loadd(7, b + (steps + step) * elements, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + (i + tile) * lda + step * depth, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, pair * sizeof(float));
      _tile_stored(1, sums + tile, pair * sizeof(float));
      _tile_stored(2, sums + tile * pair, pair * sizeof(float));
      _tile_stored(3, sums + tile * pair + tile, pair * sizeof(float));
      store_rows(std::min(m - i, pair), std::min(n - j, pair), sums, init + i * ld_init + j, ld_init, c + i * ldc + j, ldc);
    }
  }
}

void pack_left(const bf16* x, std::int64_t ldx, bf16* left) {
  __m512i words[16];
  for (int i = 0; i < 16; ++i) words[i] = interleave(x, ldx, i);
  transpose(words);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(left + i * depth, words[i]);
}

void pack_right(const bf16* g, std::int64_t ldg, bf16* right) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(right + i * depth, interleave(g, ldg, i));
}

void gemm_grad(std::int64_t m, std::int64_t n, std::int64_t groups, const bf16* left, const bf16* right, std::int64_t tile_stride,
               bool accumulate, float* c, std::int64_t ldc) {
  alignas(64) float sums[pair * pair];
  for (std::int64_t j = 0; j < n; j += pair) {
    const bf16* b = right + j / tile * tile_stride;
    for (std::int64_t i = 0; i < m; i += pair) {
      const bf16* a = left + i / tile * tile_stride;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (std::int64_t group = 0; group < groups; ++group) {
        _tile_loadd(4, a + group * elements, 64);
        _tile_loadd(6, b + group * elements, 64);
        _tile_loadd(7, b + tile_stride + group * elements, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + tile_stride + group * elements, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, pair * sizeof(float));
      _tile_stored(1, sums + tile, pair * sizeof(float));
      _tile_stored(2, sums + tile * pair, pair * sizeof(float));
      _tile_stored(3, sums + tile * pair + tile, pair * sizeof(float));
      const std::int64_t rows = std::min(m - i, pair), columns = std::min(n - j, pair);
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t s = 0; s < columns; ++s) {
          float& target = c[(i + r) * ldc + j + s];
          target = accumulate ? target + sums[r * pair + s] : sums[r * pair + s];
        }
    }
  }
}

}  // namespace poet::amx
#pragma GCC pop_options
#endif

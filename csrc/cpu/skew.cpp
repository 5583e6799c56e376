/* Packed strict upper triangles to skew blocks and back, in tiles that keep both triangles of a block in the cache. */
#include <algorithm>
#include <cstdint>

#include "poet_cpu.h"

namespace poet {
namespace {

constexpr std::int64_t tile = 32;

/* Calls body(i, j, first, last) for the pieces (rows i, columns [first, last)) above the diagonal of a tile, tile after tile. */
template <class Body>
void upper_pieces(std::int64_t b, const Body& body) {
  for (std::int64_t top = 0; top < b; top += tile)
    for (std::int64_t left = top; left < b; left += tile)
      for (std::int64_t i = top; i < std::min(top + tile, b); ++i) body(i, std::max(left, i + 1), std::min(left + tile, b));
}

/* Where row i starts in the packed triangle, minus i + 1: element (i, j) is at row_start(i) + j. */
std::int64_t row_start(std::int64_t i, std::int64_t b) { return i * b - i * (i + 1) / 2 - i - 1; }

}  // namespace
}  // namespace poet

int poet_cpu_skew_unpack(const float* packed, int64_t ld, float* q, int64_t count, int64_t b) {
  using namespace poet;
  if (count < 0 || b < 0) return POET_BAD_SHAPE;
#pragma omp parallel for schedule(static)
  for (std::int64_t n = 0; n < count; ++n) {
    const float* in = packed + n * ld;
    float* out = q + n * b * b;
    upper_pieces(b, [&](std::int64_t i, std::int64_t first, std::int64_t last) {
      const float* row = in + row_start(i, b);
      for (std::int64_t j = first; j < last; ++j) out[i * b + j] = row[j];
      for (std::int64_t j = first; j < last; ++j) out[j * b + i] = -row[j];
    });
    for (std::int64_t i = 0; i < b; ++i) out[i * b + i] = 0.0f;
  }
  return POET_OK;
}

int poet_cpu_skew_pack_grad(const float* dq, float* packed, int64_t ld, int64_t count, int64_t b) {
  using namespace poet;
  if (count < 0 || b < 0) return POET_BAD_SHAPE;
#pragma omp parallel for schedule(static)
  for (std::int64_t n = 0; n < count; ++n) {
    const float* in = dq + n * b * b;
    float* out = packed + n * ld;
    upper_pieces(b, [&](std::int64_t i, std::int64_t first, std::int64_t last) {
      for (std::int64_t j = first; j < last; ++j) out[row_start(i, b) + j] = in[i * b + j] - in[j * b + i];
    });
  }
  return POET_OK;
}

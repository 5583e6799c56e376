/* Gathers of bf16 columns, four rows at a time: the rows are interleaved into units of 8 bytes, so that one load moves four elements. */
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poet {

/* Elements of the plan for rows of n elements, and of the work buffer of one thread (in bf16). */
inline std::int64_t gather_plan_size(std::int64_t n) { return (n + 31) / 32 * 32; }
inline std::int64_t gather_buffer_size(std::int64_t n) { return 8 * gather_plan_size(n); }

/* The plan of out[i] = in[order[i]]: where the unit for every place of the interleaved output lies in the interleaved input. */
void plan_gather(const std::int32_t* order, std::int64_t n, std::int32_t* plan);

/* Four rows of n elements. Needs AVX-512 BW. */
void gather_four(const bf16* in, std::int64_t ld_in, const std::int32_t* plan, bf16* out, std::int64_t ld_out, std::int64_t n, bf16* buffer);

/* Any number of rows; order (and its plan) may be nullptr for a copy. */
inline void move_rows(const Kernels& kernels, std::int64_t rows, const bf16* in, std::int64_t ld_in, const std::int32_t* order,
                      const std::int32_t* plan, bf16* out, std::int64_t ld_out, std::int64_t n, bf16* buffer) {
  std::int64_t r = 0;
  if (order != nullptr)
    for (; r + 4 <= rows; r += 4) gather_four(in + r * ld_in, ld_in, plan, out + r * ld_out, ld_out, n, buffer);
  for (; r < rows; ++r) kernels.move_bf16(in + r * ld_in, order, out + r * ld_out, n);
}

}  // namespace poet

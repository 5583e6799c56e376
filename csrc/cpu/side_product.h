/* x (I + D) for a few rows at a time, in fp32: the packed increments of one side and the loop over its blocks. */
#pragma once

#include <cstdint>

#include "blocks.h"
#include "kernels.h"

namespace poet {

/* Elements of the packed increments of a side. */
inline std::int64_t packed_side_size(const Kernels& kernels, const poet_blocks& blocks) {
  return blocks.count * packed_size(kernels, blocks.size, blocks.size) +
         blocks.ragged_count * packed_size(kernels, blocks.ragged_size, blocks.ragged_size);
}

/* Where block `index` starts in the packed increments. */
inline std::int64_t packed_offset(const Kernels& kernels, const poet_blocks& blocks, std::int64_t index) {
  const std::int64_t full = index < blocks.count ? index : blocks.count;
  return full * packed_size(kernels, blocks.size, blocks.size) +
         (index - full) * packed_size(kernels, blocks.ragged_size, blocks.ragged_size);
}

/* y = x (I + D) on the covered columns of `rows` rows; x and y may not overlap. */
inline void side_product(const Kernels& kernels, const poet_blocks& blocks, const float* packed, std::int64_t rows, const float* x,
                         std::int64_t ldx, float* y, std::int64_t ldy) {
  for (std::int64_t index = 0; index < block_count(blocks); ++index) {
    const Block block = block_at(blocks, index);
    const float* in = x + block.offset;
    kernels.gemm_f32({rows, block.size, block.size, in, ldx, 1, packed + packed_offset(kernels, blocks, index), in, ldx,
                      y + block.offset, ldy});
  }
}

}  // namespace poet

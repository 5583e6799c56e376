/* The blocks of a side, one after the other. */
#pragma once

#include <cstdint>

#include "poet_status.h"

namespace poet {

struct Block {
  std::int64_t size, offset; /* side, and first stored column */
  std::int64_t increment;    /* where its E starts in the tensor of its run, in elements */
  bool ragged;               /* which run it belongs to */
};

inline std::int64_t block_count(const poet_blocks& blocks) { return blocks.count + blocks.ragged_count; }

inline std::int64_t covered(const poet_blocks& blocks) { return blocks.count * blocks.size + blocks.ragged_count * blocks.ragged_size; }

inline Block block_at(const poet_blocks& blocks, std::int64_t index) {
  if (index < blocks.count) return {blocks.size, index * blocks.size, index * blocks.size * blocks.size, false};
  const std::int64_t i = index - blocks.count, size = blocks.ragged_size;
  return {size, blocks.count * blocks.size + i * size, i * size * size, true};
}

inline bool fits(const poet_blocks& blocks, std::int64_t width) {
  return blocks.count >= 0 && blocks.size >= 0 && blocks.ragged_count >= 0 && blocks.ragged_size >= 0 && covered(blocks) <= width;
}

}  // namespace poet

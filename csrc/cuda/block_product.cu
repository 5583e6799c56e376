// poet_cuda_block_product: chooses a kernel for the full blocks and one for the ragged blocks, and copies the columns after them.
//
// Static shape of the kernels (threads, shared memory, thread blocks per multiprocessor that it allows): block_product_bf16.cuh,
// block_product_f32.cuh. Specialised sizes need 16-byte aligned pointers and strides; everything else takes block_product_general.
#include <type_traits>

#include "block_product_general.cuh"
#include "launch.cuh"
#include "poet_cuda.h"

namespace poet {
namespace {

struct Matrices {
  const void* x;
  int64_t ldx;
  void* y;
  int64_t ldy, tokens;
  void* stream;
};

// Panels along x and token ranges of `per_range` tiles along y.
struct Plan {
  dim3 grid;
  int64_t per_range;

  // A range has at least `least` tokens, so that its increments weigh little against its tokens. `per_sm`: blocks per multiprocessor.
  Plan(int64_t panels, int64_t tokens, int64_t tile, int64_t least, int64_t per_sm) {
    const int64_t tiles = ceil_div(tokens, tile), resident = per_sm * device_attribute(cudaDevAttrMultiProcessorCount, 132);
    per_range = ceil_div(tiles, token_ranges(panels, tiles, ceil_div(least, tile), resident));
    grid = dim3(static_cast<unsigned>(panels), static_cast<unsigned>(ceil_div(tiles, per_range)));
  }
};

template <int B, bool TRANSPOSE>
int launch_bf16(const Matrices& m, const void* e, int64_t count) {
  using Tile = ProductTile<B>;
  const Plan plan(ceil_div(count, Tile::P / B), m.tokens, Tile::M, 2 * B, Tile::RESIDENT);
  return launch(block_product_bf16<B, TRANSPOSE>, plan.grid, Tile::THREADS, Tile::SHARED_BYTES, m.stream, static_cast<const bf16*>(m.x),
                m.ldx, static_cast<const bf16*>(e), count, static_cast<bf16*>(m.y), m.ldy, m.tokens, plan.per_range);
}

template <int B>
int launch_f32(const Matrices& m, const void* e, int64_t count, int transpose) {
  using Tile = ProductTileF32<B>;
  const Plan plan(ceil_div(count, Tile::K / B) * (Tile::K / Tile::N), m.tokens, Tile::M, 2 * B, Tile::RESIDENT);
  return launch(block_product_f32<B>, plan.grid, Tile::THREADS, Tile::SHARED_BYTES, m.stream, static_cast<const float*>(m.x), m.ldx,
                static_cast<const float*>(e), count, transpose, static_cast<float*>(m.y), m.ldy, m.tokens, plan.per_range);
}

template <class T>
int launch_general(const Matrices& m, const void* e, int64_t count, int64_t b, int transpose, bool aligned) {
  const PanelLayout layout(count, b);
  const Plan plan(layout.panels(), m.tokens, kTile, layout.per_panel ? 2 * kTile : kTile, 3);
  const int vectors = aligned && b % (16 / static_cast<int64_t>(sizeof(T))) == 0;
  return launch(block_product_general<T>, plan.grid, kGeneralThreads, 2 * kTile * kTile * static_cast<int64_t>(sizeof(T)), m.stream,
                static_cast<const T*>(m.x), m.ldx, static_cast<const T*>(e), count, b, transpose, static_cast<T*>(m.y), m.ldy, m.tokens,
                plan.per_range, vectors);
}

// Whether the kernels of block size B are in this build; tests of single sizes leave the others out to compile faster.
constexpr bool built(int64_t size) {
#ifdef POET_ONLY_BLOCK_SIZE
  return size == POET_ONLY_BLOCK_SIZE;
#else
  return size == 16 || size == 32 || size == 64 || size == 128 || size == 256;
#endif
}

template <int B>
int launch_specialised(int dtype, const Matrices& m, const void* e, int64_t count, int transpose) {
  if constexpr (built(B)) {
    if (dtype == POET_F32) return launch_f32<B>(m, e, count, transpose);
    return transpose ? launch_bf16<B, true>(m, e, count) : launch_bf16<B, false>(m, e, count);
  }
  return POET_BAD_SHAPE;
}

int launch_run(int dtype, const Matrices& m, const void* e, int64_t count, int64_t size, int transpose) {
  if (count == 0 || m.tokens == 0) return POET_OK;
  if (count * ceil_div(size, kTile) > kMaxGrid) return POET_BAD_SHAPE;
  const int64_t per_chunk = dtype == POET_BF16 ? 8 : 4;
  const bool aligned = aligned_to(m.x, 16) && aligned_to(m.y, 16) && m.ldx % per_chunk == 0 && m.ldy % per_chunk == 0;
  if (aligned && aligned_to(e, 16) && built(size)) {
    switch (size) {
      case 16: return launch_specialised<16>(dtype, m, e, count, transpose);
      case 32: return launch_specialised<32>(dtype, m, e, count, transpose);
      case 64: return launch_specialised<64>(dtype, m, e, count, transpose);
      case 128: return launch_specialised<128>(dtype, m, e, count, transpose);
      default: return launch_specialised<256>(dtype, m, e, count, transpose);
    }
  }
  if (dtype == POET_F32) return launch_general<float>(m, e, count, size, transpose, aligned);
  return launch_general<bf16>(m, e, count, size, transpose, aligned);
}

}  // namespace
}  // namespace poet

extern "C" int poet_cuda_block_product(int dtype, const void* x, int64_t ldx, const void* e_full, const void* e_ragged, poet_blocks blocks,
                                       int transpose, void* y, int64_t ldy, int64_t tokens, int64_t width, void* stream) {
  using namespace poet;
  if (dtype != POET_F32 && dtype != POET_BF16) return POET_BAD_DTYPE;
  if (tokens < 0 || !valid_blocks(blocks, width) || ldx < width || ldy < width) return POET_BAD_SHAPE;
  const int64_t bytes = dtype == POET_F32 ? 4 : 2;
  auto from = [&](int64_t column) {
    return Matrices{static_cast<const char*>(x) + column * bytes, ldx, static_cast<char*>(y) + column * bytes, ldy, tokens, stream};
  };
  const int64_t full = blocks.count ? blocks.count * blocks.size : 0;
  const int64_t covered = full + (blocks.ragged_count ? blocks.ragged_count * blocks.ragged_size : 0);
  if (int status = launch_run(dtype, from(0), e_full, blocks.count, blocks.size, transpose)) return status;
  if (int status = launch_run(dtype, from(full), e_ragged, blocks.ragged_count, blocks.ragged_size, transpose)) return status;
  const Matrices rest = from(covered);
  return poet_cuda_permute_columns(dtype, rest.x, ldx, nullptr, rest.y, ldy, tokens, width - covered, stream);
}

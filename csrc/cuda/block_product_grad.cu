// poet_cuda_block_product_grad: chooses kernels as poet_cuda_block_product does, and adds up the token ranges.
#include <type_traits>

#include "block_product_grad.cuh"
#include "launch.cuh"
#include "poet_cuda.h"

namespace poet {
namespace {

// Token ranges, as if on 132 multiprocessors: a function of the shapes alone, so that the order of summation, and with it the result, is
// the same on every device. At least 256 tokens and 2 b of them per range: partial sums (b^2 floats per range and block, written and read
// once) then weigh no more than the range's x and g in bf16; they mostly stay in L2.
int64_t grad_ranges(int64_t count, int64_t b, int64_t tokens) {
  if (count == 0) return 1;
  const PanelLayout layout(count, b);
  const int64_t panels = b == 256 ? 2 * count : b == 128 ? count : layout.panels() * layout.slabs, per_sm = b == 256 ? 1 : b == 128 ? 2 : 3;
  return std::min<int64_t>(token_ranges(panels, tokens, std::max<int64_t>(256, 2 * b), 132 * per_sm), 64);
}
// Bytes of partial sums of a run.
int64_t partial_bytes(int64_t count, int64_t b, int64_t tokens) {
  const int64_t ranges = grad_ranges(count, b, tokens);
  return ranges > 1 ? ceil_div(ranges * count * b * b * 4, 256) * 256 : 0;  // the next run starts aligned
}

struct Operands {
  const void *x, *g;
  int64_t ldx, ldg, tokens;
  float *out, *partial;
  void* stream;
};

// Launches `kernel` with `panels` thread blocks per token range, then the reduction.
template <class Kernel, class... Arguments>
int launch_ranges(Kernel kernel, int threads, int64_t shared, int64_t panels, int64_t tile, int64_t count, int64_t b, const Operands& o,
                  Arguments... arguments) {
  if (panels > kMaxGrid) return POET_BAD_SHAPE;
  const int64_t ranges = grad_ranges(count, b, o.tokens), per_range = ceil_div(ceil_div(o.tokens, tile), ranges), elements = count * b * b;
  const dim3 grid(static_cast<unsigned>(panels), static_cast<unsigned>(ranges));
  if (int status = launch(kernel, grid, threads, shared, o.stream, arguments..., per_range)) return status;
  if (ranges == 1) return POET_OK;
  const int64_t blocks = std::min<int64_t>(ceil_div(elements, 256), 132 * 8);
  return launch(sum_ranges, dim3(static_cast<unsigned>(blocks)), 256, 0, o.stream, o.partial, o.out, elements, ranges);
}

template <int B>
int launch_bf16(const Operands& o, int64_t count) {
  using Tile = GradTile<B>;
  const int64_t panels = ceil_div(count, Tile::OI / B) * (Tile::OI / Tile::OC);
  return launch_ranges(block_product_grad_bf16<B>, Tile::THREADS, Tile::SHARED_BYTES, panels, Tile::KT, count, B, o,
                       static_cast<const bf16*>(o.x), o.ldx, static_cast<const bf16*>(o.g), o.ldg, o.partial, count, o.tokens);
}

template <int B>
int launch_f32(const Operands& o, int64_t count) {
  using Tile = GradTileF32<B>;
  constexpr int64_t across = B <= Tile::OI ? 1 : B / Tile::OI;
  const int64_t panels = B <= Tile::OI ? ceil_div(count, Tile::OI / B) : count * across * across;
  return launch_ranges(block_product_grad_f32<B>, Tile::THREADS, Tile::SHARED_BYTES, panels, Tile::KT, count, B, o,
                       static_cast<const float*>(o.x), o.ldx, static_cast<const float*>(o.g), o.ldg, o.partial, count, o.tokens);
}

template <class T>
int launch_general(const Operands& o, int64_t count, int64_t b, bool aligned) {
  const PanelLayout layout(count, b);
  const int vectors = aligned && b % (16 / static_cast<int64_t>(sizeof(T))) == 0;
  return launch_ranges(block_product_grad_general<T>, kGeneralThreads, 2 * kTile * kTile * static_cast<int64_t>(sizeof(T)),
                       layout.panels() * layout.slabs, kTile, count, b, o, static_cast<const T*>(o.x), o.ldx, static_cast<const T*>(o.g),
                       o.ldg, o.partial, count, b, o.tokens, vectors);
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
int launch_specialised(int dtype, const Operands& o, int64_t count) {
  if constexpr (built(B)) return dtype == POET_F32 ? launch_f32<B>(o, count) : launch_bf16<B>(o, count);
  return POET_BAD_SHAPE;
}

// One run of blocks, from column `column` of x and g on; its partial sums go to `workspace`.
int launch_run(int dtype, Operands o, int64_t column, int64_t count, int64_t size, float* out, void* workspace) {
  if (count == 0) return POET_OK;
  const int64_t per_chunk = dtype == POET_BF16 ? 8 : 4, bytes = 16 / per_chunk;
  o.x = static_cast<const char*>(o.x) + column * bytes, o.g = static_cast<const char*>(o.g) + column * bytes;
  o.out = out, o.partial = grad_ranges(count, size, o.tokens) > 1 ? static_cast<float*>(workspace) : out;
  const bool aligned = aligned_to(o.x, 16) && aligned_to(o.g, 16) && o.ldx % per_chunk == 0 && o.ldg % per_chunk == 0;
  if (aligned && aligned_to(o.partial, 16) && built(size)) {
    switch (size) {
      case 16: return launch_specialised<16>(dtype, o, count);
      case 32: return launch_specialised<32>(dtype, o, count);
      case 64: return launch_specialised<64>(dtype, o, count);
      case 128: return launch_specialised<128>(dtype, o, count);
      default: return launch_specialised<256>(dtype, o, count);
    }
  }
  return dtype == POET_F32 ? launch_general<float>(o, count, size, aligned) : launch_general<bf16>(o, count, size, aligned);
}

}  // namespace
}  // namespace poet

extern "C" int64_t poet_cuda_block_product_grad_workspace(poet_blocks blocks, int64_t tokens) {
  return poet::partial_bytes(blocks.count, blocks.size, tokens) + poet::partial_bytes(blocks.ragged_count, blocks.ragged_size, tokens);
}

extern "C" int poet_cuda_block_product_grad(int dtype, const void* x, int64_t ldx, const void* g, int64_t ldg, float* de_full,
                                            float* de_ragged, poet_blocks blocks, int64_t tokens, int64_t width, void* workspace,
                                            void* stream) {
  using namespace poet;
  if (dtype != POET_F32 && dtype != POET_BF16) return POET_BAD_DTYPE;
  if (tokens < 0 || !valid_blocks(blocks, width) || ldx < width || ldg < width) return POET_BAD_SHAPE;
  const Operands o{x, g, ldx, ldg, tokens, nullptr, nullptr, stream};
  if (int status = launch_run(dtype, o, 0, blocks.count, blocks.size, de_full, workspace)) return status;
  void* const after = static_cast<char*>(workspace) + partial_bytes(blocks.count, blocks.size, tokens);
  return launch_run(dtype, o, blocks.count ? blocks.count * blocks.size : 0, blocks.ragged_count, blocks.ragged_size, de_ragged, after);
}
